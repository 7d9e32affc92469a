"""Compares one elastic run with separate runs: three widths from one checkpoint, or one checkpoint for each.

Equal images, equal code, equal total of distillation steps: (a) `elastic`, one run of N steps that serves all widths,
(b) `separate`, a run of N / 3 steps for each width, (c) `closed form`, each width cut and repaired alone, no steps,
(d) `sliced`, the first units of the widest run of (b), which was trained for its own width only. Needs ../shared
(CIFAR-10 and the ViT trained on it). Prints a table and writes JSON with machine, versions, seed and command.

    python benchmarks/elastic.py              # about 12 minutes on 2 cores
    python benchmarks/elastic.py --steps 6 --num-images 600
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from recovery import Bench

from vitrim.compression.cut import cut_
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for, first_images
from vitrim.output.provenance import environment
from vitrim.recover.distill import recover_
from vitrim.recover.elastic import Widths
from vitrim.recover.elastic_fit import Fitting, serving
from vitrim.surgery import apply_


def main() -> None:
    """Run every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=180, help="of 128 images, in total")
    parser.add_argument("--lr", type=float, default=None, help="of every run; None finds one for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/elastic.json"))
    arguments = parser.parse_args()
    bench = Elastic(arguments.num_images, arguments.seed, arguments.lr)
    ratios = sorted(arguments.ratios)
    rows = bench.elastic(ratios, arguments.steps)
    for ratio in ratios:
        rows += bench.separate(ratio, ratios, arguments.steps // len(ratios))
    result = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "teacher": bench.scores(bench.teacher),
        "command": " ".join(sys.argv),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """One line a run, one column a width: top-1 and relative error on all test images."""
    rows = result["rows"]
    runs, ratios = (list(dict.fromkeys(row[key] for row in rows)) for key in ("run", "ratio"))
    lines = [
        "| run | " + " | ".join(f"MLP ratio {ratio:g}" for ratio in ratios) + " | steps |",
        "|---|" + "---|" * (len(ratios) + 1),
    ]
    for run in runs:
        mine = {row["ratio"]: row for row in rows if row["run"] == run}
        cells = [
            f"{mine[ratio]['top1']:.2f} ({mine[ratio]['relative_error']:.5f})" if ratio in mine else "-"
            for ratio in ratios
        ]
        steps = sum(row["steps"] for row in mine.values())
        lines.append(f"| {run} | " + " | ".join(cells) + f" | {steps} |")
    return "\n".join(lines)


class Elastic(Bench):
    """The bench of recovery.py, with runs at one width and at several."""

    def __init__(self, num_images: int, seed: int, lr: float | None) -> None:
        super().__init__(num_images, seed)
        options = Recipe().calibrate
        self.calibration, _ = first_images(self.train, options.num_images, seed=seed, batch_size=options.batch_size)
        self.judged = list(self.held_out.split(128))
        self.lr = lr

    def elastic(self, ratios: list[float], steps: int) -> list[dict[str, Any]]:
        """One run for all widths; its steps and seconds are counted at its widest."""
        started = time.monotonic()
        recipe = Recipe(recover=RecoverOptions(**self.options(steps), elastic=tuple(ratios)), seed=self.seed)
        assert recipe.recover is not None
        student, widths = self.cut_to(recipe), Widths.of(recipe, self.sites)
        assert widths is not None
        fitting = Fitting(
            teacher=self.teacher,
            batches=self.calibration,
            held_out=self.judged,
            options=recipe.repair_options(),
        )
        with serving(student, widths, fitting) as slices:
            recovery = self.distil(student, recipe.recover, widths)
        seconds, rows = time.monotonic() - started, []
        for ratio, found in slices.items():
            sliced = self.sliced(student, widths, ratio, found.tensors)
            widest = ratio == widths.largest
            spent = {"steps": steps if widest else 0, "seconds": seconds if widest else 0.0}
            about = {"lr": recovery.lr, "curve": recovery.curve} if widest else {}
            rows.append(self.judge("elastic", ratio, sliced) | spent | {"errors": dict(found.errors), **about})
        return rows

    def separate(self, ratio: float, ratios: list[float], steps: int) -> list[dict[str, Any]]:
        """A run for one width, before and after distillation; of the widest also its first units."""
        started = time.monotonic()
        recipe = Recipe(recover=RecoverOptions(**self.options(steps)), mlp_ratio=ratio, seed=self.seed)
        assert recipe.recover is not None
        student = self.cut_to(recipe)
        cut_s = time.monotonic() - started
        rows = [self.judge("closed form", ratio, student) | {"steps": 0, "seconds": cut_s}]
        started = time.monotonic()
        recovery = self.distil(student, recipe.recover, None)
        spent = {"steps": steps, "seconds": cut_s + time.monotonic() - started}
        rows.append(self.judge("separate", ratio, student) | spent | {"lr": recovery.lr, "curve": recovery.curve})
        if ratio == ratios[-1]:
            several = Recipe(recover=RecoverOptions(**self.options(1), elastic=tuple(ratios)))
            widths = Widths.of(several, self.sites)
            assert widths is not None
            for narrower in ratios[:-1]:
                plain = self.sliced(student, widths, narrower, {})
                rows.append(self.judge("sliced", narrower, plain) | {"steps": 0, "seconds": 0.0})
        return rows

    def options(self, steps: int) -> dict[str, Any]:
        """What every run has in common."""
        return {"steps": steps, "batch_size": 128, "flip": True, "num_validations": 10, "lr": self.lr}

    def cut_to(self, recipe: Recipe) -> nn.Module:
        """A cut and repaired copy of the teacher."""
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        cut_(student, self.teacher, self.sites, recipe, self.calibration, quiet=True)
        return student

    def distil(self, student: nn.Module, options: RecoverOptions, widths: Widths | None) -> Any:
        """Recovery in place."""
        augment = augment_for(self.teacher, "light", flip=True)
        return recover_(
            student,
            self.teacher,
            self.train.augmented(augment, self.seed),
            held_out=self.judged,
            options=options,
            context=RunContext(quiet=True, seed=self.seed),
            widths=widths,
        )

    def sliced(self, student: nn.Module, widths: Widths, ratio: float, own: Mapping[str, Tensor]) -> nn.Module:
        """One width of a student as a model of its own."""
        small = copy.deepcopy(student)
        apply_(small, widths.edits(ratio))
        small.load_state_dict({**small.state_dict(), **own})
        return small

    def judge(self, run: str, ratio: float, model: nn.Module) -> dict[str, Any]:
        """One row."""
        row = {"run": run, "ratio": ratio, **self.scores(model)}
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{run:12} {ratio:<5g} top-1 {row['top1']:.2f} error {row['relative_error']:.5f}", flush=True)
        return {**row, "parameters": parameters}


if __name__ == "__main__":
    main()
