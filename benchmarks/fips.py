"""What FiPS makes of half (and other shares) of the MLPs' values, beside DGMR at as many stored numbers.

The CIFAR-10 ViT of ../shared, six MLPs; no recovery of the whole model afterwards. Relative squared error of all output
tokens and top-1, on test images; `stored` is the share of the model's bytes, masks included.

    python benchmarks/fips.py              # ten minutes on 2 cores
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from vitrim.checkpoint import open_model
from vitrim.cost import count_macs, model_size
from vitrim.cut import cut_
from vitrim.data import first_images, open_images, transform_for
from vitrim.evaluation import environment, top1_of
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.recipe import Recipe

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
ROWS: dict[str, dict[str, Any]] = {
    "fips, SVD alone": {"method": "fips", "options": {"steps": 0}},
    "fips, gmp": {"method": "fips", "options": {"schedule": "gmp"}},
    "fips, rigl": {"method": "fips", "options": {"schedule": "rigl"}},
    "dgmr, least squares": {"method": "dgmr", "repair": {"refit": False}},
    "dgmr, and refit": {"method": "dgmr"},
}


def main() -> None:
    """Run every row at every share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--options", type=json.loads, default={}, help="further options of fips, as JSON")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fips.json"))
    arguments = parser.parse_args()
    teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
    teacher.requires_grad_(False)
    transform = transform_for(teacher)
    train = open_images(CIFAR10 / "train.parquet", transform=transform, split="train")
    batches, _ = first_images(train, arguments.num_images, seed=0)
    test = list(
        open_images(CIFAR10 / "test.parquet", transform=transform, limit=arguments.num_test).loader(batch_size=100)
    )
    images, sites, size = [batch.images_BCHW for batch in test], find_mlps(teacher), model_size(teacher)
    table: dict[str, dict[str, Any]] = {"original": {**top1_of(teacher, test)}}
    for share in arguments.shares:
        for row in arguments.rows:
            recipe = {**ROWS[row], "keep_ratio": share}
            if recipe["method"] == "fips":
                recipe["options"] = {**recipe["options"], **arguments.options}
            student, started = copy.deepcopy(teacher), time.monotonic()
            report = cut_(student, teacher, sites, Recipe.parse(recipe), batches, quiet=True)
            table[f"{share:g} {row}"] = {
                "stored": model_size(student)["num_bytes"] / size["num_bytes"],
                "macs": count_macs(student, images[0][:1]) / count_macs(teacher, images[0][:1]),
                "relative_error": fidelity(student, teacher, images)["relative_error"],
                **top1_of(student, test),
                "seconds": time.monotonic() - started,
                "notes": report.notes,
            }
            print(f"{share:g} {row}: {table[f'{share:g} {row}']}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment(), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
