"""Keeps the state of a run in one file from which any number of processes can continue, whenever the writer is killed.

The file is a safetensors file: tensors whole, in a fixed order, a digest of all bytes as the last one, and the nesting
with all plain values as JSON in its header. `torch.distributed.checkpoint` is not used. Its own format reads an index
through `pickle`, which executes what it finds; its safetensors format holds tensors alone, and takes a file system that
every machine sees. Here shards are gathered one tensor at a time and only the main process touches the disk, so memory
holds one whole tensor more, nothing depends on how many processes there are, and nothing is ever unpickled.

A new state is written under another name, synced to disk and renamed; the one before it stays. So at any moment at
least one whole state is there, and its digest shows that it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrim.distributed.processes import broadcast_, is_main, on_main
from vitrim.distributed.sharding import full
from vitrim.errors import CheckpointError, OutputError, reason_of
from vitrim.storage.tensor_files import CHUNK_BYTES, CODES, DTYPES, TensorFiles, TensorInfo, tensor_bytes

FORMAT, DIGEST_BYTES = "vitrim-state/1", 32
# Marks of a tensor, a mapping (as pairs: JSON would make its keys strings) and a tuple in the JSON of the nesting.
TENSOR, MAPPING, TUPLE = "tensor", "mapping", "tuple"
# What reading a file raises that is missing, cut short, or something else.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)

log = logging.getLogger("vitrim")
Place = Callable[[Sequence[Any], Tensor], Tensor]


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested tensors and plain values as a whole or not at all, and keep the state that was there before.

    Args:
        path: file to write, on a disk that the main process sees.
        state: mappings, lists and tuples of tensors, numbers, strings and None; every process passes its own, equal but
            for its shares of tensors in shards.

    Raises:
        OutputError: the file could not be written, as on a full disk; the states before it are whole.
    """
    tensors: list[Tensor] = []
    header = _header(_packed(state, tensors), tensors)
    wholes = (full(tensor) for tensor in tensors)

    def write() -> None:
        try:
            _write(path, chain([header], map(tensor_bytes, wholes)))
        finally:
            deque(wholes, maxlen=0)  # the others take part in every gathering, also after an error here

    if not is_main():
        deque(wholes, maxlen=0)
    on_main(write)


def has_state(path: Path) -> bool:
    """Return whether `save_state` has left a state to continue from; every process has to ask."""

    def look() -> bool:
        found, new, before = _candidates(path)
        return found.exists() or before.exists() or _is_whole(new)

    return on_main(look)


def clear_state(path: Path) -> None:
    """Remove the states of an earlier run, so that a damaged new one can't lead back to them."""

    def remove() -> None:
        for candidate in _candidates(path):
            candidate.unlink(missing_ok=True)

    on_main(remove)


def load_state(path: Path, place: Place = lambda keys, tensor: tensor) -> dict[str, Any]:
    """Read what `save_state` wrote, or the state before it where the last one is damaged; nothing in it is executed.

    Args:
        path: as for `save_state`; every process has to call this, the main one reads.
        place: called with the keys that lead to a tensor and the whole tensor on the CPU; returns what to put in its
            place.

    Raises:
        CheckpointError: no state can be read.
    """
    nesting, files = on_main(lambda: _opened(path))

    def tensor_at(name: str, keys: Sequence[Any]) -> Tensor:
        info = files.infos[name]
        tensor = files[name] if is_main() else torch.empty(info.shape, dtype=info.dtype)
        broadcast_([tensor])
        return place(keys, tensor)

    return _unpacked(nesting, tensor_at, ())


def resumed_state(path: Path, place: Place = lambda keys, tensor: tensor) -> dict[str, Any] | None:
    """Read the state to continue from, as `load_state`; None where there is none, or none that is whole (logged)."""
    if not has_state(path):
        return None
    try:
        return load_state(path, place)
    except CheckpointError as error:
        log.warning("%s Training starts again.", error)
        return None


def _candidates(path: Path) -> list[Path]:
    """Return where a state may be, the latest first: in its place, whole but not yet renamed, or the one before."""
    return [path, _beside(path, "new"), _beside(path, "before")]


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f"{path.name}.{word}")


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """Turn nested values into JSON values; tensors are appended to a list and replaced by their numbers."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {TENSOR: len(tensors) - 1}
    if isinstance(value, Mapping):
        return {MAPPING: [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_packed(item, tensors) for item in value]
        return {TUPLE: items} if isinstance(value, tuple) else items
    return value


def _unpacked(value: Any, tensor_at: Callable[[str, Sequence[Any]], Tensor], keys: Sequence[Any]) -> Any:
    """Rebuild nested values: the inverse of `_packed`; tensors are asked for in the order of the file."""
    if isinstance(value, list):
        return [_unpacked(item, tensor_at, (*keys, index)) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == TENSOR:
        return tensor_at(str(content), keys)
    if kind == TUPLE:
        return tuple(_unpacked(content, tensor_at, keys))
    return {key: _unpacked(item, tensor_at, (*keys, key)) for key, item in content}


def _header(nesting: Any, tensors: Sequence[Tensor]) -> bytes:
    """Build the start of a safetensors file, padded so that values are aligned to eight bytes."""
    about: dict[str, Any] = {"__metadata__": {"format": FORMAT, "nesting": json.dumps(nesting)}}
    start = 0
    for index, tensor in enumerate(tensors):
        stop = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        about[str(index)] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    about["digest"] = {"dtype": "U8", "shape": [DIGEST_BYTES], "data_offsets": [start, start + DIGEST_BYTES]}
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts and their digest under another name, then rename the file to `path`."""
    beside = _beside(path, "new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            path.replace(_beside(path, "before"))
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        reason = f"{error.strerror or error}"
        raise OutputError(f"{path}: can't write the state ({reason}); make room and go on with resume.") from None


def _opened(path: Path) -> tuple[Any, TensorFiles]:
    """Open the latest state that is whole: its nesting and its tensors.

    Raises:
        CheckpointError: there is none.
    """
    new, reasons = _beside(path, "new"), []
    if not path.exists() and _is_whole(new):  # killed between the two renamings
        new.replace(path)
    for candidate in _candidates(path):
        try:
            found = _read(candidate)
            if any(reasons):
                log.warning("%s: can't be used (%s); going on from %s.", path, next(filter(None, reasons)), candidate)
            return found
        except FileNotFoundError:
            reasons.append("")
        except DAMAGE as error:
            reasons.append(reason_of(error))
    raise CheckpointError(f"{path}: can't be used ({next(filter(None, reasons), 'it is not there')}).")


def _is_whole(path: Path) -> bool:
    """Return whether a file exists, and its digest is that of its contents."""
    try:
        _read(path)
    except DAMAGE:
        return False
    return True


def _read(path: Path) -> tuple[Any, TensorFiles]:
    """Read one file if its digest is right: its nesting and its tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        left = path.stat().st_size - DIGEST_BYTES
        if not 0 < length < left:
            raise ValueError("it is cut short or no state of a run")
        about = json.loads(file.read(length))
        file.seek(0)
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        if file.read() != digest.digest():
            raise ValueError("its digest is not that of its contents")
    metadata = about.pop("__metadata__")
    if metadata["format"] != FORMAT:
        raise ValueError(f"its format is {metadata['format']!r}; this version reads {FORMAT!r}")
    infos = {}
    for name, said in about.items():
        start = 8 + length + said["data_offsets"][0]
        infos[name] = TensorInfo(file=path, dtype=DTYPES[said["dtype"]], shape=tuple(said["shape"]), start=start)
    return json.loads(metadata["nesting"]), TensorFiles(infos)
