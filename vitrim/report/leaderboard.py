"""The leaderboard's table and its verdict in plain words, made from plain values; nothing is run or measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitrim.metrics.record import is_steady, relative_latency

LATENCY_BATCH = "8"
# Title, key of the value in a row, and number format; "end" is the result after recovery.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("parameters", "parameters", "count"),
    ("MACs", "macs", "count"),
    (f"relative latency, batch {LATENCY_BATCH}", f"latency.{LATENCY_BATCH}.ratio", "latency"),
    ("weights (MB)", "bytes", "megabytes"),
    ("error, cut", "after_cut.relative_error", "number"),
    ("error, end", "after_recovery.relative_error", "number"),
    ("top-1 %, cut", "after_cut.top1", "percent"),
    ("top-1 %, end", "after_recovery.top1", "percent"),
    ("seconds", "seconds", "seconds"),
)
MORE_IS_BETTER = ("percent",)


def table(
    report: Mapping[str, Any], best: Callable[[str], str] = lambda text: f"**{text}**"
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table: the original first, then by error, failed runs last.

    Args:
        report: what `leaderboard` returns.
        best: marks the best cell of a column, among the rows that met the requested budget.
    """
    rows = sorted(report["rows"], key=lambda row: float("inf") if row["error"] else final(row)["relative_error"])
    shown = [column for column in COLUMNS if any(_value(row, column[1]) is not None for row in rows)]
    header = ["method", "repair", "held to", *(title for title, _, _ in shown)]
    original = report["original"] or {}
    top1 = {"after_cut": {"top1": original.get("top1")}}
    cells = [["original", "", "", *(_cell({**original, **top1}, column, original) for column in shown)]]
    winners = {column: _best(report, rows, column) for column in shown}
    for row in rows:
        line = [row["method"], row["repair"]]
        if row["error"]:
            cells.append([*line, row["error"], *("" for _ in shown)])
            continue
        values = [(_cell(row, column, original), _counted(row, column) == winners[column]) for column in shown]
        cells.append([*line, _held_to(report, row), *(best(text) if wins and text else text for text, wins in values)])
    return header, cells


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table and the verdict as Markdown."""
    header, rows = table(report)
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join([*lines, "", *judged_on(report), *report["verdict"]]) + "\n"


def judged_on(report: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the images behind errors and top-1, if any run was finished."""
    done = [final(row) for row in report["rows"] if not row["error"] and "num_images" in final(row)]
    counts = [_span([found[key] for found in done]) for key in ("num_images", "num_labelled") if done]
    data = report["asked"]["data"]
    return (
        [f"Errors on {counts[0]} images held out from {data}, top-1 on the {counts[1]} with a label."] if done else []
    )


def _span(counts: Sequence[int]) -> str:
    """Return a number, or the least and the most."""
    return " to ".join(dict.fromkeys(f"{count:,}" for count in (min(counts), max(counts))))


def verdict(rows: Sequence[Mapping[str, Any]], baselines: Sequence[str]) -> list[str]:
    """Return sentences on which methods do worse than a baseline of the same size and repair, and which failed."""
    done = [row for row in rows if not row["error"]]
    said = []
    for base in [row for row in done if row["method"] in baselines]:
        rivals = [row for row in done if _terms(row) == _terms(base) and row["method"] not in baselines]
        error = final(base)["relative_error"]
        losers = [row["method"] for row in rivals if final(row)["relative_error"] > error]
        name = f"{base['method']}, {'with our repair' if base['repair'] == 'ours' else 'without our repair'}"
        what = f"lost to it: {', '.join(losers)}" if losers else "nothing of the same size lost to it"
        if rivals:
            said.append(f"{name} (error {error:.4g}): {what}.")
    failed = [row["method"] for row in rows if row["error"]]
    return said + ([f"Failed: {', '.join(failed)}."] if failed else [])


def final(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the final quality of a row: after recovery, or after the cut if nothing was recovered."""
    return row["after_recovery"] or row["after_cut"]


def _terms(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the properties in which two rows must agree to be compared."""
    return row["repair"], row["fitted"]["counted"]


def _held_to(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the size to which a row's model was brought, in words."""
    fitted = row["fitted"]
    if fitted["counted"] is None:
        counted, share = _asked(report)
        missed = "params, nor of MACs" if counted == "params" else "MACs"
        return f"keep_ratio {fitted['keep_ratio']:g}; it can't reach {share:.0%} of {missed}"
    words = {"params": "params and bytes" if _in_bytes(report, row) else "params, not bytes", "macs": "MACs"}
    return f"{_asked(report)[1]:.0%} {words[fitted['counted']]}"


def _asked(report: Mapping[str, Any]) -> tuple[str, float]:
    """Return what was counted (`params` or `macs`) and the share that was asked for."""
    asked = report["asked"]
    counted = "macs" if "macs_ratio" in asked else "params"
    return counted, asked[f"{counted}_ratio"]


def _value(row: Mapping[str, Any], key: str) -> float | None:
    """Return a value of a row by its dotted key, or None if it is missing."""
    found: Any = row
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _best(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], column: tuple[str, str, str]) -> float | None:
    """Return the best value of a column among the rows that met the budget, or None if there is no difference."""
    met = [row for row in rows if not row["error"] and _met(report, row)]
    values = [value for row in met if (value := _counted(row, column)) is not None]
    pick = max if column[2] in MORE_IS_BETTER else min
    return pick(values) if len(set(values)) > 1 else None


def _counted(row: Mapping[str, Any], column: tuple[str, str, str]) -> float | None:
    """Return a value of a row that may be the best: not one of noise."""
    noisy = column[2] == "latency" and not row["error"] and not all(map(is_steady, _timed(row)))
    return None if noisy else _value(row, column[1])


def _timed(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the latency of a row's model beside the original's in the same run, if it was measured."""
    return [row["latency"][LATENCY_BATCH]] if LATENCY_BATCH in row.get("latency", {}) else []


def _met(report: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether a row's model met the budget; one of parameters holds for bytes, too."""
    counted = _asked(report)[0]
    return row["fitted"]["counted"] == counted and (counted == "macs" or _in_bytes(report, row))


def _in_bytes(report: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether a row's model is within the budget by the bytes of its weights."""
    return row["bytes"] <= _asked(report)[1] * report["original"]["bytes"]


def _cell(row: Mapping[str, Any], column: tuple[str, str, str], original: Mapping[str, Any]) -> str:
    """Return a value as text; sizes with their share of the original's."""
    _, key, kind = column
    if kind == "latency":
        return "".join(map(relative_latency, _timed(row))) if "method" in row else "1"
    value = _value(row, key)
    if value is None:
        return ""
    whole = _value(original, key)
    share = f" ({value / whole:.0%})" if kind in ("count", "megabytes") and whole else ""
    written = {
        "count": f"{value / 1e6:.2f}M{share}",
        "megabytes": f"{value / 1e6:.2f}{share}",
        "number": f"{value:.4f}",
        "percent": f"{value:.1f}",
        "seconds": f"{value:.0f}",
    }
    return written[kind]
