"""Shards, the tar files of webdataset: which ones a source names, and an index of those on a local disk.

In a shard, members with the same name up to the first dot are one sample: `000.jpg` is an image, `000.cls` its label.
The index holds where each image begins, so that any image is one seek away and nothing is unpacked. Compressed shards
and those behind a url or a command are read from the first byte to the last, by `streams.py`. Nothing is decoded here.
"""

from __future__ import annotations

import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vitrim.errors import DataError
from vitrim.models.origin import require

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
SHARD = re.compile(r"^pipe:|\.(tar|tgz|tar\.gz)($|\?)")  # a command to run, or a tar file, also at the end of a url
META = re.compile(r"__[^/]*__($|/)")  # what is said about a shard as a whole
TAR_ERRORS = (OSError, tarfile.TarError, EOFError, ValueError)


def shard_urls(source: Any) -> list[str] | None:
    """Return the shards that a source names, braces expanded; None for a source of another kind.

    Raises:
        MissingExtraError: the name holds braces, and webdataset, which expands them, is not installed.
    """
    given = [source] if isinstance(source, str | Path) else source
    if not (isinstance(given, Sequence) and len(given) and all(isinstance(name, str | Path) for name in given)):
        return None
    names = [str(name) for name in given]
    if not all(SHARD.search(name) for name in names) or any(Path(name).is_dir() for name in names):
        return None
    return [url for name in names for url in _expand(name)]


def can_seek(url: str) -> bool:
    """Whether a shard is an uncompressed tar file on a local disk."""
    return url.endswith(".tar") and not url.startswith("pipe:") and "://" not in url


def sample_of(member: str) -> tuple[str, str]:
    """Split the name of a member at the first dot, as webdataset does: the sample, and which part of it the member is.

    The part is "" for members of no sample: hidden files, `__names__`, and files without an ending.
    """
    folder, slash, name = member.rpartition("/")
    stem, _, kind = name.partition(".")
    return folder + slash + stem, kind.lower() if stem and not META.match(member) else ""


class TarIndex:
    """Position and label of each image in some tar files. Files are opened anew for each read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.labels, self._offsets, self._sizes = array("q"), array("q"), array("q")
        self._starts = [0]
        for file in self.files:
            try:
                with tarfile.open(file, "r:") as tar:
                    self._add(tar)
            except TAR_ERRORS as error:
                raise DataError(
                    f"{file}: not a readable .tar file ({error}); write or download it again, "
                    f"or read a compressed one as 'pipe:gzip -dc {file}'."
                ) from None
            self._starts.append(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row."""
        with self.files[bisect_right(self._starts, row) - 1].open("rb") as file:
            file.seek(self._offsets[row])
            return file.read(self._sizes[row])

    def _add(self, tar: tarfile.TarFile) -> None:
        """Index the samples of one file: the first image of each, and its label if it has one."""
        parts = (member for member in tar if member.isreg() and sample_of(member.name)[1])
        for _, members in groupby(parts, key=lambda member: sample_of(member.name)[0]):
            sample = {sample_of(member.name)[1]: member for member in members}
            image = next((member for kind, member in sample.items() if f".{kind}" in IMAGE_SUFFIXES), None)
            if image is None:
                continue
            label = tar.extractfile(sample["cls"]) if "cls" in sample else None
            self.labels.append(-1 if label is None else label_of(label.read()))
            self._offsets.append(image.offset_data)
            self._sizes.append(image.size)
        tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # type: ignore[union-attr]
            raise EOFError(f"cut off, or damaged at byte {tar.offset}")


def label_of(written: bytes) -> int:
    """Return the class number in a `.cls` member, or -1 if it is not a number that fits 64 bits."""
    digits = written.strip()
    return int(digits) if digits.isdigit() and len(digits) < 19 else -1


def _expand(name: str) -> list[str]:
    """Return one name for each number in braces."""
    if "{" not in name:
        return [name]
    require("webdataset", "shards")
    from webdataset.shardlists import expand_urls

    return expand_urls(name)
