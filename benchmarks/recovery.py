"""Compares cuts by what is left right after them and after equal distillation, each method with and without our repair.

One run, equal images, equal steps, equal recovery code for every row. Needs ../shared (CIFAR-10 and the ViT trained on
it). Prints a table and writes JSON with machine, versions, seed and command, and a picture beside it.

    python benchmarks/recovery.py            # all ratios, over an hour on 2 cores
    python benchmarks/recovery.py --ratios 1 --steps 20
    python benchmarks/recovery.py --ratios 1 --methods dgmr-paper dgmr --schedules ours published \
        --out benchmarks/results/recovery-published.json

With `--stages` it compares ways of training behind the default repair instead, each in so many steps of 32 images:

    python benchmarks/recovery.py --stages --ratios 0.25 --num-images 1512 --steps 600 \
        --out benchmarks/results/stages.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import AtOnceOptions, BlockwiseOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, augment_for, first_images, open_images, split_indices, transform_for
from vitrim.metrics.classify import knn_top1
from vitrim.metrics.fidelity import TokenComparison
from vitrim.models.features import evaluating
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.recover.at_once import train_at_once_
from vitrim.recover.distill import recover_
from vitrim.recover.result import Validation
from vitrim.repair.blockwise import recover_blocks_

SHARED = Path(__file__).resolve().parents[2] / "shared"
POINTS = (0.1, 0.3, 1.0)
COLORS = {
    "dgmr-paper": "#4c78a8",
    "dgmr": "#d1495b",
    "magnitude": "#8a8a8a",
    "random": "#c9a227",
}
SCHEDULES = {
    "ours": RecoverOptions(steps=1, batch_size=128, flip=True),
    "adamw": RecoverOptions(optimizer="adamw", steps=1, batch_size=128, flip=True),
    "published": RecoverOptions(schedule="published", steps=1, batch_size=128).as_published("dinov2"),
}


def main() -> None:
    """Run every ratio and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--methods", choices=COLORS, nargs="+", default=list(COLORS))
    parser.add_argument("--schedules", choices=SCHEDULES, nargs="+", default=["ours"])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=120, help="of 128 images; a multiple of 10")
    parser.add_argument("--stages", action="store_true", help="compare ways of training behind the default repair")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery.json"))
    arguments = parser.parse_args()
    bench = Bench(arguments.num_images, arguments.seed)
    if arguments.stages:
        rows = [row for ratio in arguments.ratios for row in bench.stages(ratio, arguments.steps)]
        write(arguments, {"rows": rows})
        print(stages_table({"rows": rows}))
        return
    rows = []
    each = itertools.product(arguments.ratios, arguments.methods, ("none", "ours"), arguments.schedules)
    for ratio, method, repair, schedule in each:
        rows.append(bench.row(ratio, method, repair, schedule, arguments.steps))
        print(format_row(rows[-1]), flush=True)
    result = {"teacher": bench.scores(bench.teacher), "rows": rows}
    write(arguments, result)
    draw(result, arguments.out.with_suffix(".svg"))
    print(markdown(result))


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write JSON with where and how it was made."""
    about = {"environment": environment(), "arguments": {key: str(value) for key, value in vars(arguments).items()}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**about, **result}, indent=1) + "\n")


def stages_table(result: dict[str, Any]) -> str:
    """The table of `--stages`."""
    lines = ["| MLP ratio | trained | seconds | relative error | top-1 |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        ends = f"{row['seconds']:.0f} | {row['relative_error']:.4f} | {row['top1']:.2f} |"
        lines.append(f"| {row['ratio']:g} | {row['way']} | {ends}")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The table: top-1 and relative error, after the cut and along the steps."""
    points = ["after the cut", "10% of steps", "30%", "100%"]
    lines = ["| MLP ratio | method | repair | schedule | " + " | ".join(points) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(points))
    for row in result["rows"]:
        cells = [f"{p['top1']:.2f} ({p['relative_error']:.4f})" for p in row["points"].values()]
        name = f"| {row['ratio']:g} | `{row['method']}` | {row['repair']} | {row['schedule']} | "
        lines.append(name + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out relative error along the steps, one panel a MLP ratio; dashed where nothing was repaired."""
    from matplotlib.figure import Figure

    ratios = list(dict.fromkeys(row["ratio"] for row in result["rows"]))
    figure = Figure(figsize=(3.2 * len(ratios) + 0.6, 3.0), layout="constrained")
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for panel, ratio in zip(panels, ratios, strict=True):
        for row in (row for row in result["rows"] if row["ratio"] == ratio):
            best = torch.tensor([point["relative_error"] for point in row["curve"]]).cummin(0).values
            steps, dashes = [point["step"] for point in row["curve"]], "-" if row["repair"] == "ours" else "--"
            dashes = dashes if row["schedule"] != "published" else {"-": "-.", "--": ":"}[dashes]
            label = f"{row['method']}, repair: {row['repair']}, schedule: {row['schedule']}"
            panel.plot(steps, best, dashes, label=label, color=COLORS[row["method"]], marker=".")
        panel.set(yscale="log", title=f"hidden width {ratio:g} x model width", xlabel="distillation steps")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("relative error of the features")
    panels[-1].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


class Bench:
    """The model, the images and the judge that all rows share."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.seed = seed
        self.teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        self.teacher.requires_grad_(False)
        self.sites = find_mlps(self.teacher)
        transform = transform_for(self.teacher)
        data = SHARED / "data" / "cifar10"
        images = open_images(data / "train.parquet", transform=transform, limit=num_images)
        rest, held = split_indices(len(images), num_held_out=512, seed=seed)
        self.train, self.held_out = images.subset(rest), stack(images.subset(held))[0]
        self.index_images, self.index_labels = stack(images)
        self.test_images, self.test_labels = stack(open_images(data / "test.parquet", transform=transform))
        self.target = tokens_of(self.teacher, self.test_images)

    def row(self, ratio: float, method: str, repair: str, schedule: str, steps: int) -> dict[str, Any]:
        """Cut, judge, distil, judge on the way."""
        width, started = round(ratio * 192), time.monotonic()
        student = self.cut(method, width, repair == "ours")
        cut_s = time.monotonic() - started
        options = SCHEDULES[schedule].model_copy(update={"steps": steps})
        row: dict[str, Any] = {"ratio": ratio, "method": method, "repair": repair, "schedule": schedule}
        row |= {"width": width, "steps": steps, "points": {}}
        row["points"]["0"] = self.scores(student)
        best: dict[str, Any] = {"error": float("inf")}

        def note(found: Validation) -> None:
            step, error = found.step, found.held_out_error
            if error < best["error"]:
                best.update(error=error, state=copy.deepcopy(student.state_dict()))
            if step in {round(point * steps) for point in POINTS}:
                judged = copy.deepcopy(student)
                judged.load_state_dict(best["state"])
                row["points"][str(step)] = self.scores(judged)

        result = recover_(
            student,
            self.teacher,
            self.train.augmented(augment_for(self.teacher, options.augment, flip=options.flip), self.seed),
            held_out=list(self.held_out.split(128)),
            options=options,
            context=RunContext(quiet=True, seed=self.seed),
            on_validation=note,
        )
        row |= {"curve": result.curve, "lr": result.lr, "rate_test": result.rate_test, "cut_s": round(cut_s, 1)}
        return {**row, "total_s": round(time.monotonic() - started, 1)}

    def stages(self, ratio: float, steps: int) -> Iterator[dict[str, Any]]:
        """What ways of training add to the repaired cut, on the same images and in as many steps."""
        started = time.monotonic()
        start = self.cut("dgmr", round(ratio * 192), True)
        yield self.stage(ratio, "nothing but repair", start, started)
        given = {"held_out": list(self.held_out.split(128)), "context": RunContext(quiet=True, seed=self.seed)}
        train = self.train.augmented(augment_for(self.teacher, "light", flip=True), self.seed)

        def by_blocks(student: nn.Module) -> None:
            options = BlockwiseOptions(steps=steps, batch_size=32, train="block")
            recover_blocks_(student, self.teacher, self.sites, self.train, options=options, **given)

        def at_once(student: nn.Module) -> None:
            options = AtOnceOptions(steps=steps, flip=True, precision="fp32")
            train_at_once_(student, self.teacher, train, options=options, **given)

        def distilled(student: nn.Module) -> None:
            options = RecoverOptions(steps=steps, batch_size=32, flip=True, precision="fp32")
            recover_(student, self.teacher, train, options=options, **given)

        ways = {"block by block": [by_blocks], "all blocks at once": [at_once], "distillation": [distilled]}
        ways["all blocks at once, then distillation"] = [at_once, distilled]
        for way, parts in ways.items():
            student, started = copy.deepcopy(start), time.monotonic()
            for train_ in parts:
                train_(student)
            yield self.stage(ratio, way, student, started)

    def stage(self, ratio: float, way: str, student: nn.Module, started: float) -> dict[str, Any]:
        """A row of `stages`."""
        row = {"ratio": ratio, "way": way, "seconds": time.monotonic() - started, **self.scores(student)}
        print(row, flush=True)
        return row

    def cut(self, method: str, width: int, repair: bool | None = None) -> nn.Module:
        """A cut copy of the teacher; without `repair`, repaired where the method is by default."""
        student = copy.deepcopy(self.teacher).requires_grad_(True)
        recipe = Recipe(method=method, hidden_dim=width, repair=repair, seed=self.seed)
        options = recipe.calibrate
        batches, _ = first_images(self.train, options.num_images, seed=self.seed, batch_size=options.batch_size)
        cut_(student, self.teacher, self.sites, recipe, batches, quiet=True)
        return student

    def scores(self, student: nn.Module) -> dict[str, float]:
        """Top-1 and kNN in percent over all test images, and the relative error of all tokens."""
        compared, right, pooled = TokenComparison(), 0, []
        with evaluating(student):
            for start in range(0, len(self.test_images), 500):
                images = self.test_images[start : start + 500]
                tokens = student.forward_features(images)  # type: ignore[operator]
                compared.update(tokens, self.target[start : start + 500])
                scores = student.forward_head(tokens)  # type: ignore[operator]
                right += int((scores.argmax(1) == self.test_labels[start : start + 500]).sum())
                pooled.append(tokens[:, 0])
            index = tokens_of(student, self.index_images)[:, 0]
            knn = knn_top1(index, self.index_labels, torch.cat(pooled), self.test_labels)
        return {
            "top1": 100 * right / len(self.test_images),
            "knn": 100 * knn,
            "relative_error": compared.relative_error,
        }


def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """Tokens behind the final norm."""
    with evaluating(model):
        return torch.cat([model.forward_features(part) for part in images.split(500)])  # type: ignore[operator]


def stack(images: ImageSet) -> tuple[Tensor, Tensor]:
    """All images and labels in memory."""
    batches = list(images.loader(batch_size=500))
    return torch.cat([b.images_BCHW for b in batches]), torch.cat([b.labels_B for b in batches])


def format_row(row: dict[str, Any]) -> str:
    """One line of the table: top-1 / kNN / relative error at each point."""
    cells = [f"{p['top1']:6.2f} {p['knn']:6.2f} {p['relative_error']:8.5f}" for p in row["points"].values()]
    return (
        f"{row['ratio']:<5g}{row['method']:12}{row['repair']:6}{row['schedule']:11}"
        + " | ".join(cells)
        + f" | rate {row['lr']:g}, {row['total_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
