"""Compares what trains in recovery: all weights, LoRA, or OP-LoRA, from the same repaired cut, at equal steps.

Each row finds its own rate by the same range test and runs in a process of its own, whose peak of resident memory
above what it held before training is the row's. Needs ../shared (CIFAR-10 and the ViT trained on it), and Linux for the
memory. Prints a table and writes JSON with machine, versions, seed and command.

    python benchmarks/adapters.py            # about 10 minutes on 2 cores
    python benchmarks/adapters.py --steps 10 --num-images 600
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recovery import Bench

from vitrim.data import augment_for
from vitrim.evaluation import environment
from vitrim.recipe import AdapterOptions, RecoverOptions
from vitrim.recover.distill import recover_

KINDS = {"full": "all weights", "lora": "LoRA", "op-lora": "OP-LoRA"}
# A trained value's gradient and Adam's two moments, float32.
STATE_BYTES = 12


def main() -> None:
    """Cut once, then run every row, or only the row asked for."""
    arguments = parse()
    bench = Bench(arguments.num_images, arguments.seed)
    if arguments.row is not None:
        kind, rank = arguments.row.split(":")
        print(json.dumps(run_row(bench, kind, int(rank), arguments)))
        return
    student = bench.cut("dgmr", round(arguments.ratio * 192))
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "teacher": bench.scores(bench.teacher),
        "start": bench.scores(student),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / "cut.pt"
        torch.save(student, cut)
        for row in ["full:0", *(f"{kind}:{rank}" for rank in arguments.ranks for kind in ("lora", "op-lora"))]:
            command = [sys.executable, *sys.argv, "--row", row, "--cut", str(cut)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result["rows"].append(json.loads(done.stdout.splitlines()[-1]))
            print(format_row(result["rows"][-1]), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def parse() -> argparse.Namespace:
    """The command line; `--row` and `--cut` are for the processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row")
    parser.add_argument("--cut", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters.json"))
    return parser.parse_args()


def run_row(bench: Bench, kind: str, rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Recover the cut model by what this row trains, and judge it."""
    student = torch.load(arguments.cut, weights_only=False)
    adapter = None if kind == "full" else AdapterOptions.model_validate({"kind": kind, "rank": rank, "alpha": rank})
    marks: list[tuple[int, float]] = []
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    found = recover_(
        student,
        bench.teacher,
        bench.train.augmented(augment_for(bench.teacher, "light", flip=True), bench.seed),
        held_out=list(bench.held_out.split(128)),
        options=RecoverOptions(
            steps=arguments.steps, batch_size=arguments.batch_size, flip=True, num_validations=10, adapter=adapter
        ),
        seed=bench.seed,
        on_validation=lambda step, error: marks.append((step, time.monotonic())),
        quiet=True,
    )
    peak = memory_mib("VmHWM") - before
    (first, started), (last, ended) = marks[1], marks[-1]
    reached = sum(p.numel() for name, p in student.named_parameters() if not name.startswith("head."))
    trained = found.adapter["num_trained"] if found.adapter else reached
    return {
        "kind": kind,
        "rank": rank,
        "num_trained": trained,
        "state_mib": STATE_BYTES * trained / 2**20,
        "peak_mib": peak,
        "step_s": (ended - started) / (last - first),
        "lr": found.lr,
        "rate_test": found.rate_test,
        "start_error": found.curve[0]["relative_error"],
        "best_error": found.best_error,
        "best_step": found.best_step,
        "curve": found.curve,
        "adapter": found.adapter,
        "test": bench.scores(student),
    }


def memory_mib(name: str) -> float:
    """A line of this process's memory: VmRSS is what it holds, VmHWM the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def markdown(result: dict[str, Any]) -> str:
    """The table as the documentation shows it; errors and top-1 are those of all test images."""
    lines = [
        "| what trains | values | gradients, moments | peak memory | step | rate found | relative error | top-1 |",
        "|---|---|---|---|---|---|---|---|",
        f"| nothing: the repaired cut | | | | | | {scores(result['start'])} |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {name_of(row)} | {row['num_trained']:,} | {row['state_mib']:.1f} MiB | {row['peak_mib']:.0f} MiB | "
            f"{row['step_s']:.2f} s | {row['lr']:g} | {scores(row['test'])} |"
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
    return f"{name_of(row):18} {row['num_trained']:>9,} values, {row['peak_mib']:.0f} MiB, rate {row['lr']:g}, {errors}"


if __name__ == "__main__":
    main()
