"""Writes a cut model back as a checkpoint that the stock library loads, where its config can say the widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.models.load import Origin, build_empty
from vitrim.types import Plan


def stock_args(student: nn.Module, origin: Origin, plan: Plan) -> Mapping[str, Any] | None:
    """Arguments with which the stock library builds a model of the student's very shapes.

    Args:
        student: the cut model.
        origin: how the uncut model is built.
        plan: what was cut.

    Returns:
        The library's own arguments, or None where its config can't express the widths.
    """
    if origin.library is None:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    for ratio in _ratios(plan):
        candidate = replace(origin, model_args={**origin.model_args, "mlp_ratio": ratio})
        try:
            built = build_empty(candidate).state_dict()
        except (
            TypeError,
            ValueError,
            AssertionError,
        ):  # the architecture has no mlp_ratio, or refuses this one
            continue
        if {name: tuple(tensor.shape) for name, tensor in built.items()} == shapes:
            return candidate.model_args
    return None


def write_stock(student: nn.Module, folder: Path, model_args: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors as the stock library (timm) does itself."""
    from timm.models import save_for_hf  # type: ignore[attr-defined]

    save_for_hf(student, str(folder), model_args=dict(model_args), safe_serialization=True)


def _ratios(plan: Plan) -> Iterator[float]:
    """Ratios that may give these widths: as they are, nudged over the truncation, and doubled for packed gates."""
    edit = plan.edits[0]
    for count in (edit.width, 2 * edit.width):
        yield count / edit.site.d_model
        yield (count + 0.5) / edit.site.d_model
