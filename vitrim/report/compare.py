"""Compares output folders of one original: a table of cost and quality, and a picture of the best trade-offs.

It reads what the runs measured (metrics.json, recipe.yaml) and loads no model. Runs of
different originals are refused: closeness is measured against a run's own original, so the numbers are not comparable.
If machines or held-out images differ between runs, the numbers are shown with a note.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrim.config.recipe import Recipe
from vitrim.errors import DAMAGED, CheckpointError, OutputError
from vitrim.metrics.record import Metrics, is_steady, relative_latency
from vitrim.report.page import render, write_page
from vitrim.report.pareto import Point, draw_pareto
from vitrim.report.picture import final_value, format_number
from vitrim.report.summary import WEIGHTS, latency_name, summarise

COSTS = ("parameters", "MACs per image", "peak memory (MiB)", WEIGHTS)  # lower is better; shares are shown
TIMED_BATCH = 8  # whose latency the picture plots


@dataclass(frozen=True, kw_only=True)
class Run:
    """One output folder.

    Attributes:
        number: its place among the folders, from 1.
        name: of the folder, or its path where names are not unique.
        method: as in its metrics.
        original: name and size of the original.
        summary: as in its own report.
        latency: of the small model, beside the original in the same run.
        machine: on which it was measured.
        num_images: how many images its quality is on; 0 where it was not measured.
        held_out: the same with where they are from, in words.
    """

    number: int
    name: str
    method: str
    original: str
    summary: Mapping[str, Mapping[str, float | None]]
    latency: Mapping[int, Mapping[str, Any]]
    machine: str
    num_images: int
    held_out: str


def compare_runs(folders: Sequence[Path], out: Path) -> tuple[list[str], list[list[str]], list[str]]:
    """Write a page that compares runs.

    Args:
        folders: two or more that `compress` wrote, from one original.
        out: HTML file to write; it must not exist.

    Returns:
        Header and rows of the table, and notes.

    Raises:
        CheckpointError: `compress` did not write a folder, or the originals differ.
        OutputError: the page can't be written there.
    """
    if os.path.lexists(out) or out.suffix != ".html":
        raise OutputError(f"{out}: exists already or does not end in .html; choose another file to write.")
    runs = read_runs(folders)
    header, rows = table(runs)
    notes = _notes(runs)
    picture = draw_pareto(_panels(runs))
    write_page(out, render("compare.html.j2", runs=runs, picture=picture, header=header, rows=rows, notes=notes))
    return header, [[name, *(text for text, _ in cells)] for name, cells in rows], notes


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read what the runs in some folders measured; they are numbered from 1.

    Raises:
        CheckpointError: there are fewer than two, `compress` did not write one of them, or the originals differ.
    """
    if len(folders) < 2:
        raise CheckpointError(f"report: folders given: {len(folders)}; name two or more to compare.")
    resolved = [folder.resolve() for folder in folders]
    names = [path.name for path in resolved]
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    runs = [
        _read(folder, number, label) for number, (folder, label) in enumerate(zip(resolved, labels, strict=True), 1)
    ]
    for run in runs[1:]:
        if run.original != runs[0].original:
            raise CheckpointError(
                f"{run.name}: made from {run.original}, but {runs[0].name} from {runs[0].original};"
                " compare outputs of one original."
            )
    return runs


def table(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """Return the header, and for each measure its name and cells: the text, and whether it is the best of the runs.

    Costs are shown with their share of the original's in the same run, and latency as that share alone. Where the runs
    found different values for the original, its cell has their range, and none is called the best.
    """
    header = ["Measured", "Original", *(f"{run.number} {run.name}" for run in runs)]
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.summary):
        found = [run.summary.get(name, {}) for run in runs]
        befores = [before for row in found if (before := row.get("before")) is not None]
        values = [final_value(row) for row in found]
        known = [value for value in values if value is not None]
        comparable = len(set(known)) > 1 and len(set(befores)) < 2
        best = (min if _less_is_better(name) else max)(known) if comparable else None
        cells = [
            (_cell(name, row, value), value is not None and value == best)
            for row, value in zip(found, values, strict=True)
        ]
        rows.append((name, [(_range(name, befores), False), *cells]))
    dash = format_number(None)
    counts = [(f"{run.num_images:,}" if run.num_images else dash, False) for run in runs]
    return header, [*rows, *_latency_rows(runs), ("images, held out", [(dash, False), *counts])]


def _read(folder: Path, number: int, label: str) -> Run:
    path = folder / "metrics.json"
    try:
        metrics = Metrics.from_json(json.loads(path.read_text(encoding="utf-8")))
        summary = summarise(metrics)
        original = f"{metrics.model} ({metrics.before.parameters:,} parameters)"
        machine = f"{metrics.environment['device']}, {metrics.environment['machine']}"
        method, judged = metrics.method, metrics.closeness
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise CheckpointError(f"{path}: {reason}; name a folder that vitrim compress wrote.") from None
    except DAMAGED as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: not what vitrim compress writes ({what}); name one of its folders.") from None
    recipe = Recipe.load(folder / "recipe.yaml")
    return Run(
        number=number,
        name=label,
        method=str(method),
        original=original,
        summary=summary,
        latency=metrics.after.latency,
        machine=machine,
        num_images=0 if judged is None else judged.num_images,
        held_out=f"{judged.num_images:,} of {recipe.data}, seed {recipe.seed}" if judged else "none: not measured",
    )


def _range(name: str, befores: Sequence[float]) -> str:
    """Return the value that all runs found for the original, or from the least to the most."""
    if not befores:
        return format_number(None)
    ends = dict.fromkeys(format_number(value, name=name) for value in (min(befores), max(befores)))
    return " to ".join(ends)


def _latency_rows(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return rows of latency relative to the original in the same run; originals of several runs are never mixed."""
    rows = []
    for size in dict.fromkeys(size for run in runs for size in run.latency):
        texts = [relative_latency(run.latency[size]) if size in run.latency else format_number(None) for run in runs]
        rows.append((latency_name(size), [("1", False), *((text, False) for text in texts)]))
    return rows


def _less_is_better(name: str) -> bool:
    return name.startswith(COSTS) or "error" in name


def _cell(name: str, row: Mapping[str, float | None], value: float | None) -> str:
    """Return a value as text; a cost with its share of the original's."""
    before, text = row.get("before"), format_number(value, name=name)
    return f"{text} ({value / before:.0%})" if name.startswith(COSTS) and before and value is not None else text


def _panels(runs: Sequence[Run]) -> dict[str, list[Point]]:
    """Return the points of each panel, the original first (number 0)."""
    sizes = {run.number: final_value(run.summary.get("parameters", {})) for run in runs}
    times = {
        run.number: run.latency[TIMED_BATCH]["ratio"]
        for run in runs
        if TIMED_BATCH in run.latency and is_steady(run.latency[TIMED_BATCH])
    }
    whole = runs[0].summary["parameters"]["before"]  # the same in all, or they would not be compared
    titles = (("Parameters", sizes, whole), (f"Latency relative to the original, batch {TIMED_BATCH}", times, 1.0))
    panels = {}
    for title, costs, original in titles:
        points = []
        for run in runs:
            cost, error = costs.get(run.number), final_value(run.summary.get("relative error", {}))
            if cost is not None and error is not None:
                points.append(Point(number=run.number, name=run.name, cost=cost, error=error))
        if len(points) > 1 and original is not None:
            panels[title] = [Point(number=0, name="original", cost=original, error=0.0), *points]
    return panels


def _notes(runs: Sequence[Run]) -> list[str]:
    """Return notes on what makes the runs' numbers hard to compare."""
    notes = []
    if len({run.machine for run in runs}) > 1:
        where = "; ".join(f"{run.number}: {run.machine}" for run in runs)
        notes.append(f"Latency and memory were not measured on one machine ({where}): look at the shares.")
    if len({run.held_out for run in runs}) > 1:
        where = "; ".join(f"{run.number}: {run.held_out}" for run in runs)
        notes.append(f"The runs were not judged on the same images ({where}).")
    return notes
