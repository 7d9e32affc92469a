"""Saves a cut model so that its own library, or `load`, can load it again.

An output folder is written beside its final place and renamed into it only when it is complete and verified. Nothing is
pickled. Reloading needs only the plan's widths; each tensor is stored once, in model.safetensors.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.errors import NotFiniteError, reason_of
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin, copy_companions
from vitrim.models.remote_code import has_remote_code, remote_code_of, write_remote_code
from vitrim.models.stock import stock_origin
from vitrim.output.load import ABOUT, WEIGHTS, read_about
from vitrim.output.verify import verify
from vitrim.storage.documents import write_json
from vitrim.surgery import Plan

log = logging.getLogger("vitrim")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What was written: whether the library loads it, how far its outputs are, what builds it, notes for the user.

    `remote_code` says that transformers does with the modeling file beside the weights. `difference` is None where no
    library can build the model, or what it takes is not known.
    """

    stock: bool
    remote_code: bool = False
    difference: float | None
    origin: Origin
    notes: tuple[str, ...] = ()


def save_checked(
    folder: Path, student: nn.Module, *, origin: Origin, plan: Plan, inputs: Tensor | None, remote_code: bool = False
) -> Saved:
    """Write weights, config and plan, and check them in a fresh process; what fails is left out, and said.

    Where the library's own format can't be written, or does not load back as the same model, the output is in vitrim's
    format; where that does not either, it is weights and plan, for whoever can build the model. So a run is never lost.

    Args:
        folder: an empty folder, normally from `staged_output`.
        student: the whole cut model.
        origin: how the uncut model is built.
        plan: what was cut, by paths from the root of the whole model.
        inputs: a few inputs of the encoder to compare on; None if what it takes is not known.
        remote_code: write a modeling file where the library's own format has no place for the widths.

    Raises:
        NotFiniteError: the model is not finite.
        OSError, SafetensorError: the disk can't take it.
    """
    notes: list[str] = []
    forms = ((origin, True), (origin, False), (replace(origin, library=None), False))
    for form, try_stock in forms if origin.library is not None else forms[2:]:
        try:
            with_code = remote_code and try_stock and inputs is not None  # else it could not be checked
            stock = save(folder, student, origin=form, plan=plan, try_stock=try_stock, remote_code=with_code)
            with_code, difference = has_remote_code(folder), None
            if inputs is not None and form.library is not None:
                difference = verify(folder, student, inputs, origin=form, stock=stock)
            if remote_code and not with_code:
                notes.append(_why_no_code(form, stock=stock, failed=not try_stock, checkable=inputs is not None))
            return Saved(stock=stock, remote_code=with_code, difference=difference, origin=form, notes=tuple(notes))
        except (NotFiniteError, OSError, SafetensorError):
            raise
        except Exception as error:  # libraries' own code writes and loads
            if form.library is None:
                raise
            reason = reason_of(error).removeprefix(f"{folder}: ").rstrip(".")
            what = "the modeling file" if has_remote_code(folder) else f"the format of {origin.library}"
            left = "vitrim's own format" if try_stock else "weights and plan alone: vitrim.load(path, model=...)"
            notes.append(f"{what if try_stock else 'it'} failed ({reason}); the output is in {left}.")
            log.warning("%s: %s", origin.name, notes[-1])
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    raise AssertionError("the last form is returned or raises")


def _why_no_code(origin: Origin, *, stock: bool, failed: bool, checkable: bool) -> str:
    """Return a note on why there is no modeling file, though one was asked for."""
    if stock:
        return f"remote_code: not needed, {origin.library} loads the folder by itself; no modeling file was written."
    why = "it failed" if failed else "more than sizes is another" if checkable else "no input is known to check it on"
    return f"remote_code: {why}; no modeling file was written."


def save(
    folder: Path,
    student: nn.Module,
    *,
    origin: Origin,
    plan: Plan,
    try_stock: bool = True,
    remote_code: bool = False,
) -> bool:
    """Write weights, config and plan into a folder.

    Args:
        folder: an existing folder, normally from `staged_output`.
        student: the whole cut model.
        origin: how the uncut model is built.
        plan: what was cut, by paths from the root of the whole model.
        try_stock: use the library's own format, if it has one for these widths.
        remote_code: write a modeling file, if it has none.

    Returns:
        Whether the stock library can load the folder by itself.
    """
    forms = {"try_stock": try_stock, "remote_code": remote_code}
    path = folder / write_configs(folder, student, origin=origin, plan=plan, **forms)
    stock, backend = bool(read_about(folder)["stock"]), backend_of(origin.library)
    tensors = _apart(student)
    if stock and backend is not None:
        tensors = dict(backend.stored(student, tensors))
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors writes 0600
    return stock


def write_configs(
    folder: Path,
    student: nn.Module,
    *,
    origin: Origin,
    plan: Plan,
    try_stock: bool = True,
    remote_code: bool = False,
) -> str:
    """Write everything in an output except the weights.

    Args:
        folder: an existing folder.
        student: the whole cut model; it may be on the meta device.
        origin: how the uncut model is built.
        plan: what was cut, by paths from the root of the whole model.
        try_stock: use the library's own format, if it has one for these widths.
        remote_code: write a modeling file, if it has none.

    Returns:
        The file name that the library expects for the weights.
    """
    stock, backend = stock_origin(origin, plan.edits) if try_stock else None, backend_of(origin.library)
    if stock is not None and backend is not None:
        backend.write_config(student, folder, stock)
    remote = remote_code_of(origin, plan.edits) if remote_code and stock is None else None
    if remote is not None:
        write_remote_code(student, folder, remote)
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
