"""What fitting factors to the outputs is worth over fitting them to the weights, before any training.

Every linear layer inside the blocks of the CIFAR-10 ViT of ../shared is factored to half (and other shares) of its
values, by plain and by whitened SVD. Relative squared error of all output tokens and top-1, on test images.

    python benchmarks/low_rank.py              # a few minutes on 2 cores
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import num_parameters
from vitrim.data import first_images, open_images, transform_for
from vitrim.evaluation import top1_of
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
# row -> options; all at the same ranks
ROWS: dict[str, dict[str, Any]] = {"plain SVD": {"whiten": False}, "whitened SVD": {"whiten": True}}


def main() -> None:
    """Run every row at every share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/low_rank.json"))
    arguments = parser.parse_args()
    teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
    teacher.requires_grad_(False)
    transform = transform_for(teacher)
    train = open_images(CIFAR10 / "train.parquet", transform=transform)
    batches, _ = first_images(train, arguments.num_images, seed=0)
    test = list(
        open_images(CIFAR10 / "test.parquet", transform=transform, limit=arguments.num_test).loader(batch_size=100)
    )
    images, sites = [batch.images_BCHW for batch in test], find_mlps(teacher)
    table: dict[str, dict[str, dict[str, float]]] = {"original": {"1": {**top1_of(teacher, test)}}}
    for share in arguments.shares:
        recipe = {"method": "low-rank", "keep_ratio": share}
        for row, options in ROWS.items():
            student, started = copy.deepcopy(teacher), time.monotonic()
            cut_(student, teacher, sites, Recipe.parse({**recipe, "options": options}), batches, quiet=True)
            table.setdefault(row, {})[f"{share:g}"] = {
                "parameters": num_parameters(student) / num_parameters(teacher),
                "relative_error": fidelity(student, teacher, images)["relative_error"],
                **top1_of(student, test),
                "seconds": time.monotonic() - started,
            }
            print(f"{share:g} {row}: {table[row][f'{share:g}']}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment(), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
