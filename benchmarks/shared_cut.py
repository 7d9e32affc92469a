"""Times the cut by one process against that by several, with how many images each has seen, and compares the results.

One process and several take turns, so that a busy machine slows both; the best time of each counts. Seconds of the
processor are given beside those of the clock, since they do not count what other programs take. Needs ../shared
(CIFAR-10 and the ViT trained on it). Prints a table and writes JSON with machine, versions, seed and command.

    python benchmarks/shared_cut.py                    # about 5 minutes on 2 cores
    python benchmarks/shared_cut.py --quick            # a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.compression.cut import cut_
from vitrim.config.options import CalibrateOptions, RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.data import first_images, open_images, transform_for
from vitrim.distributed.processes import join_
from vitrim.distributed.sharing import shared_on
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment

SHARED = Path(__file__).resolve().parents[2] / "shared"


def main() -> None:
    """Time both in turns, or cut once among the processes that torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=192, help="hidden units that stay of 768")
    parser.add_argument("--refit-steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shared_cut.json"))
    parser.add_argument("--cut", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_images, arguments.refit_steps, arguments.rounds = 256, 20, 1
    if arguments.cut is not None:
        cut(arguments, arguments.cut)
        return
    rows = measured(arguments)
    known = {"environment": environment(), "arguments": {key: str(value) for key, value in vars(arguments).items()}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**known, "command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    print(table(rows))


def cut(arguments: argparse.Namespace, folder: Path) -> None:
    """Cut once among the processes that there are; each writes what it took."""
    join_("cpu")
    share = shared_on(torch.device("cpu"))
    teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher)
    seen = count_images(student)
    images = open_images(SHARED / "data" / "cifar10" / "train.parquet", transform=transform_for(teacher))
    options = CalibrateOptions(num_images=arguments.num_images, batch_size=arguments.batch_size)
    batches, _ = first_images(images, options.num_images, seed=arguments.seed, batch_size=options.batch_size)
    repair = RepairOptions(refit=arguments.refit_steps > 0, refit_steps=max(1, arguments.refit_steps))
    recipe = Recipe(hidden_dim=arguments.width, seed=arguments.seed, repair=repair, calibrate=options)
    started, worked = time.perf_counter(), time.process_time()
    report = cut_(student, teacher, find_mlps(teacher), recipe, batches, quiet=True, halves=True, share=share)
    found = {
        "seconds": time.perf_counter() - started,
        "processor_s": time.process_time() - worked,
        "images": len(seen),
        "picks": [list(edit.keep) for edit in report.plan.edits],  # type: ignore[attr-defined]
    }
    (folder / f"{share.rank}.json").write_text(json.dumps(found))
    if share.rank == 0:
        torch.save(student.state_dict(), folder / "student.pt")


def count_images(model: nn.Module) -> set[bytes]:
    """Return the set of all images that go through a model, which grows as it runs."""
    seen: set[bytes] = set()

    def see(_: nn.Module, args: Any) -> None:
        seen.update(image.numpy().tobytes() for image in args[0])

    model.register_forward_pre_hook(see)
    return seen


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for one process and one for several."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], arguments.processes: []}
    names = ("num_images", "batch_size", "width", "refit_steps", "seed")
    given = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    for num in [num for _ in range(arguments.rounds) for num in runs]:
        with tempfile.TemporaryDirectory() as folder:
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num)]
            on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            subprocess.run([*start, __file__, *given, "--cut", folder], check=True, env=on_cpu)
            each = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num)]
            weights = torch.load(Path(folder) / "student.pt")
        runs[num].append({"each": each, "weights": weights})
    alone = runs[1][0]
    return [row(num, found, alone) for num, found in runs.items()]


def row(num: int, found: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """Return the best times of some runs, and how far the first one's result is from that of one process."""
    pairs = [(found[0]["weights"][name], tensor) for name, tensor in alone["weights"].items()]
    return {
        "processes": num,
        "seconds": min(run["each"][0]["seconds"] for run in found),
        "processor_s": min(max(one["processor_s"] for one in run["each"]) for run in found),
        "images": [one["images"] for one in found[0]["each"]],
        "same_picks": all(one["picks"] == alone["each"][0]["picks"] for run in found for one in run["each"]),
        "largest_difference": max(float((a - b).norm() / b.norm()) for a, b in pairs if float(b.norm()) > 0),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| processes | images each has seen | seconds | ratio | processor seconds of the busiest | ratio | "
        "same picks | largest relative difference of a tensor |",
        "|" + " --- |" * 8,
    ]
    for each in rows:
        clock, work = (rows[0][key] / each[key] for key in ("seconds", "processor_s"))
        same = "yes" if each["same_picks"] else "no"
        lines.append(
            f"| {each['processes']} | {', '.join(map(str, each['images']))} | {each['seconds']:.1f} | {clock:.2f}x | "
            f"{each['processor_s']:.1f} | {work:.2f}x | {same} | {each['largest_difference']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
