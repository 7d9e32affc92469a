"""Write safetensors files tensor by tensor, in shards of bounded size, and continue after a crash.

Shapes are known before the first value, so every tensor has a fixed place: headers are written first, values go to
their offsets, and a journal records which tensors are complete. The format is safetensors' own (eight bytes of header
length, a JSON header, the values); the library itself can only write what is in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from vitrim.errors import CheckpointError
from vitrim.storage.sealed import append, header_of, line_of, read_journal
from vitrim.storage.tensor_files import CHUNK_BYTES, TensorFiles

log = logging.getLogger("vitrim")
SYNC_BYTES = 256 * 2**20  # values written between two syncs to disk: what a power cut may cost


@dataclass(frozen=True, kw_only=True)
class Place:
    """File, offset and size of a tensor's values."""

    file: str
    start: int
    num_bytes: int


class TensorWriter:
    """Writes tensors to their places in a folder, in any order.

    Args:
        folder: existing folder for the files; other files in it are deleted.
        tensors: every tensor's name, dtype and shape, in the order in which they are stored.
        stem: start of the file names, such as "model".
        shard_bytes: largest size of a file's values in bytes; None writes one file.
        journal: file that records which tensors are complete.
        resume: continue from the journal, if the files on disk match.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]],
        *,
        stem: str,
        shard_bytes: int | None,
        journal: Path,
        resume: bool,
    ) -> None:
        self.folder, self.journal = folder, journal
        self.places: dict[str, Place] = {}
        self.digests: dict[str, str] = {}
        self._files: dict[str, BinaryIO] = {}
        self._pending: list[str] = []
        self._unsynced = 0
        shards = _shards(tensors, shard_bytes)
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        headers = {name: header_of(shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)}
        for name, shard in zip(names, shards, strict=True):
            start = len(headers[name])
            for tensor, dtype, shape in shard:
                size = _num_bytes(dtype, shape)
                self.places[tensor] = Place(file=name, start=start, num_bytes=size)
                start += size
        self.total_bytes = sum(place.num_bytes for place in self.places.values())
        if resume:
            self.digests = self._complete(headers)
        if not self.digests:
            self._start(headers)

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one tensor's values.

        Raises:
            CheckpointError: the number of bytes does not match the tensor's shape and dtype.
        """
        place, digest, done = self.places[name], hashlib.blake2b(digest_size=16), 0
        file = self._file(place.file)
        file.seek(place.start)
        for chunk in chunks:
            done += len(chunk)
            if done > place.num_bytes:
                break
            digest.update(chunk)
            file.write(chunk)
        if done != place.num_bytes:
            raise CheckpointError(f"{name}: has {done} bytes, its shape says {place.num_bytes}; fetch it again.")
        self.digests[name] = digest.hexdigest()
        self._pending.append(name)
        self._unsynced += done
        if self._unsynced >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Flush values to disk, then record them in the journal: in this order a crash loses only time."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        lines = [line_of({"tensor": name, "values": self.digests[name]}) for name in self._pending]
        append(self.journal, "".join(lines))
        self._pending, self._unsynced = [], 0

    def close(self) -> None:
        """Finish the files, and write the index if there are several."""
        self.sync()
        for file in self._files.values():
            file.close()
        self._files = {}
        files = {place.file for place in self.places.values()}
        if len(files) > 1:
            weight_map = {name: place.file for name, place in self.places.items()}
            stem = next(iter(files)).split("-")[0]
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / f"{stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )

    def abandon(self) -> None:
        """Close the files after a failure; tensors named in the journal remain valid."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def wrong(self, written: TensorFiles) -> Iterator[str]:
        """Yield the names of tensors whose values on disk differ from those that were written."""
        for name, digest in self.digests.items():
            found = hashlib.blake2b(digest_size=16)
            for chunk in written.chunks(name):
                found.update(chunk)
            if found.hexdigest() != digest:
                yield name

    def _complete(self, headers: Mapping[str, bytes]) -> dict[str, str]:
        """Return the digests of tensors that an earlier run completed; none if its files have another layout.

        Their values are read back: those that changed since they were written are written again.
        """
        for name, header in headers.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != self._size(name, header):
                return {}
            with path.open("rb") as file:
                if file.read(len(header)) != header:
                    return {}
        found = {}
        for line in read_journal(self.journal, {"tensor": str, "values": str}):
            name, place = line["tensor"], self.places.get(line["tensor"])
            if place is not None and self._digest_at(place) == line["values"]:
                found[name] = line["values"]
            else:
                log.warning("%s: %s is not what was written there; it is written again.", self.folder, name)
        return found

    def _digest_at(self, place: Place) -> str:
        """Return the digest of a tensor's values as they are on disk."""
        digest, left = hashlib.blake2b(digest_size=16), place.num_bytes
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.start)
            while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()

    def _start(self, headers: Mapping[str, bytes]) -> None:
        """Delete old files, and create new ones of their final size with headers and no values."""
        self.journal.unlink(missing_ok=True)
        for old in self.folder.iterdir():
            old.unlink()
        for name, header in headers.items():
            with (self.folder / name).open("wb") as file:
                file.write(header)
                file.truncate(self._size(name, header))

    def _size(self, name: str, header: bytes) -> int:
        """Return the final size of a file in bytes."""
        return len(header) + sum(place.num_bytes for place in self.places.values() if place.file == name)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self.folder / name).open("r+b")
        return self._files[name]


def _shards(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], limit: int | None) -> list[list]:
    """Split tensors, in order, into parts no larger than the limit; a larger tensor gets a part of its own.

    Within a part wide dtypes come first, as in the library's own files, so that every value is aligned to its size.
    """
    shards: list[list] = [[]]
    size = 0
    for name, dtype, shape in tensors:
        num_bytes = _num_bytes(dtype, shape)
        if limit is not None and shards[-1] and size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype, shape))
        size += num_bytes
    return [sorted(shard, key=lambda tensor: -tensor[1].itemsize) for shard in shards]


def _num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    size = dtype.itemsize
    for side in shape:
        size *= side
    return size
