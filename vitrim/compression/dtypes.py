"""The tensor types of a result: the original's, or float32 where those can't hold what came out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.models.given import named_tensors
from vitrim.surgery import Edit


def typed_as(original: nn.Module, student: nn.Module) -> nn.Module:
    """Give each tensor of a student the type that it has in the original: a bf16 model may keep float32 buffers.

    Tensors that an edit added take the type of the original's parameters, if they are floating point. Those that
    nothing changed are the original's bit for bit, also where it holds more digits than float32.
    """
    known = dict(named_tensors(original))
    for name, tensor, dtype in _types(original, student):
        old, tensor.data = known.get(name), tensor.data.to(dtype)
        if old is not None and old.dtype == torch.float64 and old.shape == tensor.shape:
            same = old.detach().to(tensor.device, torch.float32) == tensor.detach().float()
            tensor.data = torch.where(same, old.detach().to(tensor.device), tensor.data)
    return student


def is_float32(original: nn.Module) -> bool:
    """Return whether all floating-point tensors of a model are float32, so that no cast changes a result."""
    return all(tensor.dtype == torch.float32 for _, tensor in named_tensors(original) if tensor.is_floating_point())


def typed_copy(original: nn.Module, student: nn.Module) -> nn.Module:
    """Return the student as it will be returned: itself in a model of float32, else a copy in the original's types."""
    return student if is_float32(original) else typed_as(original, copy.deepcopy(student))


def too_large(original: nn.Module, student: nn.Module) -> str | None:
    """Return a sentence on the first tensor with a value beyond what the original's type can hold; None if all fit."""
    return next((_said(name, tensor, to) for name, tensor, to in _types(original, student) if _grows(tensor, to)), None)


def too_large_in(edits: Sequence[Edit], dtypes: Mapping[str, torch.dtype]) -> str | None:
    """Return the same sentence on the tensors of edits, which are read one by one.

    Args:
        edits: the edits of a checkpoint.
        dtypes: the types of its tensors, by name.

    Raises:
        ModelError: a tensor holds NaN or infinite values.
    """
    found: str | None = None
    for name, tensor in ((name, edit.tensors[name]) for edit in edits for name in edit.tensors):
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name}: holds NaN or infinite values after the repair, so nothing is written.")
        if found is None and name in dtypes and _grows(tensor, dtypes[name]):
            found = _said(name, tensor, dtypes[name])
    return found


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for floating-point types of fewer bits, and other types as they are."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else dtype


def check_result(original: nn.Module, student: nn.Module) -> None:
    """Check that a result is finite wherever the original is.

    Raises:
        ModelError: a tensor holds NaN or infinite values that the original does not have.
    """
    known = dict(named_tensors(original))
    for name, tensor in named_tensors(student):
        bad = ~torch.isfinite(tensor.detach())
        if not bool(bad.any()):
            continue
        old = known.get(name)
        if old is None or old.shape != tensor.shape or not torch.equal(~torch.isfinite(old).to(bad.device), bad):
            raise ModelError(
                f"{name}: holds {int(bad.sum())} NaN or infinite values in the result and none in the original, so "
                "nothing is written; lower the learning rate, or leave out repair, refit or recovery to see which."
            )


def _types(original: nn.Module, student: nn.Module) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Yield the student's floating-point tensors with the types that they get; integers that an edit made stay so."""
    known, usual = dict(named_tensors(original)), next((p.dtype for p in original.parameters()), torch.float32)
    for name, tensor in named_tensors(student):
        if tensor.is_floating_point():
            yield name, tensor, known[name].dtype if name in known else usual


def _grows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a cast makes a finite value infinite."""
    if not tensor.is_floating_point() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return False
    return bool((~torch.isfinite(tensor.detach().to(dtype)) & torch.isfinite(tensor.detach())).any())


def _said(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    largest = float(tensor.detach()[torch.isfinite(tensor.detach())].abs().max())
    short = str(dtype).removeprefix("torch.")
    return (
        f"{name} reaches {largest:.4g} and {short} ends at {torch.finfo(dtype).max:.6g}, so the result is in float32; "
        f"load it in float32 or bfloat16, not in {short}."
    )
