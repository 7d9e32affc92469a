"""Fits a checkpoint to an architecture: the names without what training put around them, shapes and types compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrim.errors import CheckpointError
from vitrim.models.origin import Reading
from vitrim.storage.tensor_files import TensorFiles, find_weights, open_tensors
from vitrim.storage.training_files import AVERAGED, RAW, WRAPPERS, Which, preferred_prefix, without_wrappers

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Types in which quantizers keep their values under names of their own.
PACKED = (torch.int8, torch.uint8, torch.int32)
SHOWN = 3
# What torch's AveragedModel keeps beside the weights.
COUNTERS = ("n_averaged",)


def in_model_names(files: TensorFiles, model: nn.Module, weights: Which = "auto") -> TensorFiles:
    """Return a checkpoint's tensors under the names that they had before wrappers and larger modules held the model.

    The part of the checkpoint that holds most of the model's names is taken; what is beside it (heads of a
    self-supervised loss, a student beside its teacher) is left out, and said.

    Args:
        files: the checkpoint.
        model: the architecture; only its names are looked at.
        weights: which of several equal parts to take, as for `open_tensors`.
    """
    known = set(model.state_dict())
    own = {part for name in known for part in name.split(".")} & WRAPPERS
    clean = {name: without_wrappers(name, own) for name in files if name not in COUNTERS}
    prefix = _prefix(set(clean.values()), known, weights)
    found = {old: new.removeprefix(prefix) for old, new in clean.items() if new.startswith(prefix)}
    if all(old == new for old, new in found.items()) and len(found) == len(files):
        return files
    left = len(clean) - len(found)
    if not left:
        return files.renamed(found)
    beside = next(new for new in clean.values() if not new.startswith(prefix))
    return files.renamed(
        found, f"{prefix}* was taken of the checkpoint; {left} other tensors ({beside}, ...) were not."
    )


def _prefix(names: set[str], known: set[str], weights: Which) -> str:
    """Return what stands in front of a model's names in a checkpoint, "" where most of them are found as they are."""
    roots = {name.partition(".")[0] for name in known}
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part in roots and ".".join(parts[at:]) in known:
                found["".join(f"{each}." for each in parts[:at])] += 1
    if not found:  # names of other code than the library's, perhaps: only what all of them share is taken off
        return _shared_prefix(names)
    most = max(found.values())
    best = [prefix for prefix, count in found.items() if count == most]
    return "" if "" in best else preferred_prefix(best, weights)


def _shared_prefix(names: set[str]) -> str:
    """Return the words for "a model" with which every name begins."""
    words, prefix = {*RAW, *AVERAGED}, ""
    while names:
        first = {name.removeprefix(prefix).partition(".")[0] for name in names}
        if len(first) != 1 or not first <= words:
            break
        prefix += f"{first.pop()}."
    return prefix


def read_for(
    path: Path, build: Callable[[], nn.Module], reading: Reading, *, prefer: str, plain: Sequence[str]
) -> TensorFiles | None:
    """Return tensors under a model's names, from a file or folder that its library can't read by itself.

    Args:
        path: the file or folder.
        build: builds the architecture; only its names are looked at.
        reading: which weights of a training checkpoint to take.
        prefer: start of the preferred file name, as for `open_tensors`.
        plain: names of the files that the library reads.

    Returns:
        The tensors, or None for files that the library reads.
    """
    files = open_tensors(path, prefer=prefer, weights=reading.weights)
    check_floats(files.fakes(), nn.Module(), path)
    wrapped = any(not WRAPPERS.isdisjoint(name.split(".")) for name in files)
    if find_weights(path, prefer=prefer)[0].name in plain and not wrapped:
        return None
    return in_model_names(files, build(), reading.weights)


def check_fit(
    tensors: Mapping[str, Tensor], model: nn.Module, where: object, advice: str, *, strict: bool = True
) -> None:
    """Check that tensors, under the model's names, have the types and shapes of an architecture.

    Args:
        tensors: what the checkpoint holds; tensors on meta do.
        model: the architecture.
        where: where the checkpoint is, for error messages.
        advice: what to do, for error messages.
        strict: whether all tensors of the model must be there, and no others.

    Raises:
        CheckpointError: a tensor has another shape, is missing or not known, or holds quantized values.
    """
    wanted = model.state_dict()
    check_floats(tensors, model, where)
    wrong = [
        f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(wanted[name].shape)} in the architecture"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if strict:
        wrong += [f"{name} is missing" for name in wanted if name not in tensors]
        wrong += [f"{name} is not known" for name in tensors if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(f"{where}: does not fit: {'; '.join(wrong[:SHOWN])}{more}. {advice}")


def check_floats(tensors: Mapping[str, Tensor], model: nn.Module, where: object) -> None:
    """Check that weights are stored as plain floating-point numbers.

    Args:
        tensors: what the checkpoint holds; tensors on meta do.
        model: the architecture.
        where: where the checkpoint is, for error messages.

    Raises:
        CheckpointError: weights are quantized: whole numbers, or fp8.
    """
    wanted = model.state_dict()
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        if name in wanted:
            quantized = wanted[name].is_floating_point() and dtype not in FLOATS
        else:
            quantized = dtype in PACKED and tensor.ndim > 1
        if quantized or (dtype.is_floating_point and dtype not in FLOATS):
            raise CheckpointError(
                f"{where}: {name} is quantized ({str(dtype).removeprefix('torch.')}); weights must be float32, "
                "float16, bfloat16 or float64: pass the checkpoint from before it was quantized."
            )
