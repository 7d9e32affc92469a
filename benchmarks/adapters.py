"""Compares what trains in recovery: all weights, LoRA, or OP-LoRA, from the same cut, at equal steps.

One run, equal images and steps; each row is the best of several rates on held-out images, its own for each kind and
start. Starts are a repaired cut, which few steps hardly improve, and one that was left as it was cut. Needs ../shared
(CIFAR-10 and the ViT trained on it). Prints a table and writes JSON with machine, versions, seed and command.

    python benchmarks/adapters.py            # about 12 minutes on 2 cores
    python benchmarks/adapters.py --steps 10 --num-images 600 --methods dgmr
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recovery import Bench
from torch import nn

from vitrim.config.options import AdapterOptions, RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for
from vitrim.output.provenance import environment
from vitrim.recover.distill import recover_
from vitrim.recover.result import Recovery, Validation

METHODS = {"dgmr": "repaired", "dgmr-paper": "not repaired"}
KINDS = {"full": "all weights", "lora": "LoRA", "op-lora": "OP-LoRA"}
# Rates that are tried, for each start; a rate that wins at an end of its row would ask for another one there.
RATES = {
    "dgmr": {"full": (3e-5, 1e-4, 3e-4), "lora": (3e-4, 1e-3, 3e-3), "op-lora": (1e-5, 3e-5, 1e-4)},
    "dgmr-paper": {"full": (1e-3, 2e-3, 4e-3), "lora": (1e-2, 2e-2, 4e-2), "op-lora": (2e-4, 5e-4, 1e-3)},
}
# A trained value's gradient and Adam's two moments, float32.
STATE_BYTES = 12


def main() -> None:
    """Cut once for each start, then recover once for every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters.json"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.num_images, arguments.seed)
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "command": " ".join(sys.argv),
        "starts": {},
        "rows": [],
    }
    kinds = [("full", 0), *((kind, rank) for rank in arguments.ranks for kind in ("lora", "op-lora"))]
    for method in arguments.methods:
        cut = bench.cut(method, round(arguments.ratio * 192))
        result["starts"][method] = bench.scores(cut)
        for kind, rank in kinds:
            size = {"steps": arguments.steps, "batch_size": arguments.batch_size}
            rows = [run_row(bench, cut, kind, rank, lr=lr, **size) for lr in RATES[method][kind]]
            row = min(rows, key=lambda row: row["best_error"])
            row["peak_mib"] = peak_of(bench, cut, kind, rank, batch_size=arguments.batch_size)
            row["rates"] = {f"{each['lr']:g}": each["best_error"] for each in rows}
            result["rows"].append({"method": method, **row})
            print(format_row(result["rows"][-1]), flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def run_row(
    bench: Bench, cut: nn.Module, kind: str, rank: int, *, lr: float, steps: int, batch_size: int
) -> dict[str, Any]:
    """Recover a copy of the cut model by what this row trains, at one rate, and judge it."""
    more = {"flip": True, "num_validations": 10, "adapter": adapter_of(kind, rank)}
    options = RecoverOptions(steps=steps, batch_size=batch_size, lr=lr, **more)
    student, marks = copy.deepcopy(cut), list[tuple[int, float]]()
    found = recover(bench, student, options, lambda judged: marks.append((judged.step, time.monotonic())))
    (first, started), (last, ended) = marks[1], marks[-1]
    reached = sum(p.numel() for name, p in cut.named_parameters() if not name.startswith("head."))
    trained = found.adapter["num_trained"] if found.adapter else reached
    return {
        "kind": kind,
        "rank": rank,
        "num_trained": trained,
        "state_mib": STATE_BYTES * trained / 2**20,
        "step_s": (ended - started) / (last - first),
        **found.__dict__,
        "start_error": found.curve[0]["relative_error"],
        "test": bench.scores(student),
    }


def adapter_of(kind: str, rank: int) -> AdapterOptions | None:
    """What a row trains in place of the weights."""
    return None if kind == "full" else AdapterOptions.model_validate({"kind": kind, "rank": rank, "alpha": rank})


def peak_of(bench: Bench, cut: nn.Module, kind: str, rank: int, *, batch_size: int) -> float:
    """Peak memory of one step and its validation."""
    more = {"num_validations": 1, "flip": True, "adapter": adapter_of(kind, rank)}
    options = RecoverOptions(steps=1, batch_size=batch_size, lr=1e-6, **more)
    return peak_mib(lambda: recover(bench, copy.deepcopy(cut), options))


def recover(
    bench: Bench,
    student: nn.Module,
    options: RecoverOptions,
    on_validation: Callable[[Validation], None] | None = None,
) -> Recovery:
    """The same recovery for every row."""
    return recover_(
        student,
        bench.teacher,
        bench.train.augmented(augment_for(bench.teacher, "light", flip=True), bench.seed),
        held_out=list(bench.held_out.split(128)),
        options=options,
        context=RunContext(quiet=True, seed=bench.seed),
        on_validation=on_validation,
    )


def peak_mib(work: Callable[[], Any]) -> float:
    """The most memory in tensors at any moment of some work, above what there was before; torch's allocator says it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def markdown(result: dict[str, Any]) -> str:
    """The table as the documentation shows it; relative error and top-1 are those of all test images."""
    lines = [
        "| cut | what trains | values | gradients, moments | memory | step | best rate | relative error | top-1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, start in result["starts"].items():
        lines.append(f"| {METHODS[method]} | nothing | | | | | | {scores(start)} |")
        for row in (row for row in result["rows"] if row["method"] == method):
            lines.append(
                f"| {METHODS[method]} | {name_of(row)} | {row['num_trained']:,} | {row['state_mib']:.1f} MiB | "
                f"{row['peak_mib']:.0f} MiB | {row['step_s']:.2f} s | {row['lr']:g} | {scores(row['test'])} |"
            )
    return "\n".join(lines)


def scores(test: dict[str, float]) -> str:
    """Two cells."""
    return f"{test['relative_error']:.4f} | {test['top1']:.2f}"


def name_of(row: dict[str, Any]) -> str:
    """What a row trains, in words."""
    return KINDS[row["kind"]] + (f", rank {row['rank']}" if row["rank"] else "")


def format_row(row: dict[str, Any]) -> str:
    """One line as rows come in."""
    errors = f"held-out error {row['start_error']:.5f} -> {row['best_error']:.5f} (step {row['best_step']})"
    name = f"{METHODS[row['method']]}: {name_of(row)}"
    return f"{name:32} {row['num_trained']:>9,} values, {row['peak_mib']:.0f} MiB, {errors}, rates {row['rates']}"


if __name__ == "__main__":
    main()
