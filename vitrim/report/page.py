"""Writes the report of one compression: a single self-contained HTML page, pictures first.

It takes plain values, so it can be made (and tested) without a model. It measures nothing and knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitrim.errors import OutputError
from vitrim.report import figures, tiles
from vitrim.report.data import ReportData
from vitrim.report.picture import Picture, final_value, format_change, format_number

HEADLINE_BATCH = 8  # or the nearest that was timed


def write_report(path: Path, data: ReportData) -> None:
    """Write the page; an older file at `path` is replaced only once the new one is complete.

    Args:
        path: the HTML file to write; missing directories are made.
        data: what to show.

    Raises:
        OutputError: the file can't be written, or patch tokens and grid do not fit.
    """
    write_page(path, _render(data))


def write_page(path: Path, page: str) -> None:
    """Write the text of a page as a whole or not at all.

    Raises:
        OutputError: the file can't be written.
    """
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
    """Render the page as text."""
    candidates = [
        figures.draw_size(data.summary),
        figures.draw_latency(data.latency),
        figures.draw_widths(data.sites),
        figures.draw_block_errors(data.block_errors),
        figures.draw_residuals(data.residual_curves),
        figures.draw_recovery(data.recovery),
        tiles.draw_poses(data.poses),
        tiles.draw_frames(data.frames),
        tiles.draw_patches(data.images, data.teacher_patches, data.student_patches, data.grid),
        tiles.draw_neighbours(data.neighbours),
        figures.draw_answers(data.answers),
    ]
    return render(
        "page.html.j2",
        data=data,
        headline=_headline(data),
        pictures=[_counted(picture, data) for picture in candidates if picture is not None],
        rows=[*(_summary_row(name, row) for name, row in data.summary.items()), *_latency_rows(data)],
    )


def _counted(picture: Picture, data: ReportData) -> Picture:
    """Add to a drawing of errors how many images they are on."""
    if picture.key not in ("blocks", "recovery") or not data.num_images:
        return picture
    return replace(picture, caption=f"{picture.caption} {data.num_images:,} images that were held out.")


def render(template: str, **values: Any) -> str:
    """Render one of this package's templates; foreign text is escaped."""
    environment = Environment(
        loader=PackageLoader("vitrim", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _headline(data: ReportData) -> Markup:
    """Write one sentence of what was measured: how much smaller, how much faster on this machine, how close."""
    size, close = [], []
    for name, noun in (("parameters", "parameters"), ("MACs per image", "MACs")):
        row = data.summary.get(name, {})
        before, after = row.get("before"), final_value(row)
        if before and after is not None:
            word = "fewer" if after <= before else "more"
            percent = f"{100 * abs(before - after) / before:.0f}%"
            size.append(Markup("<b>{} {}</b> {}").format(percent, word, noun))
    cosine = final_value(data.summary.get("cosine CLS", {}))
    error = final_value(data.summary.get("relative error", {}))
    if cosine is not None:
        close.append(Markup("CLS cosine <b>{}</b>").format(_cosine(cosine)))
    if error is not None:
        close.append(Markup("relative error <b>{}</b>").format(f"{error:.2g}"))
    parts = [Markup(" and ").join(size)] if size else []
    before, after = (data.latency.get(when, {}) for when in ("before", "after"))
    timed = [batch for batch in before if after.get(batch)]
    if timed:
        batch = min(timed, key=lambda size: abs(size - HEADLINE_BATCH))
        faster = f"{before[batch] / after[batch]:.2f} times"
        parts.append(Markup("<b>{}</b> as fast here at batch {}").format(faster, batch))
    clauses = [Markup(", ").join(parts)] if parts else []
    if close:
        clauses.append(Markup(" and ").join(close) + Markup(" against the original"))
        clauses[-1] += Markup(" on {:,} images").format(data.num_images)
    name = Markup("{}: ").format(data.model) if clauses else Markup("{}").format(data.model)
    return name + Markup(", with ").join(clauses) + Markup(".")


def _latency_rows(data: ReportData) -> list[dict[str, str]]:
    """Return rows of the table on latency; the change is the value itself."""
    empty = {"before": "1", "after_cut": "", "change": "", "images": ""}
    return [{**empty, "name": name, "after": text} for name, text in data.relative_latency.items()]


def _cosine(value: float) -> str:
    """Format a cosine with three digits, or with as many more as it takes not to be rounded to 1."""
    return next((text for digits in (3, 4, 5, 6) if float(text := f"{value:.{digits}f}") < 1), "1")


def _summary_row(name: str, row: Mapping[str, float | None]) -> dict[str, str]:
    """Format one row of the table: the values, and the change where one makes sense."""
    before, after = row.get("before"), final_value(row)
    change = ""
    if before is not None and after is not None:
        if "%" in name:
            change = format_change(after - before, " points")
        elif before > 0 and "error" not in name and "cosine" not in name:
            change = format_change(100 * (after / before - 1), "%")
    values = {"before": before, "after_cut": row.get("after_cut"), "after": after}
    cells = {key: format_number(value, name=name) for key, value in values.items()}
    count = row.get("images")
    return {"name": name, "change": change, **cells, "images": "" if count is None else f"{count:,.0f}"}
