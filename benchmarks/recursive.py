"""Relaxed Recursive Transformers by start and rank, before and after equal training; and early exits.

Half of the blocks stay, each looped twice. Rows: three starts at several ranks; factors that start from zero; ranks by
singular values; norms tied; and `dgmr`, closed form alone, at as many parameters. All get the same distillation.
Relative squared error of all output tokens (0 is identical, 1 is the mean) and, where there is a head, top-1 on test
images. `exits` trains early exits behind one of the rows, and says what leaving once the class is sure saves. Rows are
written as they come, and a stopped run goes on behind the last of them.

    nice python benchmarks/recursive.py                     # CIFAR-10 ViT of ../shared, one seed
    nice python benchmarks/recursive.py --seeds 0 1 2       # goes on from the same file
    nice python benchmarks/recursive.py --quick             # two ranks, few images and steps, a file of its own
    nice python benchmarks/recursive.py --model deep        # of deep_vit.py
    nice python benchmarks/recursive.py --model minilm      # on the text that comes with Python's help
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rows import MODELS, SHARED, Rows, by_seed, mean, mean_top1, results, table
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import ExitOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import model_size
from vitrim.cost.sure import judge_sure
from vitrim.data import ImageSet, augment_for, first_images, split_indices
from vitrim.data.inputs import open_set
from vitrim.distributed.precision import has_fast_bf16
from vitrim.evaluation import own_top1, top1_of
from vitrim.metrics.fidelity import compare
from vitrim.models.exits import Loops, UntilSure
from vitrim.models.features import num_classes
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_encoder
from vitrim.recover.distill import recover_
from vitrim.recover.exits import train_exits_

QUICK = {"ranks": [0, 32], "steps": 10, "lr": 0.003, "num_test": 200, "num_images": 100}
CONFIDENCES = (0.5, 0.8, 0.9, 0.95)
EXAMPLE = 32  # the rank at which factors from zero, tied norms and early exits are tried


def rows(ranks: list[int], full: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and options of the method, at each rank."""
    for rank in ranks:
        for start in ("stepwise", "average", "lower"):
            yield f"{start}, rank {rank}", {"start": start, "rank": rank, "norms": "own"}
        if 0 < rank < full:
            yield f"average by singular values, rank {rank}", {"rank": rank, "norms": "own", "ranks": "singular"}
        if rank == EXAMPLE:
            yield f"average from zero, rank {rank}", {"rank": rank, "norms": "own", "factors": "zero"}
        if rank in (0, EXAMPLE):
            yield f"average, norms tied, rank {rank}", {"rank": rank, "norms": "tied"}


class Bench:
    """The model, its inputs, and what is done to every row."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.teacher, self.origin = open_encoder(arguments.source or MODELS[arguments.model])
        self.teacher = self.teacher.float().eval().requires_grad_(False)
        sites = find_mlps(self.teacher)
        self.num_blocks, self.full = len({site.block for site in sites}) // 2, min(site.d_model for site in sites)
        self.train, test = self.inputs()
        self.test = list(test.loader(batch_size=100))
        given = {"steps": arguments.steps, "batch_size": arguments.batch_size, "lr": arguments.lr}
        self.trained: dict[str, Any] = {**given, "num_validations": 2, "precision": arguments.precision}
        self.size = model_size(self.teacher)["num_parameters"]

    def inputs(self) -> tuple[ImageSet, ImageSet]:
        """Training and test inputs: CIFAR-10's, or for a text encoder four fifths of a text and the rest."""
        limit = self.arguments.num_test
        if self.arguments.model != "minilm":
            folder = SHARED / "data" / "cifar10"
            test = open_set(folder / "test.parquet", self.origin, limit=limit)
            return open_set(folder / "train.parquet", self.origin, limit=None), test
        every = open_set([str(text) for text in topics.values()], self.origin, limit=None)
        rest, held = split_indices(len(every), num_held_out=min(limit, len(every) // 5), seed=0)
        return every.subset(rest), every.subset(held)

    def judged(self, student: nn.Module) -> dict[str, Any]:
        """Error and top-1 of a student."""
        found, outputs, _ = compare(student, self.teacher, self.test)
        return {"error": found["relative_error"], "top1": own_top1(student, outputs)}

    def row(self, recipe: dict[str, Any], seed: int) -> tuple[dict[str, Any], nn.Module]:
        """One row: cut, judge, distil, judge; and the student."""
        started, student = time.process_time(), copy.deepcopy(self.teacher).requires_grad_(True)
        batches = self.calibration(seed)
        cut_(student, self.teacher, find_mlps(student), Recipe.parse({**recipe, "seed": seed}), batches, quiet=True)
        found = {"parameters": model_size(student)["num_parameters"] / self.size, "before": self.judged(student)}
        recover_(
            student,
            self.teacher,
            self.training(seed),
            held_out=batches[:2],
            options=RecoverOptions(**self.trained, optimizer="relative"),
            context=RunContext(quiet=True, seed=seed),
        )
        seconds, precision = time.process_time() - started, self.arguments.precision
        return {**found, "after": self.judged(student), "seconds": seconds, "precision": precision}, student

    def exits(self, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """Error and top-1 of each exit before and after its training, and of leaving once sure."""
        started = time.process_time()
        _, student = self.row(self.looped(options), seed)
        found: dict[str, Any] = {"before": self.left(student)}
        train_exits_(
            student,
            self.teacher,
            self.training(seed),
            held_out=self.calibration(seed)[:2],
            options=ExitOptions(**self.trained),
            context=RunContext(quiet=True, seed=seed),
        )
        return {**found, "after": self.left(student, latency=True), "seconds": time.process_time() - started}

    def left(self, student: nn.Module, *, latency: bool = False) -> dict[str, Any]:
        """Error and top-1 of a student at its exits, and, if it has a head, of leaving once sure."""
        loops, found = Loops(student), {}
        for number in range(1, len(loops) + 1):
            with loops.up_to(number):
                found[f"exit {number}"] = self.judged(student)
        for confidence in CONFIDENCES if num_classes(student) else ():
            sure = UntilSure(student, confidence)
            found[f"confidence {confidence:g}"] = judge_sure(sure, self.teacher, self.test, top1=True, latency=latency)
        return found

    def training(self, seed: int) -> ImageSet:
        """The training inputs; images are augmented."""
        known = self.origin.preprocessing
        augment = augment_for(known, "light", flip=True) if "mean" in known else None
        return self.train.augmented(augment, seed)

    def calibration(self, seed: int) -> list[Tensor]:
        """Some training inputs."""
        return list(first_images(self.train, self.arguments.num_images, seed=seed)[0])

    def looped(self, options: dict[str, Any]) -> dict[str, Any]:
        """The recipe of a row of this method."""
        return {"method": "recursive", "options": {"num_blocks": self.num_blocks, **options}}

    @staticmethod
    def narrower(share: float) -> dict[str, Any]:
        """The recipe of `dgmr` that leaves a share of the parameters."""
        return {"method": "dgmr", "repair": {"refit": False}, "params_ratio": share, "exact": True}


def markdown(found: dict[str, Any]) -> str:
    """Every row that is cut and trained: its parameters, and error and top-1 before and after training."""
    lines = []
    for name, seen in by_seed(found).items():
        if "parameters" in seen[0]:
            judged = [[one[when] for one in seen] for when in ("before", "after")]
            cells = [(mean([one["error"] for one in every], 4), mean_top1(every)) for every in judged]
            lines.append([name, f"{seen[0]['parameters']:.0%}", *cells[0], *cells[1]])
    return table(["", "parameters", "error", "top-1", "error, trained", "top-1, trained"], lines)


def main() -> None:
    """Run every row with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    precision = "bf16" if has_fast_bf16(torch.device("cpu")) else "fp32"  # rows say which
    parser.add_argument("--model", choices=MODELS, default="cifar10")
    parser.add_argument("--source", help="where the model is, if it is elsewhere")
    parser.add_argument("--quick", action="store_true", help=", ".join(f"{k} {v}" for k, v in QUICK.items()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ranks", type=int, nargs="+", help="by default 0, 8, 32, 64 and the full one")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these, such as 'lower, rank 64'; not the exits")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, help="step as a share of each weight's norm; by default some are tried")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default=precision, help="of the training")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--num-images", type=int, default=400, help="for the calibration of dgmr")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    out = arguments.out or results(f"recursive-{arguments.model}{'-quick' if arguments.quick else ''}")
    same = ("model", "steps", "batch_size", "lr", "num_test", "num_images")
    bench, kept = Bench(arguments), Rows(out, {key: vars(arguments)[key] for key in same})
    kept.get("original", lambda: {"top1": top1_of(bench.teacher, bench.test)})
    ranks = arguments.ranks or [0, 8, 32, 64, bench.full]
    for seed in arguments.seeds:
        for name, options in rows(ranks, bench.full):
            if arguments.rows and name not in arguments.rows:
                continue
            found = kept.get(f"{name}, seed {seed}", lambda: bench.row(bench.looped(options), seed)[0])  # noqa: B023
            if name.startswith("average, rank") and found["parameters"] < 1:
                recipe = bench.narrower(found["parameters"])
                beside = f"dgmr beside rank {options['rank']}, seed {seed}"
                kept.get(beside, lambda: bench.row(recipe, seed)[0])  # noqa: B023
        if arguments.rows:
            continue
        options = {"rank": EXAMPLE, "norms": "own"}
        kept.get(f"exits, rank {EXAMPLE}, seed {seed}", lambda: bench.exits(options, seed))  # noqa: B023
    print(markdown(kept.found))


if __name__ == "__main__":
    main()
