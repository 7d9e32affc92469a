"""The report of one compression: a single self-contained HTML page, pictures first.

It takes plain values, so it can be made (and tested) without a model. It measures nothing and knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from vitrim.errors import OutputError
from vitrim.report import figures

__all__ = ["ReportData", "write_report"]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a report shows; whatever is empty or None is left out of the page.

    Attributes:
        model: name of the model.
        method: name of the method.
        command: the command line that made the smaller model.
        summary: row name to {"before", "after_cut", "after"}; a value may be None. The headline and the size
            bars read the rows "parameters", "MACs per image", "relative error" and "cosine CLS".
        sites: one {"path", "kind", "width_before", "width_after"} for each cut MLP.
        block_errors: one {"block", "after_cut", "after"} for each block, relative squared errors.
        residual_curves: site path to {"residual", "num_units", "cut"}; an optional "picks" says after how
            many picks each fraction of "residual" holds (without it they are even from 0 to num_units).
        recovery: {"step", "relative_error"} and {"step", "loss"} points.
        latency: "before" and "after", each from batch size to milliseconds.
        images: pictures in 0..1, (B, 3, H, W), up to 8.
        teacher_patches: patch tokens of the original for these images, (B, N, D).
        student_patches: patch tokens of the smaller model, (B, N, D).
        grid: rows and columns of patches.
        recipe_yaml: the recipe as text.
        environment: library and machine names to versions.
        notes: sentences for the reader.
    """

    model: str
    method: str
    command: str
    summary: dict[str, dict[str, float | None]]
    sites: list[dict[str, Any]]
    block_errors: list[dict[str, Any]]
    residual_curves: dict[str, dict[str, Any]]
    recovery: list[dict[str, float]]
    latency: dict[str, dict[int, float]]
    images: Tensor | None
    teacher_patches: Tensor | None
    student_patches: Tensor | None
    grid: tuple[int, int] | None
    recipe_yaml: str
    environment: dict[str, str]
    notes: list[str]


def write_report(path: Path, data: ReportData) -> None:
    """Write the page; an older file at `path` is replaced only once the new one is complete.

    Args:
        path: the HTML file to write; missing directories are made.
        data: what to show.

    Raises:
        OutputError: the file can't be written, or patch tokens and grid do not fit.
    """
    page = _render(data)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(page, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: can't write the report ({error}); choose another path.") from None


def _render(data: ReportData) -> str:
    """The page as text."""
    candidates = [
        figures.draw_size(data.summary),
        figures.draw_block_errors(data.block_errors),
        figures.draw_residuals(data.residual_curves),
        figures.draw_recovery(data.recovery),
        figures.draw_latency(data.latency),
        figures.draw_patches(data.images, data.teacher_patches, data.student_patches, data.grid),
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files(__name__) / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        data=data,
        headline=_headline(data),
        pictures=[picture for picture in candidates if picture is not None],
        rows=[_summary_row(name, row) for name, row in data.summary.items()],
    )


def _headline(data: ReportData) -> Markup:
    """One sentence: how much smaller, how close. Says only what was measured."""
    size, close = [], []
    for name, noun in (("parameters", "parameters"), ("MACs per image", "MACs")):
        row = data.summary.get(name, {})
        before, after = row.get("before"), figures.final_value(row)
        if before and after is not None:
            word = "fewer" if after <= before else "more"
            percent = f"{100 * abs(before - after) / before:.0f}%"
            size.append(Markup("<b>{} {}</b> {}").format(percent, word, noun))
    cosine = figures.final_value(data.summary.get("cosine CLS", {}))
    error = figures.final_value(data.summary.get("relative error", {}))
    if cosine is not None:
        close.append(Markup("CLS cosine <b>{}</b>").format(f"{cosine:.3f}"))
    if error is not None:
        close.append(Markup("relative error <b>{}</b>").format(f"{error:.2g}"))
    clauses = [Markup(" and ").join(size)] if size else []
    if close:
        clauses.append(Markup(" and ").join(close) + Markup(" against the original"))
    name = Markup("{}: ").format(data.model) if clauses else Markup("{}").format(data.model)
    return name + Markup(", with ").join(clauses) + Markup(".")


def _summary_row(name: str, row: Mapping[str, float | None]) -> dict[str, str]:
    """The cells of one row: the values, and the change where one makes sense."""
    before, after = row.get("before"), figures.final_value(row)
    change = ""
    if before is not None and after is not None:
        if "%" in name:
            change = figures.format_change(after - before, " points")
        elif before > 0 and "error" not in name and "cosine" not in name:
            change = figures.format_change(100 * (after / before - 1), "%")
    cells = {key: figures.format_number(row.get(key), name=name) for key in ("before", "after_cut", "after")}
    return {"name": name, "change": change, **cells}
