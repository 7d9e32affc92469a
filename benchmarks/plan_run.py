"""Sets what `vitrim plan-run` says of memory beside what two processes hold here while they distil.

A ViT with random weights, on CPUs over gloo; each process's resident memory above that before its models were made, at
its highest. What a GPU would hold apart from main memory is one here, so the plan's two are added. A state is written
while the next step is taken, as a large one is. Prints a table and writes JSON with machine, versions and command.

    python benchmarks/plan_run.py            # five ways
    python benchmarks/plan_run.py --quick    # a smaller model, two of the ways
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import timm
import torch

from vitrim.compression.plan_run import paired
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.training import Setup
from vitrim.data import open_images
from vitrim.distributed.processes import gathered, is_main, join_
from vitrim.models.sites import find_mlps
from vitrim.output.provenance import environment
from vitrim.recover import state_parts
from vitrim.recover.distill import recover_
from vitrim.recover.run import Run
from vitrim.surgery import KeepUnits, apply_

PROCESSES, STEPS = 2, 2
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "shards": {"fsdp": True},
    "whole, blocks run again": {"checkpoint_activations": True},
    "shards, blocks run again": {"fsdp": True, "checkpoint_activations": True},
    "whole, in two parts": {"gradient_accumulation_steps": 2},
}
# Images of a step, and how each is cut: (side, patch, width, blocks).
LARGE, SMALL = (16, (224, 16, 384, 12)), (16, (128, 16, 256, 6))
WARM = (2, (32, 16, 64, 1))


def main() -> None:
    """Compare all ways, or measure them where torchrun has started this."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_run.json"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size, ways = (SMALL, list(WAYS)[:2]) if arguments.quick else (LARGE, list(WAYS))
    if arguments.measure:
        measure(ways, size, arguments.out)
        return
    rows = compared(ways, size, ["--quick"] if arguments.quick else [])
    print("| two processes | planned | measured | ratio |\n| --- | --- | --- | --- |")
    for row in rows:
        planned, measured = (f"{row[name] / 1e6:.0f} MB" for name in ("planned", "measured"))
        print(f"| {row['way']} | {planned} | {measured} | {row['ratio']:.2f} |")
    about = {"environment": environment(), "command": " ".join(sys.argv), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(about, indent=1) + "\n")


def compared(ways: list[str], size: tuple[int, tuple[int, ...]], more: list[str]) -> list[dict[str, Any]]:
    """Measure ways in two processes that torchrun starts, and plan them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
        command = [sys.executable, *start, __file__, "--measure", "--out", str(out), *more]
        # Memory that is freed goes back to the system at once, so that what is resident is what is held.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        given = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **malloc}
        subprocess.run(command, env=given, check=True)
        measured = json.loads(out.read_text())
    found = [{"way": way, "planned": planned(WAYS[way], size), "measured": max(measured[way])} for way in ways]
    return [{**row, "ratio": row["planned"] / row["measured"]} for row in found]


def options_of(way: dict[str, Any], batch: int) -> RecoverOptions:
    """Options of a short distillation in float32 with AdamW; a step has as many images in each way."""
    parts = way.get("gradient_accumulation_steps", 1)
    length = {"steps": STEPS, "num_validations": STEPS, "lr": 1e-4, "precision": "fp32"}
    return RecoverOptions(**length, batch_size=batch // parts, **way)


def planned(way: dict[str, Any], size: tuple[int, tuple[int, ...]]) -> float:
    """Bytes that a process holds by the plan."""
    batch, shape = size
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(make(shape), folder, model_args=arguments_of(shape), safe_serialization=True)
        pair = paired(folder, Recipe.parse({"mlp_ratio": 1, "exact": True}))
    options = options_of(way, batch)
    setup = Setup(
        processes=PROCESSES,
        batch=batch,
        parts=options.gradient_accumulation_steps,
        fsdp=options.fsdp,
        checkpointed=options.checkpoint_activations,
        bf16=False,
        on_gpu=False,
    )
    held = setup.device_bytes(pair.sizes, pair.rehearsed(setup, options).peak)
    return sum(held.values()) + setup.main_bytes(pair.sizes)


def arguments_of(shape: tuple[int, ...]) -> dict[str, Any]:
    """What timm is told of a model."""
    side, patch, width, depth = shape
    given = {"img_size": side, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": width // 64}
    return {**given, "num_classes": 0}


def make(shape: tuple[int, ...]) -> torch.nn.Module:
    """A ViT with random weights."""
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", **arguments_of(shape)).eval()


def measure(ways: list[str], size: tuple[int, tuple[int, ...]], out: Path) -> None:
    """Distil in several ways, and write the highest resident memory of each process above that before."""
    torch.set_num_threads(1)
    join_("cpu")
    write_slowly()
    found = {}
    for way in ways:
        if not found:
            distil(WAYS[way], WARM, out.parent / "warm")  # all that is loaded once is there then
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest is the present then
        distil(WAYS[way], size, out.parent / way.replace(" ", "-"))
        found[way] = gathered(resident("VmHWM") - before)
    if is_main():
        out.write_text(json.dumps(found))


def write_slowly() -> None:
    """Let a state that is on its way wait for the next step, as on a slow disk; behind the last there is none."""
    taken, step, write = threading.Event(), Run.train_step, state_parts.write_tensors

    def train_step(run: Run, *given: Any, **named: Any) -> float:
        taken.clear()
        loss = step(run, *given, **named)
        taken.set()
        return loss

    def write_tensors(*given: Any) -> str:
        time.sleep(0.5)  # until the step has begun
        taken.wait(60)
        return write(*given)

    Run.train_step, state_parts.write_tensors = train_step, write_tensors


def distil(way: dict[str, Any], size: tuple[int, tuple[int, ...]], work: Path) -> None:
    """A few steps from a cut model, with states kept on disk."""
    batch, shape = size
    teacher = make(shape)
    student = make(shape)
    apply_(student, [KeepUnits.first(site, site.d_model) for site in find_mlps(student)])
    images = torch.randn(STEPS * batch, 3, shape[0], shape[0], generator=torch.Generator().manual_seed(0))
    work.mkdir(parents=True, exist_ok=True)
    recover_(
        student,
        teacher,
        open_images(list(images)),
        held_out=[images[:2]],
        options=options_of(way, batch),
        context=RunContext(work=work, quiet=True),
    )


def resident(name: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at its highest (VmHWM)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
