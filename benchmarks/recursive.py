"""Relaxed Recursive Transformers on the CIFAR-10 ViT of ../shared, by start and rank, before and after training.

Six blocks become three, each looped twice. Rows: three starts at several ranks; factors that start from zero; ranks by
singular values; norms tied; and `dgmr`, closed form alone, at as many parameters. All get the same distillation.
Relative squared error of all output tokens (0 is identical, 1 is the mean) and top-1 on test images.

    nice python benchmarks/recursive.py              # three seeds; not timed yet
    nice python benchmarks/recursive.py --quick      # one seed, three ranks; not timed yet
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import model_size
from vitrim.data import augment_for, first_images, open_images, transform_for
from vitrim.evaluation import top1_of
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.recover.distill import recover_

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
FULL = 192  # of every matrix of this model


def rows(ranks: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options of the method, at each rank."""
    for rank in ranks:
        for start in ("stepwise", "average", "lower"):
            yield f"{start}, rank {rank}", {"start": start, "rank": rank, "norms": "own"}
        if rank:
            yield f"average from zero, rank {rank}", {"rank": rank, "norms": "own", "factors": "zero"}
        if 0 < rank < FULL:
            yield f"average by singular values, rank {rank}", {"rank": rank, "norms": "own", "ranks": "singular"}
        yield f"average, norms tied, rank {rank}", {"rank": rank, "norms": "tied"}


class Bench:
    """The model, its images, and what is done to every row."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        self.teacher.requires_grad_(False)
        transform = transform_for(self.teacher)
        self.train = open_images(CIFAR10 / "train.parquet", transform=transform)
        test = open_images(CIFAR10 / "test.parquet", transform=transform, limit=arguments.num_test)
        self.test = list(test.loader(batch_size=100))
        self.size = model_size(self.teacher)["num_parameters"]

    def judged(self, student: nn.Module) -> dict[str, float]:
        """Error and top-1 of a student."""
        images = [batch.images_BCHW for batch in self.test]
        return {"error": fidelity(student, self.teacher, images)["relative_error"], **top1_of(student, self.test)}

    def row(self, recipe: dict[str, Any], seed: int) -> dict[str, Any]:
        """One row: cut, judge, distil, judge."""
        started, student = time.monotonic(), copy.deepcopy(self.teacher).requires_grad_(True)
        batches = self.calibration(seed)
        cut_(student, self.teacher, find_mlps(student), Recipe.parse({**recipe, "seed": seed}), batches, quiet=True)
        found = {"parameters": model_size(student)["num_parameters"] / self.size, "before": self.judged(student)}
        if self.arguments.steps:
            recover_(
                student,
                self.teacher,
                self.train.augmented(augment_for(self.teacher, "light", flip=True), seed),
                held_out=batches[:2],
                options=RecoverOptions(steps=self.arguments.steps, batch_size=32, num_validations=2, flip=True),
                context=RunContext(quiet=True, seed=seed),
            )
            found["after"] = self.judged(student)
        return {**found, "seconds": time.monotonic() - started}

    def calibration(self, seed: int) -> list[Tensor]:
        """A thousand training images."""
        return list(first_images(self.train, 1000, seed=seed)[0])

    @staticmethod
    def cut_at(share: float) -> dict[str, Any]:
        """The recipe of `dgmr` that leaves a share of the parameters."""
        return {"method": "dgmr", "repair": {"refit": False}, "params_ratio": share}


def main() -> None:
    """Run every row with every seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, three ranks, few images and steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 8, 32, 64, FULL])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-test", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recursive.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.ranks = arguments.seeds[:1], [0, 8, 32]
        arguments.steps, arguments.num_test = 60, 1000
    bench, table = Bench(arguments), {}
    table["original"] = top1_of(bench.teacher, bench.test)
    for seed in arguments.seeds:
        for name, options in rows(arguments.ranks):
            recipe = {"method": "recursive", "options": {"num_blocks": 3, **options}}
            table[f"{name}, seed {seed}"] = found = bench.row(recipe, seed)
            print(name, seed, found, flush=True)
            if options == {"start": "average", "rank": options["rank"], "norms": "own"} and found["parameters"] < 1:
                table[f"dgmr beside rank {options['rank']}, seed {seed}"] = found = bench.row(
                    bench.cut_at(found["parameters"]), seed
                )
                print("dgmr", seed, found, flush=True)
            arguments.out.write_text(json.dumps({"environment": environment(), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
