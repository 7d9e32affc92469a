"""Keeps a teacher's features on disk, so that the teacher runs once on each view of each image.

A cache is a folder: `index.json` says whose features it holds, and safetensors shards hold them. A shard is written
under another name, synced and renamed, and lists its own images, so every shard counts, whichever process wrote it, and
a kill costs only what was not yet written. Neither images nor positions of patches are stored: both follow from seeds.

Nothing here runs a model. A shard is read once when it is taken up, to check its digest.

Shapes: B images, N patch tokens, P of them kept, D width; V views, R rows of the training set.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrim.errors import CheckpointError, OutputError
from vitrim.recover.cache_layout import Layout, cache_bytes, decode, draw_positions, encode
from vitrim.recover.cache_shards import Shard
from vitrim.recover.losses import patches_at
from vitrim.storage.sealed import read_sealed, read_tensors, write_sealed, write_tensors
from vitrim.storage.tensor_files import TensorFiles, open_tensors
from vitrim.tokens import Features

FORMAT, INDEX, SUFFIX = "vitrim-teacher-cache/1", "index.json", ".safetensors"
# Targets of a shard stay in memory until it is written.
SHARD_BYTES = 128 * 2**20
# A file still unrenamed after this long was left by a run that was killed.
STALE_S = 3600
# Said of the cache for people, so not compared.
LABEL = "data"
# More than the targets of a shard: a place is the number of a shard times this, plus the position in it.
STRIDE = 2**32


class TeacherCache:
    """Teacher's features by row of the training set and view, in a folder that several processes and runs may share.

    Args:
        folder: where shards go; made where it does not exist.
        about: JSON values that tell one cache from another, such as the teacher's hash.
        layout: what is kept of an image.
        num_images: R.
        num_views: V.
        seed: of the positions of patches.
        shard_bytes: size of a shard.

    Raises:
        CheckpointError: the folder holds the cache of something else, or a damaged index.
        OutputError: the folder can't be written, is no cache, or has no room for the features still missing.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        layout: Layout,
        *,
        num_images: int,
        num_views: int,
        seed: int,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.layout, self.seed = folder, layout, seed
        self.shard_images = max(1, shard_bytes // layout.image_bytes)
        self.notes: list[str] = []
        self._places_VR = torch.full((num_views, num_images), -1, dtype=torch.int64)
        self._shards: list[Shard] = []
        self._open: Shard | None = None
        self._seen: set[str] = set()
        said = {"format": FORMAT, "seed": seed, "views": num_views, "num_images": num_images}
        _claim(folder, {**said, **asdict(layout), **about})
        self.refresh()
        self._check_room()

    def has(self, rows_B: Tensor, view: int) -> Tensor:
        """Return which of these images have cached features, (B,)."""
        return self._places_VR[view, rows_B] >= 0

    def add(self, rows_B: Tensor, view: int, found: Features) -> None:
        """Add the features of images that have none yet.

        Args:
            rows_B: the images' rows in the training set.
            view: which draw of augmentation was seen.
            found: their features, with all patches.

        Raises:
            OutputError: a full shard could not be written.
        """
        if self._open is not None and len(self._open) >= self.shard_images:
            self.flush()
        if self._open is None:
            self._open = Shard(self.layout)
            self._shards.append(self._open)
        kept = patches_at(found, self.positions(rows_B, view))
        parts = {"row": rows_B, "view": torch.full_like(rows_B, view)}
        for name, values in (("pooled", kept.pooled_BD), ("patches", kept.patches_BND)):
            if values is not None:
                stored, scale = encode(values.detach(), self.layout.dtype)
                parts |= {name: stored} if scale is None else {name: stored, f"{name}_scale": scale}
        first = self._shards.index(self._open) * STRIDE + len(self._open)
        self._open.extend({name: part.cpu() for name, part in parts.items()})
        self._places_VR[view, rows_B] = torch.arange(first, first + len(rows_B))

    def read(self, rows_B: Tensor, view: int, device: torch.device) -> tuple[Features, Tensor | None]:
        """Read the features of images that have them.

        Returns:
            Features in float32 on a device, and which patches these are, (B, P); None for all.

        Raises:
            CheckpointError: a shard has become unreadable.
        """
        places = self._places_VR[view, rows_B]
        assert bool((places >= 0).all()), "only what `has` says is there can be read"
        kinds = {name: kind for name, kind in self.layout.tensors().items() if name not in ("row", "view")}
        parts = {name: torch.empty((len(rows_B), *shape), dtype=dtype) for name, (dtype, shape) in kinds.items()}
        numbers = places // STRIDE
        for number in numbers.unique().tolist():
            slots = torch.nonzero(numbers == number).flatten()
            self._shards[number].read_into(parts, slots.tolist(), (places[slots] % STRIDE).tolist())
        on = {name: part.to(device) for name, part in parts.items()}
        pooled_BD = decode(on["pooled"], on.get("pooled_scale"))
        patches_BPD = decode(on["patches"], on.get("patches_scale")) if "patches" in on else None
        positions = self.positions(rows_B, view)
        return Features(pooled_BD=pooled_BD, patches_BND=patches_BPD), positions

    def positions(self, rows_B: Tensor, view: int) -> Tensor | None:
        """Return which patches of these images are kept, (B, P); None for all."""
        if self.layout.patches is None or self.layout.num_kept == self.layout.patches[0]:
            return None
        sizes = {"num_kept": self.layout.num_kept, "num_patches": self.layout.patches[0]}
        return torch.stack([draw_positions(self.seed, row, view, **sizes) for row in rows_B.tolist()])

    def flush(self) -> None:
        """Write the features that are in memory only, as a shard of their own.

        Raises:
            OutputError: the shard could not be written, as on a full disk; those before it are whole.
        """
        if self._open is None:
            return
        path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"  # a name that no other process takes
        try:
            write_tensors(path, self._open.stacked())
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{path}: can't be written ({reason}); make room and go on with resume.") from None
        self._seen.add(path.name)
        self._open.written(open_tensors(path))
        self._open = None

    def refresh(self) -> None:
        """Take up shards that other processes have written since; a damaged one is noted and ignored."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                files, _ = read_tensors(path)
                self._check(path, files)
            except CheckpointError as error:
                self.notes.append(f"teacher cache: its targets are made again, remove the file: {error}")
                continue
            number, rows = len(self._shards), files["row"]
            self._shards.append(Shard(self.layout, files))
            self._places_VR[files["view"], rows] = number * STRIDE + torch.arange(len(rows))

    def _check(self, path: Path, files: TensorFiles) -> None:
        """Refuse a shard without the tensors of the layout, or with rows or views out of range."""
        num_images = files.infos["row"].shape[0] if "row" in files else 0
        found = {name: (info.dtype, info.shape) for name, info in files.infos.items()}
        wanted = {name: (dtype, (num_images, *shape)) for name, (dtype, shape) in self.layout.tensors().items()}
        if found != wanted:
            raise CheckpointError(f"{path}: is no shard of this cache.")
        for name, limit in zip(("view", "row"), self._places_VR.shape, strict=True):
            if not bool(((files[name] >= 0) & (files[name] < limit)).all()):
                raise CheckpointError(f"{path}: names a {name} outside 0..{limit - 1}.")

    def _check_room(self) -> None:
        """Note the size of the full cache, and refuse one that the disk has no room for."""
        num_views, num_images = self._places_VR.shape
        total = cache_bytes(self.layout, num_images, num_views)
        missing = self.layout.image_bytes * int((self._places_VR < 0).sum())
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise OutputError(
                f"{self.folder}: the teacher cache needs {_show(missing)} more and {_show(free)} are free; use int8, "
                "fewer patches or views, or another folder."
            )
        there = "" if missing == total else f", {_show(total - missing)} of it there already"
        size = f"{_show(total)} for {num_images:,} images x {num_views} views"
        self.notes.insert(0, f"teacher cache: {size} in {self.folder}{there}")


def _claim(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the index of a new cache, or check that the folder's index is that of this one."""
    index = folder / INDEX
    about = json.loads(json.dumps(about))  # tuples are lists there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*"):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink(missing_ok=True)
        others = [path for path in folder.iterdir() if path.name != INDEX and not path.name.startswith(".")]
        if others and not index.exists():
            raise OutputError(f"{folder}: holds files and is no teacher cache; name another folder.")
        if not index.exists():
            write_sealed(index, about)
        stored = read_sealed(index, {"format": str})
    except CheckpointError as error:
        raise CheckpointError(f"{error} Remove the folder or name another one.") from None
    except OSError as error:
        raise OutputError(f"{folder}: can't be used ({error.strerror}); name another folder.") from None
    for key, value in about.items():
        if key != LABEL and stored.get(key) != value:
            raise CheckpointError(
                f"{folder}: is a teacher cache of {stored.get(LABEL)} made with another {key} ({stored.get(key)}, this "
                f"run has {value}); name another folder or remove this one."
            )


def _show(num_bytes: int) -> str:
    """Format bytes for people, in GB or MB."""
    return f"{num_bytes / 10**9:,.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / 10**6:,.1f} MB"
