"""Gives the targets of a micro-batch: the teacher's features, from running it without gradients or from a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vitrim.config.options import RecoverOptions
from vitrim.data import ImageSet
from vitrim.distributed.precision import autocast, is_bf16
from vitrim.errors import RecipeError
from vitrim.metrics.judging import read_features
from vitrim.recover.cache_layout import Layout
from vitrim.recover.files import TEACHER_CACHE
from vitrim.recover.sampler import MicroBatch
from vitrim.recover.teacher_cache import TeacherCache
from vitrim.storage.hashes import tensor_sha256
from vitrim.tokens import Features

# Images that stand for all of them when a cache is opened again: their pixels under augmentation must be the same.
NUM_WITNESSES = 16


class Target(NamedTuple):
    """Targets of a micro-batch.

    Attributes:
        features: the teacher's features.
        positions_BP: which patches these are; None for all.
    """

    features: Features
    positions_BP: Tensor | None = None


class Targets(Protocol):
    """Source of targets, as a run uses it."""

    def __call__(self, batch: MicroBatch) -> Target:
        """Return the targets of a micro-batch, on the device."""
        ...

    def flush(self) -> None:
        """Write to disk whatever a resumed run needs."""
        ...

    def refresh(self) -> None:
        """Take up what other processes have written to disk."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the user."""
        ...


class LiveTargets:
    """Targets from running the teacher, in the precision of the run; nothing is kept."""

    notes: Sequence[str] = ()

    def __init__(self, teacher: nn.Module, options: RecoverOptions, device: torch.device) -> None:
        self.teacher, self.options, self.device = teacher, options, device

    def __call__(self, batch: MicroBatch) -> Target:
        """Run the teacher on a micro-batch; its features are on the device."""
        with torch.no_grad(), in_precision(self.options, self.device):
            return Target(read_features(self.teacher, batch.images_BCHW.to(self.device), self.options.features_at))

    def flush(self) -> None:
        """Do nothing: nothing is kept."""

    def refresh(self) -> None:
        """Do nothing: nothing is shared."""


class CachedTargets:
    """Targets from a cache on disk; the teacher runs on images whose view is not there yet.

    The first time, too, gives what the cache keeps, rounded and with some patches only, so that it makes no difference
    whether a target was there already.
    """

    def __init__(self, live: LiveTargets, cache: TeacherCache) -> None:
        self.live, self.cache = live, cache

    def __call__(self, batch: MicroBatch) -> Target:
        """Return the cached features of a micro-batch, on the device; missing ones are added first."""
        view = self.live.options.view_of(batch.epoch)
        missing_B = ~self.cache.has(batch.rows_B, view)
        if bool(missing_B.any()):
            rest = batch._replace(images_BCHW=batch.images_BCHW[missing_B], rows_B=batch.rows_B[missing_B])
            self.cache.add(rest.rows_B, view, self.live(rest).features)
        return Target(*self.cache.read(batch.rows_B, view, self.live.device))

    def flush(self) -> None:
        """Write the features that are in memory only as a shard."""
        self.cache.flush()

    def refresh(self) -> None:
        """Take up the shards of other processes."""
        self.cache.refresh()

    @property
    def notes(self) -> Sequence[str]:
        """Size of the cache, and damaged shards."""
        return self.cache.notes


def cache_folder(options: RecoverOptions, work: Path | None) -> Path | None:
    """Return the folder for the teacher's targets: the one that the options name, else one in the work folder.

    Returns:
        The folder; None where no cache is asked for.

    Raises:
        RecipeError: a cache is asked for, and neither the options nor the run have a folder for it.
    """
    if options.cache_teacher is None:
        return None
    if options.cache_teacher.folder is None and work is None:
        raise RecipeError("recover.cache_teacher: this run writes nothing; name a folder for the cache.")
    return options.cache_teacher.folder or (work and work / TEACHER_CACHE)


def open_cached(live: LiveTargets, images: ImageSet, like: Features, *, seed: int, folder: Path) -> CachedTargets:
    """Open the cache of a teacher's features in a folder, or start one there.

    Args:
        live: the teacher.
        images: the training images, augmented already.
        like: features of the teacher, for their sizes.
        seed: of the run; the positions of patches follow from it.
        folder: see `cache_folder`.

    Raises:
        CheckpointError: the folder holds the cache of another teacher, other data or options.
        OutputError: the folder can't be used, or has no room.
        RecipeError: more patches are asked for than the model has.
    """
    options = live.options.cache_teacher
    assert options is not None
    about = {
        "data": images.name,
        "teacher": _weights_sha256(live.teacher.state_dict()),
        "features_at": live.options.features_at,
        "precision": "bf16" if is_bf16(live.options.precision, live.device) else "float32",
        "images": _witnesses_sha256(images, options.views),
    }
    layout = Layout.of(like, options)
    cache = TeacherCache(folder, about, layout, num_images=len(images), num_views=options.views, seed=seed)
    return CachedTargets(live, cache)


def _weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash a model's names and values."""
    lines = [f"{name} {tensor_sha256(tensor)}" for name, tensor in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _witnesses_sha256(images: ImageSet, num_views: int) -> str:
    """Hash some images as training sees them, in place of all data, their order and their augmentation."""
    digest = hashlib.sha256()
    for place, witness in enumerate(range(0, len(images), max(1, len(images) // NUM_WITNESSES))):
        images.set_epoch(place % num_views)
        item = images[witness]
        digest.update(b"unreadable" if item is None else tensor_sha256(item[0]).encode())
    return digest.hexdigest()[:16]


def in_precision(options: RecoverOptions, device: torch.device) -> torch.autocast:
    """Return autocast as the options say; casts of sharded weights are not kept, since these are whole only briefly."""
    return autocast(options.precision, device, keep_casts=not options.fsdp)
