"""The table of a run: costs and quality of the model before, after the cut and after recovery."""

from __future__ import annotations

from vitrim.metrics.record import Closeness, Metrics, ModelCost, relative_latency

WEIGHTS = "weights (MB)"  # as written: masks and other buffers count, each tensor in its own type
Cells = dict[str, float | None]

# Rows of the table, with their names in the result of `metrics.fidelity`.
FIDELITY_ROWS = {
    "relative error": "relative_error",
    "cosine CLS": "pooled_cosine",
    "cosine patches": "patches_cosine",
    "recall@1 in the original's index": "recall@1",
    "top-1 agreement": "top1_agreement",
}


# Names of rows of what `evaluate` measures, by the keys that its JSON has; those above win.
NAMES = {
    "cosine": "cosine",
    "pooled_relative_error": "relative error CLS",
    "patches_relative_error": "relative error patches",
    "parameters": "parameters",
    "macs": "MACs per image",
    "peak_memory_mib": "peak memory (MiB)",
    "knn": "kNN (%)",
    "linear_probe": "linear probe (%)",
    "top1": "top-1 (%)",
    "confidence": "confidence",
    "blocks": "blocks that run, in the mean",
}


def row_name(key: str) -> str:
    """Return the name of a row on something measured, by its key in JSON."""
    named = {**NAMES, **{value: name for name, value in FIDELITY_ROWS.items()}}
    if key in named:
        return named[key]
    if key.startswith("top1 of "):  # one of several models
        return key.replace("top1", NAMES["top1"])
    what, _, number = key.partition("@")
    if what in ("recall", "old_index_recall"):
        return f"recall@{number} in {'the original' if what == 'recall' else 'the old one'}'s index"
    what, _, number = key.partition("=")
    return f"share of images that leave at exit {number}" if what == "exit" else key


def summarise(metrics: Metrics) -> dict[str, Cells]:
    """Return the before/after table of a run: row name to its values before, after the cut and after recovery.

    Rows that were judged on images have their number as well, under "images".
    """
    before, after = metrics.before, metrics.after
    costs = {
        "parameters": (before.parameters, after.parameters),
        row_name("macs"): (before.macs, after.macs),
        WEIGHTS: (_megabytes(before), _megabytes(after)),
        row_name("peak_memory_mib"): (before.peak_memory_mib, after.peak_memory_mib),
    }
    rows: dict[str, Cells] = {
        name: {"before": old, "after_cut": new, "after": new} for name, (old, new) in costs.items() if old is not None
    }
    return rows | _closeness_rows(metrics)


def latency_rows(cost: ModelCost) -> dict[str, str]:
    """Return the small model's latency relative to the original's in words, by the name of the row."""
    return {latency_name(size): relative_latency(row) for size, row in cost.latency.items()}


def latency_name(size: int) -> str:
    """Return the name of a row on latency."""
    return f"relative latency, batch {size}"


def _megabytes(cost: ModelCost) -> float | None:
    return None if cost.num_bytes is None else cost.num_bytes / 1e6


def _fitted_row(held_out: Cells, cut: Closeness, end: Closeness | None) -> dict[str, Cells]:
    """Return the row on the relative error, and that on the images that repair was fitted on below it."""
    after = end.fitted.get("relative_error") if end is not None else None
    cells = {"before": 0.0, "after_cut": cut.fitted["relative_error"], "after": after}
    return {"relative error": held_out, "relative error, fitted images": {**cells, "images": cut.fitted["num_images"]}}


def _closeness_rows(metrics: Metrics) -> dict[str, Cells]:
    """Return the rows on closeness of features, and on top-1."""
    cut, end = metrics.after_cut, metrics.after_recovery
    if cut is None:
        return {}
    exact, rows = {"relative_error": 0.0}, {}
    for name, key in FIDELITY_ROWS.items():
        if key in cut.fidelity:
            value = None if end is None else end.fidelity[key]
            rows[name] = {"before": exact.get(key, 1.0), "after_cut": cut.fidelity[key], "after": value}
            rows[name]["images"] = cut.num_images
    if cut.fitted:
        rows = _fitted_row(rows.pop("relative error"), cut, end) | rows
    if cut.top1 is not None:
        rows[row_name("top1")] = {
            "before": metrics.before.top1,
            "after_cut": cut.top1,
            "after": None if end is None else end.top1,
            "images": cut.num_labelled,
        }
    return rows
