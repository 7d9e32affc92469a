"""What each idea of the closed form is worth, before any training: selection, least squares, feedback, local refit.

Relative squared error of all output tokens against the original, on images that calibration has not seen; two models:
the digits ViT that comes with vitrim, and the CIFAR-10 ViT of ../shared where that is present.

    python benchmarks/repair.py              # about 15 minutes on 2 cores
    python benchmarks/repair.py --model digits
"""

from __future__ import annotations

import argparse
import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.data import first_images, open_images, transform_for
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
# name -> (model, calibration images, test images)
MODELS: dict[str, tuple[str, Any, Any]] = {
    "digits": (f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}", "digits", "digits"),
    "cifar10": (f"local-dir:{SHARED / 'models' / 'cifar10-vit'}", CIFAR10 / "train.parquet", CIFAR10 / "test.parquet"),
}
NO_REFIT = {"refit": False}
# row -> (method, options, repair); each row adds one idea to the one before it
ROWS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "magnitude": ("magnitude", {}, False),
    "random": ("random", {}, False),
    "DGMR as published": ("dgmr-paper", {}, False),
    "weights + least squares": ("dgmr", {"select_on": "weights"}, {**NO_REFIT, "feedback": 0.0}),
    "activations + least squares": ("dgmr", {"select_on": "activations"}, {**NO_REFIT, "feedback": 0.0}),
    "outputs + least squares": ("dgmr", {}, {**NO_REFIT, "feedback": 0.0}),
    "+ half of the error fed back": ("dgmr", {}, {**NO_REFIT, "feedback": 0.5}),
    "+ all of it": ("dgmr", {}, {**NO_REFIT, "feedback": 1.0}),
    "half of it, + refit, 150 steps at 3e-3": ("dgmr", {}, {"feedback": 0.5, "refit_steps": 150, "refit_lr": 3e-3}),
    "all of it, + refit, 150 steps at 3e-3": ("dgmr", {}, {"refit_steps": 150, "refit_lr": 3e-3}),
    "all of it, + refit, 300 steps at 3e-3": ("dgmr", {}, {"refit_lr": 3e-3}),
    "all of it, + refit, 300 steps at 1e-2 (default)": ("dgmr", {}, True),
}


def main() -> None:
    """Run every row on every model and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/repair.json"))
    arguments = parser.parse_args()
    names = [name for name in MODELS if arguments.model in (name, "all")]
    names = [name for name in names if name == "digits" or SHARED.exists()]
    table = {row: {} for row in ROWS}
    for name in names:
        for ratio in arguments.ratios:
            for row, error in errors(name, ratio, arguments.num_images).items():
                table[row][f"{name}, ratio {ratio:g}"] = error
    result = {"environment": environment(), "table": table}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def errors(name: str, ratio: float, num_images: int) -> dict[str, float]:
    """Relative error of each row on one model at one MLP ratio."""
    source, train, test = MODELS[name]
    teacher, _ = open_model(source)
    teacher.requires_grad_(False)
    sites, transform = find_mlps(teacher), transform_for(teacher)
    images = open_images(train, transform=transform, split="train")
    batches, _ = first_images(images, num_images, seed=0)
    judged = list(open_images(test, transform=transform, split="test", limit=2000).loader(batch_size=200))
    found = {}
    for row, (method, options, repair) in ROWS.items():
        student = copy.deepcopy(teacher)
        recipe = Recipe.parse({"method": method, "options": options, "repair": repair, "mlp_ratio": ratio})
        cut_(student, teacher, sites, recipe, batches, quiet=True)
        found[row] = fidelity(student, teacher, judged)["relative_error"]
        print(f"{name} ratio {ratio:g} {row}: {found[row]:.5f}", flush=True)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table as the documentation shows it."""
    columns = list(next(iter(result["table"].values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row, cells in result["table"].items():
        lines.append(f"| {row} | " + " | ".join(f"{cells[column]:.4f}" for column in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
