"""Saves a cut model so that its own library, or `load`, can load it again.

An output folder is written beside its final place and renamed into it only when it is complete and verified. Nothing is
pickled. Reloading needs only the plan's widths; each tensor is stored once, in model.safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.models.load import backend_of
from vitrim.models.origin import Origin, copy_companions
from vitrim.models.stock import stock_origin
from vitrim.output.load import ABOUT, WEIGHTS, read_about
from vitrim.storage.documents import write_json
from vitrim.surgery import Plan


def save(folder: Path, student: nn.Module, *, origin: Origin, plan: Plan) -> bool:
    """Write weights, config and plan into a folder.

    Args:
        folder: an existing folder, normally from `staged_output`.
        student: the whole cut model.
        origin: how the uncut model is built.
        plan: what was cut, by paths from the root of the whole model.

    Returns:
        Whether the stock library can load the folder by itself.
    """
    path = folder / write_configs(folder, student, origin=origin, plan=plan)
    save_file(_apart(student), path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors writes 0600
    return bool(read_about(folder)["stock"])


def write_configs(folder: Path, student: nn.Module, *, origin: Origin, plan: Plan) -> str:
    """Write everything in an output except the weights.

    Args:
        folder: an existing folder.
        student: the whole cut model; it may be on the meta device.
        origin: how the uncut model is built.
        plan: what was cut, by paths from the root of the whole model.

    Returns:
        The file name that the library expects for the weights.
    """
    stock, backend = stock_origin(origin, plan.edits), backend_of(origin.library)
    if stock is not None and backend is not None:
        backend.write_config(student, folder, stock)
    if backend is not None:
        copy_companions(origin, folder, backend.COMPANIONS)
    about = {
        "format": "vitrim/1",
        "stock": stock is not None,
        "origin": origin.without_place().to_json(),
        "plan": plan.without_tensors().to_json(),
        "plan_sha256": plan.sha256,
    }
    write_json(folder / ABOUT, about)
    return WEIGHTS if stock is None or backend is None else backend.WEIGHTS


def _apart(student: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors by name, none sharing storage with another, as safetensors wants them.

    What a model of transformers ties stands there once, and is tied again when it is loaded. Other libraries, whose
    models may hold one module under two names (timm's CoaT), ask for every name.
    """
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in student.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen or tensor.numel() == 0:
            kept[name] = tensor.contiguous()
        elif not hasattr(student, "tie_weights"):
            kept[name] = tensor.clone()
        seen.add(key)
    return kept


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
