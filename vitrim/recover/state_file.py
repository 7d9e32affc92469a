"""A state in one file, as a single process writes it and any number of them read it.

It is a safetensors file: tensors whole, in a fixed order, a digest of all bytes as the last one, and the nesting with
all plain values as JSON in its header. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrim.storage.tensor_files import CHUNK_BYTES, CODES, DTYPES, TensorFiles, TensorInfo, tensor_bytes

FORMAT, DIGEST_BYTES = "vitrim-state/1", 32


def write_file(path: Path, nesting: Any, tensors: Sequence[Tensor]) -> None:
    """Write a state and its digest, and return once it is on disk.

    Raises:
        OSError: it can't be written, as on a full disk.
    """
    parts: Iterable[bytes | memoryview] = chain([_header(nesting, tensors)], map(tensor_bytes, tensors))
    with path.open("wb") as file:
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in parts:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())


def read_file(path: Path) -> tuple[Any, TensorFiles]:
    """Read one file if its digest is right: its nesting and its tensors.

    Raises:
        OSError: it can't be read.
        ValueError: it is cut short, damaged or no state; other damage shows as KeyError, TypeError or AttributeError.
    """
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
