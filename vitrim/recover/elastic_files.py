"""The widths of an elastic student beside its weights: written with the output, read when a width is cut out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from vitrim.errors import DAMAGED, CheckpointError
from vitrim.recover.elastic import Slice
from vitrim.storage.sealed import read_sealed, read_tensors, write_sealed, write_tensors

WIDTHS, WIDTH_TENSORS, FORMAT = "elastic.json", "elastic.safetensors", "vitrim-elastic/1"


def save_widths(folder: Path, model: nn.Module, slices: Mapping[float, Slice]) -> None:
    """Write the widths of an elastic student beside the model's weights.

    Args:
        folder: the output folder.
        model: the whole model in that folder; tensors are stored in its types.
        slices: by MLP ratio, with paths from the root of the whole model.
    """
    own = model.state_dict()
    tensors = {
        f"{ratio}/{name}": tensor.to("cpu", own[name].dtype).contiguous()
        for ratio, found in slices.items()
        for name, tensor in found.tensors.items()
    }
    digest = write_tensors(folder / WIDTH_TENSORS, tensors)
    widths = [
        {"mlp_ratio": ratio, "units": dict(found.units), "errors": dict(found.errors)}
        for ratio, found in slices.items()
    ]
    write_sealed(folder / WIDTHS, {"format": FORMAT, "widths": widths, "tensors": digest})


def read_widths(folder: Path) -> dict[float, Slice]:
    """Read what `save_widths` wrote.

    Returns:
        By MLP ratio, the smallest first; empty where the folder holds a single width.

    Raises:
        CheckpointError: a file is damaged or of another version.
    """
    if not (folder / WIDTHS).exists():
        return {}
    try:
        about = read_sealed(folder / WIDTHS, {"format": str, "widths": list, "tensors": str})
        if about["format"] != FORMAT:
            raise CheckpointError(f"{folder / WIDTHS}: format is {about['format']!r}; this version reads {FORMAT!r}.")
        tensors, _ = read_tensors(folder / WIDTH_TENSORS, digest=about["tensors"])
        found = {}
        for entry in about["widths"]:
            ratio = float(entry["mlp_ratio"])
            own = {name.removeprefix(f"{ratio}/"): t for name, t in tensors.items() if name.startswith(f"{ratio}/")}
            found[ratio] = Slice(units=dict(entry["units"]), tensors=own, errors=dict(entry["errors"]))
    except DAMAGED as error:
        raise CheckpointError(f"{folder}: its widths are damaged ({error!r:.160}); write the output again.") from None
    return found
