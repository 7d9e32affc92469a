"""Gathers what a report shows from the models, the plan and the metrics of one run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.models.origin import Origin
from vitrim.models.taps import evaluating, features
from vitrim.ops.gram_schmidt import select_with_curve
from vitrim.recipe import Recipe
from vitrim.report.data import ReportData
from vitrim.surgery import KeepUnits, Plan, read_weights

NUM_IMAGES = 8
CURVE_POINTS = 64


def collect(
    teacher: nn.Module,
    student: nn.Module,
    origin: Origin,
    plan: Plan,
    recipe: Recipe,
    metrics: Mapping[str, Any],
    sample: Tensor | None,
) -> ReportData:
    """Everything that the page of one run shows.

    Args:
        teacher: the original model.
        student: the cut model.
        origin: name and preprocessing of the original.
        plan: what was cut.
        recipe: what was asked for.
        metrics: what was measured, as in metrics.json.
        sample: preprocessed images to show, or None.
    """
    recovery = metrics["recovery"]
    stages: list[Any] = [metrics["after_cut"], metrics["after_recovery"] or metrics["after_cut"]]
    blocks = (
        []
        if stages[0] is None
        else [
            {"block": cut["block"], "after_cut": cut["relative_error"], "after": end["relative_error"]}
            for cut, end in zip(stages[0]["blocks"], stages[1]["blocks"], strict=True)
        ]
    )
    latency = {
        when: {int(size): row["median_ms"] for size, row in metrics[when]["latency"].items()}
        for when in ("before", "after")
        if "latency" in metrics[when]
    }
    cuts = [edit for edit in plan.edits if isinstance(edit, KeepUnits)]
    widths = [
        {"path": e.site.path, "kind": e.site.label, "width_before": e.site.d_hidden, "width_after": e.width}
        for e in cuts
    ]
    environment = metrics["environment"]
    return ReportData(
        model=origin.name,
        method=recipe.method,
        command=environment["command"],
        summary=summarise(metrics),
        sites=widths,
        block_errors=blocks,
        edits=[dict(edit) for edit in metrics["edits"]],
        residual_curves={edit.site.path: _residual(teacher, edit) for edit in cuts},
        recovery=[] if recovery is None else recovery["curve"],
        latency=latency,
        recipe_yaml=recipe.dump(),
        environment=environment,
        notes=list(metrics["notes"]),
        **_pictures(teacher, student, origin, sample),
    )


def summarise(metrics: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The before/after table of a run: row name to its values before, after the cut and after recovery."""
    before, after, cut, end = (metrics[key] for key in ("before", "after", "after_cut", "after_recovery"))
    rows: dict[str, dict[str, float | None]] = {}
    for name, key in (
        ("parameters", "parameters"),
        ("MACs per image", "macs"),
        ("peak memory (MiB)", "peak_memory_mib"),
    ):
        if key in before:
            rows[name] = {"before": before[key], "after_cut": after[key], "after": after[key]}
    for size in before.get("latency", {}):
        pair = [stage["latency"][size]["median_ms"] for stage in (before, after)]
        rows[f"latency batch {size} (ms)"] = {"before": pair[0], "after_cut": None, "after": pair[1]}
    if cut is not None:
        exact = {"relative_error": 0.0}
        for name, key in FIDELITY_ROWS.items():
            if key in cut["fidelity"]:
                value = None if end is None else end["fidelity"][key]
                rows[name] = {
                    "before": exact.get(key, 1.0),
                    "after_cut": cut["fidelity"][key],
                    "after": value,
                }
    if cut is not None and "top1" in cut:
        now = None if end is None else end["top1"]
        rows["top-1 (%)"] = {"before": before["top1"], "after_cut": cut["top1"], "after": now}
    return rows


FIDELITY_ROWS = {
    "relative error": "relative_error",
    "cosine CLS": "pooled_cosine",
    "cosine patches": "patches_cosine",
    "recall@1 in the original's index": "recall@1",
    "top-1 agreement": "top1_agreement",
}


def _residual(teacher: nn.Module, edit: KeepUnits) -> dict[str, Any]:
    """How fast Gram-Schmidt uses up a site's input weights, with the width that was kept."""
    rows = read_weights(teacher, edit.site).input_rows
    _, curve = select_with_curve(rows, min(rows.shape))
    picks = torch.linspace(0, len(curve) - 1, min(CURVE_POINTS, len(curve))).round().long()
    return {
        "residual": curve[picks].tolist(),
        "picks": picks.tolist(),
        "num_units": edit.site.d_hidden,
        "cut": edit.width,
    }


def _pictures(teacher: nn.Module, student: nn.Module, origin: Origin, sample: Tensor | None) -> dict[str, Any]:
    """Images in 0..1 and both models' patch tokens on them, where the model has a grid of patches."""
    nothing: dict[str, Any] = {"images": None, "teacher_patches": None, "student_patches": None, "grid": None}
    if sample is None or sample.ndim != 4:
        return nothing
    sample, student = sample[:NUM_IMAGES], copy.deepcopy(student).float()
    with evaluating(teacher, student):
        theirs, mine = (features(model, sample).patches_BND for model in (teacher, student))
    side = 0 if theirs is None else round(theirs.shape[1] ** 0.5)
    if theirs is None or mine is None or side * side != theirs.shape[1] or sample.shape[-1] != sample.shape[-2]:
        return nothing
    shown = sample
    if "mean" in origin.preprocessing:
        mean, std = (torch.tensor(origin.preprocessing[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        shown = sample * std + mean
    return {
        "images": shown.clamp(0, 1),
        "teacher_patches": theirs,
        "student_patches": mine,
        "grid": (side, side),
    }
