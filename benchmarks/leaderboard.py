"""The leaderboard at several sizes and seeds, on several models: mean and spread of every method, and the Pareto front.

Every run is `vitrim leaderboard` at one size, counted in parameters (and bytes) or in MACs, and one seed, in a folder
of its own: all methods, with and without our repair. Rows that are there are kept, so a run that was stopped goes on
row by row. The table has mean and standard deviation over seeds; the picture one panel a model, error against MACs.

    nice python benchmarks/leaderboard.py     # 2 models x 6 sizes x 3 seeds x 27 rows: two days on one core alone
    python benchmarks/leaderboard.py --models cifar10 --sizes 0.5 --counted params --seeds 0 --methods dgmr magnitude
    python benchmarks/leaderboard.py --write  # only table and picture, of what is there
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vitrim
from vitrim.output.provenance import environment
from vitrim.report.leaderboard import final
from vitrim.report.pareto import Point, draw_pareto

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CIFAR10 = SHARED / "data" / "cifar10" / "train.parquet"
# name -> (model, data)
MODELS: dict[str, tuple[str, Any]] = {
    "cifar10": (f"local-dir:{SHARED / 'models' / 'cifar10-vit'}", CIFAR10),
    "deep-vit": (f"local-dir:{ROOT / 'benchmarks' / 'models' / 'deep-vit'}", CIFAR10),
}
COUNTED = ("params", "macs")
Key = tuple[str, str, float, str, str]  # model, counted, size, method, repair


def main() -> None:
    """Run what is not there yet, and write table, picture and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares that stay")
    parser.add_argument("--counted", nargs="+", choices=COUNTED, default=list(COUNTED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[], help="by default all that are registered")
    parser.add_argument("--recipe", type=Path, default=ROOT / "benchmarks" / "leaderboard.yaml")
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks" / "models" / "leaderboard", help="not in git")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "leaderboards.json")
    parser.add_argument("--write", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if not arguments.write:
        run(arguments)
    write(arguments.out, summary(arguments.runs))


def run(arguments: argparse.Namespace) -> None:
    """Run all sizes of a seed before the next seed, so that a run that is stopped has whole tables of fewer seeds."""
    for seed in arguments.seeds:
        for name in arguments.models:
            model, data = MODELS[name]
            for counted in arguments.counted:
                for size in arguments.sizes:
                    folder = arguments.runs / name / f"{counted}-{size:g}" / f"seed-{seed}"
                    print(folder, flush=True)
                    found = vitrim.leaderboard(
                        model,
                        data=data,
                        methods=arguments.methods,
                        recipe=arguments.recipe,
                        seed=seed,
                        out=folder,
                        quiet=True,
                        **{f"{counted}_ratio": size},
                    )
                    print("\n".join(found["verdict"]), flush=True)


def summary(runs: Path) -> dict[str, Any]:
    """Return mean and spread over seeds of every row of every run that is there."""
    gathered: dict[Key, list[dict[str, Any]]] = {}
    originals = {}
    for key, original, row in read(runs):
        originals[key[0]] = original
        gathered.setdefault(key, []).append(row)
    rows = [{**dict(zip(NAMES, key, strict=True)), **over_seeds(found)} for key, found in sorted(gathered.items())]
    return {"environment": environment(), "originals": originals, "rows": rows}


NAMES = ("model", "counted", "size", "method", "repair")


def read(runs: Path) -> Iterator[tuple[Key, dict[str, Any], dict[str, Any]]]:
    """Yield each finished row of each run with its key and its original; what failed stands in the run's own table."""
    for path in sorted(runs.glob("*/*/seed-*/leaderboard.json")):
        counted, _, size = path.parent.parent.name.partition("-")
        report = json.loads(path.read_text())
        for row in report["rows"]:
            if row["error"] is None:
                key = (path.parent.parent.parent.name, counted, float(size), row["method"], row["repair"])
                yield key, report["original"], row


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation of what differs between seeds, and the sizes and what they were held to."""
    values = {
        "error_cut": [row["after_cut"]["relative_error"] for row in rows],
        "error": [final(row)["relative_error"] for row in rows],
        "top1": [final(row)["top1"] for row in rows if final(row)["top1"] is not None],
        "seconds": [row["seconds"] for row in rows],
        **{name: [row[name] for row in rows] for name in ("parameters", "bytes", "macs")},
    }
    return {
        "num_seeds": len(rows),
        "held_to": rows[0]["fitted"]["counted"],
        **{
            name: {"mean": statistics.mean(found), "spread": statistics.stdev(found) if len(found) > 1 else None}
            for name, found in values.items()
            if found
        },
    }


def write(out: Path, found: dict[str, Any]) -> None:
    """Write the JSON, and beside it the table and the picture."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(found))
    picture = draw_pareto(panels(found))
    if picture is not None:
        out.with_suffix(".svg").write_text(picture.svg)
    print(markdown(found))


def panels(found: dict[str, Any]) -> dict[str, list[Point]]:
    """Return the points of each model: mean MACs against mean error; a method has one number at every size."""
    numbers = numbered(found)
    drawn: dict[str, list[Point]] = {}
    for row in found["rows"]:
        number = numbers[row["method"], row["repair"]]
        name = f"{label(row)} at {row['size']:.0%} of {row['counted']}"
        point = Point(number=number, name=name, cost=row["macs"]["mean"], error=row["error"]["mean"])
        drawn.setdefault(f"MACs, {row['model']}", []).append(point)
    for model, original in found["originals"].items():
        drawn[f"MACs, {model}"].append(Point(number=0, name="original", cost=original["macs"], error=0.0))
    return drawn


def numbered(found: dict[str, Any]) -> dict[tuple[str, str], int]:
    """Return the number of each method with each kind of repair in the picture."""
    kinds = sorted({(row["method"], row["repair"]) for row in found["rows"]})
    return {kind: number for number, kind in enumerate(kinds, start=1)}


def label(row: dict[str, Any]) -> str:
    """Return a method's name, with our repair if it had it."""
    return row["method"] + (" + our repair" if row["repair"] == "ours" else "")


def markdown(found: dict[str, Any]) -> str:
    """Return a table for each model and way to count: a row a method, a column a size, best first at the first size."""
    parts, numbers = [], numbered(found)
    for model, counted in sorted({(row["model"], row["counted"]) for row in found["rows"]}):
        rows = [row for row in found["rows"] if (row["model"], row["counted"]) == (model, counted)]
        sizes = sorted({row["size"] for row in rows})
        cells: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
        for row in rows:
            cells.setdefault((row["method"], row["repair"]), {})[row["size"]] = row
        lines = [
            f"### {model}, share of {counted}\n",
            "| no. | method | repair | " + " | ".join(f"{s:.0%}" for s in sizes),
        ]
        lines[-1] += " |"
        lines.append("|---:|---|---|" + "---:|" * len(sizes))
        for kind, by_size in sorted(cells.items(), key=lambda item: errors_of(item[1], sizes)):
            shown = [cell(by_size.get(size), counted) for size in sizes]
            lines.append(f"| {numbers[kind]} | {kind[0]} | {kind[1]} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    note = "Relative error of all tokens at the end, mean ± standard deviation over seeds (their number if not 3)."
    return "\n\n".join([*parts, f"{note} * not held to that size: it can't reach it."]) + "\n"


def errors_of(by_size: dict[float, dict[str, Any]], sizes: Sequence[float]) -> list[float]:
    """Return the mean errors by size, those that are missing last."""
    return [by_size[size]["error"]["mean"] if size in by_size else float("inf") for size in sizes]


def cell(row: dict[str, Any] | None, counted: str) -> str:
    """Return mean ± spread, with the number of seeds where it is not three, and a star where the size was not met."""
    if row is None:
        return ""
    spread, seeds = row["error"]["spread"], row["num_seeds"]
    text = f"{row['error']['mean']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
    return text + (f" ({seeds})" if seeds != 3 else "") + ("" if row["held_to"] == counted else " *")


if __name__ == "__main__":
    main()
