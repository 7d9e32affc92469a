"""Finds the weights in what a training loop saved: nests, averaged weights beside raw ones, arguments, wrappers."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitrim.errors import CheckpointError, reason_of

Which = Literal["auto", "raw"]

# Keys under which training loops put weights, by how often they mean the model; and running averages of them (EMA).
RAW = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "student",
    "net",
    "network",
    "weights",
    "backbone",
    "encoder",
)
AVERAGED = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "model_ema",
    "ema_model",
    "ema",
    "teacher",
    "target_encoder",
    "momentum_encoder",
)
# Keys under which they put what the model was built with.
ARGUMENTS = ("args", "hyper_parameters", "config", "cfg", "opt")
# What wrappers add to names: DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
MAX_DEPTH = 8


def _plain_kinds() -> list[Callable | tuple[Callable, str]]:
    """Return what a file may hold beside tensors: kinds that only carry values, under every name that they have had."""
    found: list[Any] = [argparse.Namespace, types.SimpleNamespace, pathlib.PurePosixPath, pathlib.PureWindowsPath]
    for module in ("pathlib", "pathlib._local"):
        found += [(pathlib.PurePosixPath, f"{module}.{name}") for name in ("PosixPath", "PurePosixPath")]
        found += [(pathlib.PureWindowsPath, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    found += [datetime.datetime, datetime.date, datetime.timedelta, np.dtype, np.ndarray]
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    return found + [type(np.dtype(code)) for code in "?bhilqBHILQefdSU"]


@dataclass(frozen=True, kw_only=True)
class TrainingFile:
    """What was found in a file: the weights by name, what it says of its model, and notes on what was chosen."""

    tensors: Mapping[str, Tensor]
    said: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_training_file(path: Path, weights: Which = "auto") -> TrainingFile:
    """Read a file that torch saved, without running anything in it; tensors are mapped where the format allows it.

    Args:
        path: the file; torch's format before 1.6 is read whole.
        weights: "auto" takes averaged weights (EMA) where the file holds any, "raw" takes those that were trained.

    Raises:
        CheckpointError: the file can't be read without running code, holds no weights, or not those asked for.
    """
    try:
        with torch.serialization.safe_globals(_plain_kinds()):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError and more
        raise CheckpointError(_why_unreadable(path, error)) from None
    return _unwrap(loaded, path, weights)


def without_wrappers(name: str, kept: Iterable[str] = ()) -> str:
    """Return a tensor's name without what wrappers added anywhere in it, except for parts that the model has itself."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS or part in kept)


def _why_unreadable(path: Path, error: Exception) -> str:
    """Return an error text; for a file that holds other objects it says which, and what to do."""
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if found is not None:
        return (
            f"{path}: holds a {found[1]}, and nothing but plain data is unpickled; if you trust the file, save its "
            "weights alone: torch.save({'state_dict': ...}, FILE)."
        )
    return f"{path}: can't be read as a torch state dict ({reason_of(error)})."


def _unwrap(loaded: Any, path: Path, weights: Which) -> TrainingFile:
    """Follow the nests of a file down to a state dict."""
    state, said, notes = loaded, {}, []
    for _ in range(MAX_DEPTH):
        if not isinstance(state, Mapping):
            break
        said |= _arguments(state)
        raw, averaged = (
            next((key for key in keys if _holds_weights(state.get(key))), None) for keys in (RAW, AVERAGED)
        )
        if averaged is not None and weights == "raw" and raw is None:
            raise CheckpointError(f"{path}: holds averaged weights alone ({averaged}); take them, without weights=raw.")
        if raw is None and averaged is None:
            break
        if averaged is not None and weights == "auto":
            beside = f" and not {raw} (weights=raw takes that)" if raw is not None else ""
            notes.append(f"{path.name}: the averaged weights were taken: {averaged}{beside}.")
            state = state[averaged]
        else:
            state = state[raw]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no tensors; pass the file that holds the model's state dict.")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return TrainingFile(tensors=tensors, said=said, notes=tuple(notes))


def _holds_weights(value: Any) -> bool:
    """Return whether a value is a state dict, or a nest that holds one; a nest may hold itself."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping) and id(part) not in seen:
            if any(isinstance(each, Tensor) for each in part.values()):
                return True
            seen.add(id(part))
            waiting += [part.get(key) for key in (*RAW, *AVERAGED)]
    return False


def _arguments(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the arguments that a training loop saved beside the weights."""
    found: dict[str, Any] = {}
    for key in ARGUMENTS:
        value = state.get(key)
        value = vars(value) if isinstance(value, argparse.Namespace | types.SimpleNamespace) else value
        found |= {str(name): each for name, each in value.items()} if isinstance(value, Mapping) else {}
    return found


def preferred_prefix(prefixes: Sequence[str], weights: Which) -> str:
    """Return the prefix to take of several below which the names of a model stand: averaged, or raw if asked for."""
    averaged = [prefix for prefix in prefixes if set(AVERAGED) & set(prefix.split("."))]
    raw = [prefix for prefix in prefixes if prefix not in averaged]
    return min((averaged or raw) if weights == "auto" else (raw or averaged), key=len)
