"""What CORP's folding is worth, and what our repair makes of the same widths, before any training.

Hidden units, then query and key dimensions, then value dimensions, too, of the CIFAR-10 ViT of ../shared are dropped
with and without compensation; then half of attention, and half of both parts, by `corp` and by `dgmr`. Top-1 and
relative squared error of all output tokens, on test images that calibration has not seen. Prints tables and writes JSON
with machine, versions, seed and command.

    python benchmarks/corp.py              # about 8 minutes on one core
    python benchmarks/corp.py --only both  # the last table alone
    python benchmarks/corp.py --quick      # half a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.data import first_images, open_images, transform_for
from vitrim.metrics.fidelity import TokenComparison
from vitrim.models.features import evaluating
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment

SHARED = Path(__file__).resolve().parents[2] / "shared"
D_HIDDEN, HEAD_DIM = 768, 32
# row -> recipe; each at every width
MLPS: dict[str, dict[str, Any]] = {
    "corp, dropped only": {"method": "corp", "options": {"compensate": False}},
    "corp": {"method": "corp"},
    "dgmr, closed form": {"method": "dgmr", "repair": {"refit": False}},
    "dgmr, with refit": {"method": "dgmr"},
}
# row -> options; each at every share of dimensions
HEADS: dict[str, dict[str, Any]] = {
    "q, k, dropped only": {"compensate": False},
    "q, k": {},
    "q, k, v, dropped only": {"compensate": False, "values": True},
    "q, k, v": {"values": True},
}
# row -> recipe; each for attention alone and for both parts of every block, at half of all dimensions and units
BOTH: dict[str, dict[str, Any]] = {
    "corp, q and k": {"method": "corp", "options": {}},
    "corp, q, k and v": {"method": "corp", "options": {"values": True}},
    "dgmr, closed form": {"method": "dgmr", "options": {}, "repair": {"refit": False}},
    "dgmr, default": {"method": "dgmr", "options": {}},
}
RIVAL = "corp, q, k and v"


def main() -> None:
    """Run every row at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 192], help=f"hidden units of {D_HIDDEN}")
    parser.add_argument("--dims", type=int, nargs="+", default=[16], help=f"dimensions of a head's {HEAD_DIM}")
    parser.add_argument("--num-images", type=int, default=400, help="for calibration")
    parser.add_argument("--num-test", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["mlps", "heads", "both"], help="one table alone")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="by default in benchmarks/results, one file for each choice of tables")
    arguments = parser.parse_args()
    own = "corp" if arguments.only is None else f"corp_{arguments.only}"
    arguments.out = arguments.out or Path(f"benchmarks/results/{own}.json")
    if arguments.quick:
        arguments.widths, arguments.dims, arguments.num_images, arguments.num_test = [384], [16], 32, 100
    bench = Bench(arguments.num_images, arguments.num_test, arguments.seed)
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "original": bench.scores(bench.teacher),
    }
    print(f"original: top-1 {result['original']['top1']:.2f}")
    for name, (rows, show) in tables(bench, arguments).items():
        if arguments.only in (None, name):
            result[name] = rows()
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"\n{show(result)}", flush=True)


def tables(bench: Bench, arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], Callable[[Any], str]]]:
    """For each table, what measures it and what writes it."""
    return {
        "mlps": (
            lambda: {
                name: {str(width): bench.row({**recipe, "hidden_dim": width}) for width in arguments.widths}
                for name, recipe in MLPS.items()
            },
            mlp_table,
        ),
        "heads": (
            lambda: {
                name: {str(dims): bench.row(heads_recipe(options, dims)) for dims in arguments.dims}
                for name, options in HEADS.items()
            },
            head_table,
        ),
        "both": (
            lambda: {
                name: {parts: bench.row(half_recipe(recipe, parts)) for parts in ("attention", "both")}
                for name, recipe in BOTH.items()
            },
            both_table,
        ),
    }


def half_recipe(recipe: dict[str, Any], parts: str) -> dict[str, Any]:
    """Half of attention, or of both parts."""
    return {**recipe, "options": {**recipe["options"], "parts": parts}, "keep_ratio": 0.5}


def heads_recipe(options: dict[str, Any], dims: int) -> dict[str, Any]:
    """CORP on attention alone."""
    return {"method": "corp", "options": {"parts": "attention", "keep_dims": dims / HEAD_DIM, **options}}


class Bench:
    """The model, calibration images, test images and the judge that all rows share."""

    def __init__(self, num_images: int, num_test: int, seed: int) -> None:
        self.seed = seed
        self.teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        self.teacher.requires_grad_(False)
        self.data, transform = SHARED / "data" / "cifar10", transform_for(self.teacher)
        self.train = open_images(self.data / "train.parquet", transform=transform)
        self.batches, _ = first_images(self.train, num_images, seed=seed)
        test = open_images(self.data / "test.parquet", transform=transform, limit=num_test)
        self.test = list(test.loader(batch_size=100))
        with evaluating(self.teacher):
            self.target = [run(self.teacher, batch.images_BCHW) for batch in self.test]

    def row(self, recipe: dict[str, Any]) -> dict[str, float]:
        """Cut by a recipe and judge; the seconds are the cut's."""
        student, seconds = self.cut(self.teacher, recipe)
        return {**self.scores(student), "seconds": round(seconds, 1)}

    def cut(self, model: nn.Module, recipe: dict[str, Any]) -> tuple[nn.Module, float]:
        """A cut copy of a model, and the seconds it took."""
        student, started = copy.deepcopy(model), time.monotonic()
        asked = Recipe.parse({"seed": self.seed, **recipe})
        cut_(student, model, find_mlps(model), asked, self.batches, quiet=True)
        return student, time.monotonic() - started

    def scores(self, student: nn.Module) -> dict[str, float]:
        """Top-1 in percent, and the relative error of all tokens against those of the original."""
        compared, right, total = TokenComparison(), 0, 0
        with evaluating(student):
            for batch, target in zip(self.test, self.target, strict=True):
                tokens = run(student, batch.images_BCHW)
                compared.update(tokens, target)
                scores = student.forward_head(tokens)  # type: ignore[operator]
                right, total = right + int((scores.argmax(1) == batch.labels_B).sum()), total + len(tokens)
        return {"top1": 100 * right / total, "relative_error": compared.relative_error}


def run(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Tokens behind the final norm."""
    return model.forward_features(images_BCHW)  # type: ignore[operator]


def mlp_table(result: dict[str, Any]) -> str:
    """The table of hidden units as the documentation shows it."""
    return table(result["mlps"], lambda width: f"{width} of {D_HIDDEN} hidden units")


def head_table(result: dict[str, Any]) -> str:
    """The table of head dimensions as the documentation shows it."""
    return table(result["heads"], lambda dims: f"{dims} of {HEAD_DIM} dimensions")


def both_table(result: dict[str, Any]) -> str:
    """The table of both parts, with errors as a share of that of `corp` at the same size."""
    rows, lines = (
        result["both"],
        ["| | attention | of corp | attention and MLP | of corp | seconds |", "|---|" + "---|" * 5],
    )
    for name, cells in rows.items():
        shown = []
        for parts, cell in cells.items():
            ratio = cell["relative_error"] / rows[RIVAL][parts]["relative_error"]
            shown += [f"{cell['top1']:.2f} ({cell['relative_error']:.5f})", f"{ratio:.3f}"]
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {cells['both']['seconds']:.0f} |")
    return "\n".join(lines)


def table(rows: dict[str, dict[str, dict[str, float]]], title: Any) -> str:
    """Top-1 and, in parentheses, the relative error of every row at every size."""
    sizes = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(title(size) for size in sizes) + " |", "|---|" + "---|" * len(sizes)]
    for name, cells in rows.items():
        shown = [f"{cells[size]['top1']:.2f} ({cells[size]['relative_error']:.4f})" for size in sizes]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
