"""Keeps the state of a run, from which any number of processes can continue, whenever a writer is killed.

One process writes one file (`state_file`), several write a folder in which each has its part (`state_parts`), while
training goes on. Either is read by any number of processes, in shards or not, and nothing in it is ever unpickled.

A new state is written under another name, synced to disk and renamed; the one before it stays. So at any moment at
least one whole state is there, and digests show that it is whole.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from vitrim.distributed.processes import broadcast_, is_main, num_processes, on_main
from vitrim.distributed.sharding import share_of
from vitrim.errors import CheckpointError, OutputError, VitrimError, reason_of
from vitrim.recover.nesting import packed, unpacked
from vitrim.recover.state_file import read_file, write_file
from vitrim.recover.state_parts import INDEX, Like, damage_of, load_parts, read_index, start_parts
from vitrim.storage.places import remove
from vitrim.storage.tensor_files import TensorFiles

# What reading a file raises that is missing, cut short, or something else.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, CheckpointError)

log = logging.getLogger("vitrim")


class Saving:
    """A state that is being written, or has been.

    Args:
        path: where it will be.
        future: what several processes wait for; None if it is there already.
    """

    def __init__(self, path: Path, future: Any = None) -> None:
        self.path, self.future = path, future

    def wait(self) -> None:
        """Return once the state is on disk; every process has to call this.

        Raises:
            OutputError: it could not be written, as on a full disk; the states before it are whole.
        """
        future, self.future = self.future, None
        try:
            if future is not None:
                future.result()
        except CheckpointException as error:
            process, (cause, *_) = min(error.failures.items())
            if is_main():
                remove(_beside(self.path, "new"))
            if not isinstance(cause, OSError | VitrimError):
                raise
            reason = (isinstance(cause, OSError) and cause.strerror) or reason_of(cause)
            raise _unwritten(self.path, f"process {process}: {reason.rstrip('.')}") from None


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state as `start_saving` does, and return once it is on disk."""
    start_saving(path, state).wait()


def start_saving(path: Path, state: Mapping[str, Any]) -> Saving:
    """Write nested tensors and plain values as a whole or not at all, and keep the state that was there before.

    Args:
        path: file or folder to write; several processes all have to see it. The state before has to be written by then.
        state: mappings, lists and tuples of tensors, numbers, strings and None; every process passes its own, equal but
            for its shares of tensors in shards. It may change once this has returned.

    Returns:
        What to wait for: with one process nothing, with several until all have written their parts.

    Raises:
        OutputError: the state could not be written, as on a full disk; those before it are whole.
    """
    tensors: list[Tensor] = []
    nesting = packed(state, tensors)
    beside = _beside(path, "new")
    if num_processes() == 1:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(beside)
            write_file(beside, nesting, tensors)
            _put(path)
        except OSError as error:
            remove(beside)
            raise _unwritten(path, error.strerror or str(error)) from None
        return Saving(path)
    on_main(_make_room, path)
    return Saving(path, start_parts(beside, nesting, tensors, partial(_put, path)))


def has_state(path: Path) -> bool:
    """Return whether `save_state` has left a state to continue from; every process has to ask."""

    def look() -> bool:
        found, new, before = _candidates(path)
        return found.exists() or before.exists() or _is_whole(new)

    return on_main(look)


def clear_state(path: Path) -> None:
    """Remove the states of an earlier run, so that a damaged new one can't lead back to them."""

    def clear() -> None:
        for candidate in _candidates(path):
            remove(candidate)

    on_main(clear)


def load_state(path: Path, like: Like = lambda keys: None) -> dict[str, Any]:
    """Read what `save_state` wrote, or the state before it where the last one is damaged; nothing in it is executed.

    Args:
        path: as for `save_state`; every process has to call this.
        like: called with the keys that lead to a tensor; where it returns one in shards of the same shape, this process
            gets its share, else the whole on the CPU.

    Raises:
        CheckpointError: no state can be read.
    """
    on_main(_finish_renaming, path)
    reasons: list[str] = []
    for candidate in _candidates(path):
        found, reason = on_main(_opened, candidate)
        if reason is None and isinstance(found, dict) and (damage := damage_of(candidate, found)):
            reason = _short(damage)
        if reason is None:
            if said := next(filter(None, reasons), None):
                log.warning("%s: can't be used (%s); going on from %s.", path, said, candidate)
            if isinstance(found, dict):
                return load_parts(candidate, found, like)
            assert found is not None
            return _load_file(found, like)
        reasons.append(reason)
    raise CheckpointError(f"{path}: can't be used ({next(filter(None, reasons), 'it is not there')}).")


def resumed_state(path: Path, like: Like = lambda keys: None) -> dict[str, Any] | None:
    """Read the state to continue from, as `load_state`; None where there is none, or none that is whole (logged)."""
    if not has_state(path):
        return None
    try:
        return load_state(path, like)
    except CheckpointError as error:
        log.warning("%s Training starts again.", error)
        return None


def _load_file(found: tuple[Any, TensorFiles], like: Like) -> Any:
    """Read a state in one file on the main process, and give each process its share, tensor by tensor."""
    nesting, files = found

    def tensor_at(name: str, keys: Sequence[Any]) -> Tensor:
        info = files.infos[name]
        tensor = files[name] if is_main() else torch.empty(info.shape, dtype=info.dtype)
        broadcast_([tensor])
        spread = like(keys)
        return tensor if spread is None else share_of(tensor, spread)

    return unpacked(nesting, tensor_at)


def _candidates(path: Path) -> list[Path]:
    """Return where a state may be, the latest first: in its place, whole but not yet renamed, or the one before."""
    return [path, _beside(path, "new"), _beside(path, "before")]


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.name}.{word}")


def _make_room(path: Path) -> None:
    """Make an empty folder for the parts of a new state, in place of what a killed run left there."""
    beside = _beside(path, "new")
    try:
        remove(beside)
        beside.mkdir(parents=True)
    except OSError as error:
        raise _unwritten(path, error.strerror or str(error)) from None


def _put(path: Path) -> None:
    """Put a new state that is on disk in its place, and the one there in the place of the one before."""
    if path.exists():
        before = _beside(path, "before")
        if path.is_dir() or before.is_dir():  # no folder takes another's place, nor that of a file
            remove(before)
        path.replace(before)
    _beside(path, "new").replace(path)


def _finish_renaming(path: Path) -> None:
    """Put a state in its place of which the writer was killed between the two renamings."""
    new = _beside(path, "new")
    if not path.exists() and _is_whole(new):
        new.replace(path)


def _opened(candidate: Path) -> tuple[dict[str, Any] | tuple[Any, TensorFiles] | None, str | None]:
    """Return the index of a folder, or the contents of a file; or None and why not, "" if it is not there."""
    try:
        return (read_index(candidate) if candidate.is_dir() else read_file(candidate)), None
    except FileNotFoundError:
        return None, ""
    except DAMAGE as error:
        return None, _short(reason_of(error))


def _short(reason: str) -> str:
    """Return what is said of a file inside a state, by its name alone."""
    return re.sub(r"^.*?([^/\\]+): can't be used \((.*)\)\.$", r"\1: \2", reason)


def _is_whole(path: Path) -> bool:
    """Return whether a file has the digest of its contents, or a folder its index, which is written last."""
    return (path / INDEX).exists() if path.is_dir() else path.exists() and _opened(path)[1] is None


def _unwritten(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path}: can't write the state ({reason}); make room and go on with resume.")
