"""The result of a run: the model, the plan, what was measured, and the folder, with a short summary for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import nn

from vitrim.metrics.record import Metrics
from vitrim.report.picture import format_number
from vitrim.report.summary import latency_rows, summarise
from vitrim.surgery import Plan


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """The result of `compress`, `prune_checkpoint`, `slice` and `tune_text`.

    Attributes:
        model: the small model on the CPU; None if it was never built (file to file).
        plan: what was cut; it can be replayed.
        metrics: what was measured, as in metrics.json.
        out: the folder; None if nothing was written.
    """

    model: nn.Module | None
    plan: Plan
    metrics: Metrics
    out: Path | None

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return header and rows of the before/after table as text."""
        return table_rows(self.metrics)

    def summary(self) -> str:
        """Return the before/after table, notes and the line that loads the result, as text."""
        lines = [aligned(*self.table()), self.metrics.judged_on, *(f"note: {note}" for note in self.metrics.notes)]
        if self.metrics.loads_with:
            lines.append(f"Loads with: {self.metrics.loads_with}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        before, after = self.metrics.before.parameters, self.metrics.after.parameters
        close = self.metrics.closeness
        error = "" if close is None else f", relative error {close.relative_error:.4g} on {close.num_images:,} images"
        place = "" if self.out is None else f", out={str(self.out)!r}"
        return f"Result({self.metrics.method}: {before:,} -> {after:,} parameters{error}{place})"

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return html_table(*self.table()) + f"<p>{escape(self.metrics.judged_on)}</p>"


def table_rows(metrics: Metrics) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the before/after table as text, without empty columns.

    The last column is the number of images behind a row, where anything was judged on images.
    """
    found = summarise(metrics)
    keys = [key for key in ("before", "after_cut", "after") if any(row[key] is not None for row in found.values())]
    if metrics.after_recovery is None and "after" in keys and "after_cut" in keys:
        keys.remove("after_cut")  # nothing was trained, so the cut is the result
    titles = {"before": "original", "after_cut": "after the cut", "after": "after recovery"}
    if metrics.after_recovery is None:
        titles["after"] = "small"
    rows, judged = [], metrics.closeness is not None
    header = ("", *(titles[key] for key in keys), *(("images",) if judged else ()))
    for name, row in found.items():
        cells = {**row, "after": row["after"] if row["after"] is not None else _result_of(row, metrics)}
        shown = ("-" if cells[key] is None else format_number(cells[key], name=name) for key in keys)
        count = row.get("images")
        rows.append((name, *shown, *(("" if count is None else f"{count:,.0f}",) if judged else ())))
    for name, text in latency_rows(metrics.after).items():
        texts = {"before": "1", "after_cut": "", "after": text}
        rows.append((name, *(texts[key] for key in keys), *(("",) if judged else ())))
    return header, rows


def _result_of(row: dict[str, float | None], metrics: Metrics) -> float | None:
    """Return the final value of a row if nothing was trained (the one after the cut), else None."""
    return row["after_cut"] if metrics.after_recovery is None else None


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain HTML table with all text escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a text table with columns just wide enough for their cells."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(line.rstrip() for line in lines)
