"""Writes a cut model back as a checkpoint that the stock library loads, where its config can say the widths."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.models.load import Origin, build_empty


def stock_args(student: nn.Module, origin: Origin, widths: Collection[int]) -> Mapping[str, Any] | None:
    """Arguments with which the stock library builds a model of the student's very shapes.

    Args:
        student: the cut model.
        origin: how the uncut model is built.
        widths: hidden widths of the MLPs after the cut.

    Returns:
        The library's own arguments, or None where its config can't express the widths.
    """
    if origin.library is None or len(set(widths)) != 1:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    for ratio in _ratios(origin, next(iter(widths)), getattr(student, "embed_dim", 0)):
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


def _ratios(origin: Origin, width: int, d_model: int | list[int]) -> Iterator[float]:
    """Ratios that may give this width: as it is, nudged over the truncation, and doubled for packed gates."""
    sizes = d_model if isinstance(d_model, list | tuple) else [d_model]
    for size in sizes:
        if size:
            for count in (width, 2 * width):
                yield count / size
                yield (count + 0.5) / size
