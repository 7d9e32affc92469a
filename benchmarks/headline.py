"""Compares like with like: each method at half of the encoder's parameters, with and without our repair, no training.

A row is run at several seeds, each of which draws other calibration images (and other random units); mean and spread
are over these. Judged on all 10,000 test images of CIFAR-10: top-1, and the relative squared error of all output tokens
against the original (0 is identical, 1 is predicting the mean). Needs ../shared.

Rows are kept in the JSON as they are done, so a run that was stopped goes on; its tables are written into README.md and
docs/choosing.md by `--write`.

    nice python benchmarks/headline.py             # about 40 minutes on one thread
    python benchmarks/headline.py --write          # only puts the tables into the pages
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.compression.share import find_share
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs, num_parameters
from vitrim.cost.latency import measure_latency
from vitrim.data import first_images, open_images, transform_for
from vitrim.methods import find_method
from vitrim.metrics.fidelity import TokenComparison
from vitrim.metrics.record import relative_latency
from vitrim.models.features import evaluating
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
UNITS = ("dgmr", "dgmr-paper", "magnitude", "random")  # each with and without our repair
OWN = ("corp", "low-rank")  # each has its own closed form in place of our repair
ROWS = [*((name, repair) for name in UNITS for repair in ("none", "ours")), *((name, "its own") for name in OWN)]
UNCHANGED = {("magnitude", "none"), ("dgmr-paper", "none")}  # look at weights alone: no seed plays a part
PAGES = {ROOT / "README.md": "before_after", ROOT / "docs" / "choosing.md": "markdown"}
BEGIN, END = "<!-- table: python benchmarks/headline.py --write -->\n", "<!-- end of table -->\n"
TIMED_BATCHES, ROUNDS = (1, 32), 30


def main() -> None:
    """Run every row at every seed that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params-ratio", type=float, default=0.5)
    parser.add_argument("--num-images", type=int, default=2000, help="for selection and repair, without labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "headline.json")
    parser.add_argument("--write", action="store_true", help="put the tables into the pages; run nothing")
    arguments = parser.parse_args()
    if arguments.write:
        write(json.loads(arguments.out.read_text()))
        return
    torch.set_num_threads(1)
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    bench = Bench(arguments.params_ratio, arguments.num_images)
    result = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "write")},
        "original": kept.get("original") or {**bench.scores(bench.teacher), **bench.sizes(bench.teacher)},
        "latency": kept["latency"] if has_spread(kept.get("latency", {})) else bench.latency("dgmr-paper"),
        "rows": kept.get("rows", {}),
    }
    for seed in arguments.seeds:
        for method, repair in ROWS:
            row = result["rows"].setdefault(f"{method}, {repair}", {})
            if str(seed) not in row:
                same = (method, repair) in UNCHANGED and len(row) > 0
                row[str(seed)] = next(iter(row.values())) if same else bench.row(method, repair, seed)
                print(f"seed {seed} {method}, {repair}: {row[str(seed)]}", flush=True)
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{before_after(result)}\n\n{markdown(result)}")


class Bench:
    """The model, the test images and the judge that all rows share."""

    def __init__(self, params_ratio: float, num_images: int) -> None:
        self.params_ratio, self.num_images = params_ratio, num_images
        self.teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        self.teacher.requires_grad_(False)
        self.sites, transform = find_mlps(self.teacher), transform_for(self.teacher)
        self.train = open_images(CIFAR10 / "train.parquet", transform=transform)
        test = list(open_images(CIFAR10 / "test.parquet", transform=transform).loader(batch_size=250))
        self.test = [(batch.images_BCHW, batch.labels_B) for batch in test]
        with evaluating(self.teacher):
            self.target = [tokens(self.teacher, images) for images, _ in self.test]

    def row(self, method: str, repair: str, seed: int) -> dict[str, float]:
        """Cut with one draw of calibration images, and judge; the seconds are the cut's."""
        started = time.monotonic()
        student = self.cut(method, repair, seed)
        seconds = round(time.monotonic() - started, 1)
        return {**self.scores(student), **self.sizes(student), "seconds": seconds}

    def cut(self, method: str, repair: str, seed: int) -> nn.Module:
        """Return a cut copy of the original."""
        asked = {"method": method, "params_ratio": self.params_ratio, "repair": repair == "ours", "seed": seed}
        recipe, student = Recipe.parse(asked), copy.deepcopy(self.teacher)
        batches, _ = first_images(self.train, self.num_images, seed=seed)
        if find_method(method).takes == "share":
            recipe = recipe.updated({"keep_ratio": find_share(recipe, self.teacher, self.sites, batches[0])})
        cut_(student, self.teacher, self.sites, recipe, batches, quiet=True)
        return student.requires_grad_(False)

    def scores(self, student: nn.Module) -> dict[str, float]:
        """Return top-1 in percent, and the relative error of all tokens against those of the original."""
        compared, right, total = TokenComparison(), 0, 0
        with evaluating(student):
            for (images, labels), target in zip(self.test, self.target, strict=True):
                found = tokens(student, images)
                compared.update(found, target)
                right += int((student.forward_head(found).argmax(1) == labels).sum())  # type: ignore[operator]
                total += len(labels)
        return {"top1": 100 * right / total, "relative_error": compared.relative_error}

    def sizes(self, model: nn.Module) -> dict[str, int]:
        """Return parameters, and multiply-accumulates of one image."""
        return {"parameters": num_parameters(model), "macs": count_macs(model, self.test[0][0][:1])}

    def latency(self, method: str) -> dict[str, Any]:
        """Time the original and a cut by turns; returns the cut's times and their ratio with its spread, by batch size.

        All rows that cut hidden units have the same shapes and so the same time; values play no part.
        """
        both = [self.teacher, self.cut(method, "none", 0)]
        _, small = measure_latency(both, self.test[0][0][:1], batch_sizes=TIMED_BATCHES, rounds=ROUNDS)
        return {str(size): dict(row) for size, row in small.items()}


def tokens(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return tokens behind the final norm."""
    return model.forward_features(images_BCHW)  # type: ignore[operator]


def has_spread(latency: dict[str, Any]) -> bool:
    """Return whether latency was measured with its spread; a number without it is none."""
    return bool(latency) and all("ratio_quartiles" in found for found in latency.values())


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation as text."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(result: dict[str, Any]) -> str:
    """Return the table of methods, as the documentation shows it."""
    full = result["original"]
    lines = [
        "| method | repair | parameters | MACs | top-1 (%) | relative error |",
        "|---|---|---:|---:|---:|---:|",
        f"| original | | {full['parameters'] / 1e6:.2f} M | {full['macs'] / 1e6:.0f} M | {full['top1']:.2f} | 0 |",
    ]
    for name, by_seed in result["rows"].items():
        (method, repair), rows = name.split(", "), list(by_seed.values())
        cells = [
            f"{rows[0]['parameters'] / 1e6:.2f} M",
            f"{rows[0]['macs'] / 1e6:.0f} M",
            spread([row["top1"] for row in rows], 2),
            spread([row["relative_error"] for row in rows], 4),
        ]
        lines.append(f"| `{method}` | {repair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def before_after(result: dict[str, Any]) -> str:
    """Return the table of the README: the original beside what vitrim makes of it by default."""
    full, rows = result["original"], list(result["rows"]["dgmr, ours"].values())
    one = rows[0]
    lines = [
        "| | original | small |",
        "|---|---:|---:|",
        f"| parameters | {full['parameters']:,} | {one['parameters']:,} |",
        f"| MACs of one image | {full['macs'] / 1e6:.0f} M | {one['macs'] / 1e6:.0f} M |",
        f"| top-1 on 10,000 test images (%) | {full['top1']:.2f} | {spread([row['top1'] for row in rows], 2)} |",
        f"| relative error of their features | 0 | {spread([row['relative_error'] for row in rows], 4)} |",
    ]
    for size, found in result["latency"].items() if has_spread(result["latency"]) else ():
        lines.append(f"| latency relative to the original, batch {size} | 1 | {relative_latency(found)} |")
    return "\n".join(lines)


def write(result: dict[str, Any]) -> None:
    """Put the tables between the marks in the pages."""
    for page, made_by in PAGES.items():
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n{globals()[made_by](result)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
