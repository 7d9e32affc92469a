"""Files that a run writes and reads back: each written whole or not at all, with a digest, and checked before its use.

A JSON document, and a line of a journal, hold theirs under "digest"; a safetensors file in the metadata of its header.
So a flipped bit is found, and so is a document that was edited by hand. What happens then is the caller's to say: an
error of this module names the file and what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vitrim.errors import DAMAGED, CheckpointError, reason_of
from vitrim.storage.tensor_files import CODES, TensorFiles, TensorInfo, open_tensors, tensor_bytes

DIGEST = "digest"
CHANGED = "its digest is not that of its contents; it was damaged or edited"
log = logging.getLogger("vitrim")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with its digest."""
    plain = json.loads(json.dumps(value))  # as it is read back: tuples are lists there, and keys text
    return {**plain, DIGEST: _digest(plain).hexdigest()}


def unsealed(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document without its digest.

    Args:
        value: what JSON gave.
        fields: names that it must have, with the type of each, or a tuple of types.

    Raises:
        ValueError: it is no such document, or was changed since `sealed` made it.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__} where a mapping belongs")
    plain = {name: part for name, part in value.items() if name != DIGEST}
    if value.get(DIGEST) != _digest(plain).hexdigest():
        raise ValueError(CHANGED)
    for name, kind in fields.items():
        if not isinstance(plain.get(name), kind):
            raise ValueError(f"it has no {name!r} as this version writes it")
    return plain


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON document with its digest, for people to read as well.

    Raises:
        OSError: it can't be written, as on a full disk.
    """
    text = json.dumps(sealed(value), indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_sealed(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        CheckpointError: it can't be read, is no such document, or was changed.
    """
    try:
        return unsealed(json.loads(path.read_bytes()), fields)
    except DAMAGED as error:
        raise _unreadable(path, error) from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written under another name, bring it to disk and rename it: it is there as a whole or not at all.

    Raises:
        OSError: it can't be written, as on a full disk; nothing is left then.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file with its digest, which is returned too, for a document that refers to the file.

    Args:
        path: file to write.
        tensors: by name.
        about: what else to keep in the header.

    Raises:
        OSError: it can't be written, as on a full disk.
    """
    kept = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))  # aligned to their size
    digest = _digest([dict(about or {}), _shapes(kept)])
    for tensor in kept.values():
        digest.update(tensor_bytes(tensor))
    layout = [(name, tensor.dtype, tensor.shape) for name, tensor in kept.items()]
    header = header_of(layout, {**(about or {}), DIGEST: digest.hexdigest()})

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            file.write(header)
            for tensor in kept.values():
                file.write(tensor_bytes(tensor))

    write_whole(path, write)
    return digest.hexdigest()


def read_tensors(path: Path, *, digest: str | None = None) -> tuple[TensorFiles, dict[str, str]]:
    """Open what `write_tensors` wrote, and read it once to check it.

    Args:
        path: the file.
        digest: the digest that it must have, if something else refers to this very file.

    Returns:
        The tensors, read on access, and what else is kept in the header.

    Raises:
        CheckpointError: it can't be read, is another file, or was changed.
    """
    try:
        tensors = open_tensors(path)
    except CheckpointError:
        raise CheckpointError(f"{path}: can't be used (it is cut short or damaged, or not there).") from None
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
        said = about.pop(DIGEST, None)
        found = _digest([about, _shapes(tensors.infos)])
        for name in tensors:
            for chunk in tensors.chunks(name):
                found.update(chunk)
        if found.hexdigest() != said or digest not in (None, said):
            raise ValueError(CHANGED)
    except Exception as error:  # SafetensorError derives from nothing else
        raise _unreadable(path, error) from None
    return tensors, about


def header_of(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], about: Mapping[str, str]) -> bytes:
    """Return the start of a safetensors file, padded so that values are aligned to eight bytes."""
    said: dict[str, Any] = {"__metadata__": dict(about)}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + math.prod(shape) * dtype.itemsize
        said[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def line_of(value: Mapping[str, Any]) -> str:
    """Return the line of a journal for a JSON document."""
    return json.dumps(sealed(value)) + "\n"


def append(journal: Path, text: str) -> None:
    """Add lines to a journal, and return once they are on disk."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_journal(journal: Path, fields: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the lines of a journal up to the first that was changed, which is cut off with all that follow it.

    An incomplete last line is what a crash leaves; anything else is logged.
    """
    if not journal.is_file():
        return []
    found, lines = [], journal.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it is cut short")
            found.append(unsealed(json.loads(line), fields or {}))
        except DAMAGED as error:
            if number < len(lines) - 1 or line.endswith(b"\n"):
                after = f", nor the {len(lines) - number - 1} after it" if number < len(lines) - 1 else ""
                log.warning("%s: line %d is not used (%s)%s.", journal, number + 1, _said(error), after)
            os.truncate(journal, sum(map(len, lines[:number])))
            break
    return found


def keep_lines(journal: Path, count: int) -> None:
    """Cut off all lines of a journal but the first ones."""
    lines = journal.read_bytes().splitlines(keepends=True)
    os.truncate(journal, sum(map(len, lines[:count])))


def _digest(value: Any) -> Any:
    """Return a hash object that has seen a JSON value in a fixed layout."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16)


def _shapes(tensors: Mapping[str, Tensor] | Mapping[str, TensorInfo]) -> list[Any]:
    return [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: can't be used ({_said(error)}).")


def _said(error: Exception) -> str:
    """Return what an error says in a few words; that of a missing key says little without its kind."""
    return reason_of(f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error)
