"""Open any source of images as one map-style dataset of preprocessed tensors.

Folders of images, parquet files, Hugging Face datasets, torch datasets and loaders, plain iterables and the
word "digits" all open as an `ImageSet`. Images are decoded when they are asked for, one at a time; one that
can't be decoded is counted and left out, never replaced. Nothing here downloads, caches on disk or shuffles
on its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import get_temp_dir
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vitrim.data.decode import READ_ERRORS, UNREADABLE, Raw, Seen, as_picture, kind_of, remarks, to_rgb
from vitrim.data.labels import Classes
from vitrim.data.parts import Part
from vitrim.data.pixels import check_pixels, outlying
from vitrim.data.sources import ALLOWED, Rows, open_rows
from vitrim.errors import DataError
from vitrim.inputs import in_float32, is_image, is_named, numbers

LONGEST_SOCKET = 107 if sys.platform == "linux" else 103  # bytes of its path
LOG = logging.getLogger("vitrim")
Transform = Callable[[Any], Any]  # from a PIL image, or what a `Raw` holds, to a tensor or `Inputs`


class Batch(NamedTuple):
    """Images, their labels (int64, -1 if unknown; of people their joints) and how many were left out as unreadable.

    `num_skipped` is a plain int: `Tensor.to` helpers such as accelerate's leave it unchanged. `places_B` are the
    positions of the readable images among those that were requested.
    """

    images_BCHW: Tensor
    labels_B: Tensor
    num_skipped: int
    places_B: Tensor


class ImageSet(Dataset):
    """A map-style dataset of preprocessed images: item i is (image_CHW, label), or None if unreadable.

    PIL images and arrays or tensors of 8 or 16 bits go through the transform (without one: scaled to 0..1 at their own
    size); float tensors are taken as already preprocessed, by the transform and by augmentation alike.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        name: str,
        transform: Transform | None = None,
        indices: Sequence[int] | None = None,
        seed: int | None = None,
        seen: Seen | None = None,
        numbers: Sequence[int] | None = None,
        classes: Classes | None = None,
    ):
        self.name = name
        self._rows = rows
        self._transform = transform
        self._indices = range(len(rows)) if indices is None else indices
        self._seed = seed
        self._epoch = 0
        self._seen = Seen(len(rows)) if seen is None else seen
        self._numbers, self._classes = numbers, rows.classes if numbers is None else classes

    @property
    def about(self) -> str:
        """The source in words, with the part of it that is read."""
        return self._seen.about(self.name)

    @property
    def has_labels(self) -> bool:
        """Whether the source has class labels for its images."""
        return self.classes is not None

    @property
    def classes(self) -> Classes | None:
        """The label space; None if there are no labels."""
        return self._classes

    @property
    def joints(self) -> Tensor | None:
        """Joints (N, K, 4) of the persons in the pictures (see `people`); None for a source without."""
        joints = getattr(self._rows, "joints", None)
        return None if joints is None else joints[list(self._indices)]

    def person(self, index: int) -> tuple[Image.Image, Tensor]:
        """Return the picture of an item, before any transform, and the joints (K, 4) of the person in it."""
        row = self._indices[index]
        return to_rgb(self._rows.read(row)[0]), self._rows.joints[row]  # type: ignore[attr-defined]

    def relabelled(self, numbers: Sequence[int], classes: Classes | None) -> ImageSet:
        """Return the same images with class n called `numbers[n]`; -1 drops a label, and no number drops all."""
        return self._with(numbers=numbers, classes=classes)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        index = range(len(self))[index]
        try:
            return self._load(index)
        except READ_ERRORS as error:
            self._failed(index, error)
            return None

    def leave_out(self, index: int, why: str) -> None:
        """Count item `index` as one that can't be used; the remarks tell the user."""
        self._failed(index, OSError(why))

    def _failed(self, index: int, error: BaseException) -> None:
        row = self._indices[index]
        self._seen.failed(row, error, self._rows.where(row))

    def is_left_out(self, index: int) -> bool:
        """Return whether item `index` was found to be of no use."""
        return UNREADABLE in self._seen.counts([self._indices[index]])

    def problem(self, index: int) -> str | None:
        """Return in words why item `index` can't be read, or None if it can."""
        try:
            self._load(index)
        except READ_ERRORS as error:
            return f"{type(error).__name__}: {error}"
        return None

    def with_transform(self, transform: Transform | None) -> ImageSet:
        """Return the same images with another transform and no augmentation."""
        return self._with(transform=transform, seed=None)

    def augmented(self, augment: Transform | None, seed: int) -> ImageSet:
        """Return the same images with a random transform.

        Item i of epoch e is drawn under a seed made of (seed, e, i), so it does not depend on the order of reading or
        the number of workers.
        """
        return self._with(transform=augment, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that augmentation draws for; call it before iterating over a loader."""
        self._epoch = epoch

    def spaced(self, num_images: int) -> ImageSet:
        """Return at most `num_images` images, evenly spaced, so that a source sorted by class keeps all its classes."""
        size = min(num_images, len(self))
        return self.subset([i * len(self) // size for i in range(size)])

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at these positions, in this order."""
        return self._with(indices=[self._indices[i] for i in indices])

    def kinds(self) -> dict[str, int]:
        """Return how many images were of which mode, or `unreadable`, as far as they were read in this process."""
        return self._seen.counts(self._indices)

    def remarks(self) -> list[str]:
        """Return sentences on the source, and on images read in this process: left out, or of an unusual mode."""
        return [*self._seen.notes, *remarks(self.kinds(), self._seen.problem)]

    def tell(self, *more: str) -> None:
        """Log the remarks, where there is no result to note them in, and further ones."""
        for remark in (*self.remarks(), *more):
            LOG.warning("%s", remark)

    def loader(
        self, *, batch_size: int, indices: Sequence[int] | Sampler[int] | None = None, num_workers: int = 0
    ) -> DataLoader:
        """Return a loader of `Batch`, in the order of `indices` (default: all, in order).

        Corrupt images are left out and counted in `num_skipped`, so a batch may be smaller than `batch_size`.
        A batch without any readable image is not yielded: its count moves to the batch after it (or before,
        at the end). A loader rebuilt from the parts of this one (accelerate's `prepare`) yields such a batch
        as 0 images.
        """
        return _Loader(
            self,
            batch_size=batch_size,
            sampler=indices,
            num_workers=num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),  # else every pass would draw from the global generator
        )

    def _with(self, **changed: Any) -> ImageSet:
        same: dict[str, Any] = {"transform": self._transform, "indices": self._indices, "seed": self._seed}
        same |= {"numbers": self._numbers, "classes": self._classes}
        return ImageSet(self._rows, name=self.name, seen=self._seen, **{**same, **changed})

    def _load(self, index: int) -> tuple[Tensor, int]:
        image, label = self._rows.read(self._indices[index])
        self._seen.note(self._indices[index], kind_of(image))
        if self._numbers is not None and label >= 0:
            label = self._numbers[label] if self._numbers else -1
        return prepare(image, self._transform, name=self.name, seed=self._seed, epoch=self._epoch, index=index), label


def check_workers(num_workers: int) -> None:
    """Check that processes that decode images can hand them over: through a socket, whose path may not be long.

    Raises:
        DataError: the folder for temporary files has too long a path.
    """
    if num_workers and sys.platform != "win32":
        folder = os.fsencode(get_temp_dir())
        if len(folder) + len("/listener-01234567") > LONGEST_SOCKET:
            raise DataError(
                f"num_workers: {num_workers} processes need sockets in TMPDIR, and {os.fsdecode(folder)} is too long "
                f"for one (a socket's path has at most {LONGEST_SOCKET} bytes); set TMPDIR=/tmp, or num_workers to 0."
            )


def prepare(
    image: Any, transform: Transform | None, *, name: str, seed: int | None = None, epoch: int = 0, index: int = 0
) -> Tensor:
    """Apply a transform to an image, drawn under (seed, epoch, index); float tensors are only cast to float32.

    Raises:
        DataError: the image is neither a PIL image nor an array or tensor of the right kind.
        OSError, SyntaxError: the image is None or can't be read, or a value is not finite or absurdly large.
    """
    image = as_picture(image, f"{name}: item {index}")
    given = to_rgb(image) if isinstance(image, Image.Image) else image.value if isinstance(image, Raw) else None
    if given is not None:
        with _seeded(seed, epoch, index):
            image = (transform or _to_unit_range)(given)
    if not is_image(image):
        shape = getattr(image, "shape", None)
        got = type(image).__name__ if shape is None else f"{image.dtype} {tuple(shape)}"  # type: ignore[union-attr]
        raise DataError(
            f"{name}: item {index} is {got}; use PIL images, arrays of 8 or 16 bits, or float tensors (C, H, W) that "
            "are preprocessed already, or for a text encoder token ids (N,)."
        )
    check_pixels(numbers(image))
    return in_float32(image)  # in which all is computed


def collate(items: Sequence[tuple[Tensor, Any] | None]) -> Batch:
    """Stack the readable images and count the others; without any readable one the shape is (0, 3, 0, 0)."""
    readable = [item for item in items if item is not None]
    labels = [label for _, label in readable]
    stacked = bool(labels) and isinstance(labels[0], Tensor)  # joints
    labels_B = torch.stack(labels) if stacked else torch.tensor(labels, dtype=torch.int64)
    images_BCHW = _stack([image for image, _ in readable]) if readable else torch.empty(0, 3, 0, 0)
    places_B = torch.tensor([place for place, item in enumerate(items) if item is not None], dtype=torch.int64)
    return Batch(images_BCHW, labels_B, len(items) - len(readable), places_B)


def open_images(
    source: Any,
    *,
    transform: Transform | None = None,
    split: str | None = None,
    limit: int | None = None,
    default: str = "train",
) -> ImageSet:
    """Open any source of images as an `ImageSet`.

    Args:
        source: a folder of images (any depth; first-level sub-folders are classes if every image lies in one of
            two or more; those called train, val, test are splits), a `.parquet` file or a folder of them, `.tar` files
            (webdataset's shards: one, a folder, a list, or `{000..127}` in a name), a folder of `save_to_disk`, a
            `datasets.Dataset` or `DatasetDict`, a torch `Dataset` or `DataLoader`, "digits" (scikit-learn's 8x8
            digits), or any other iterable of tensors, PIL images or pairs with a label. A 4-d tensor is a batch.
        transform: function from a PIL image to a tensor (C, H, W); see `transform_for`.
        split: part to read of a source that has parts: "digits", `DatasetDict`, and folders whose folders, parquet
            files or shards are named after splits. Refused for a source that has none.
        limit: read only this many images: the first of an iterable, evenly spaced ones of anything else.
        default: part to read of a source that has parts where no split is given.

    Returns:
        The images. Plain iterables are collected in memory; everything else is read on access.

    Raises:
        DataError: the source is missing, empty or none of these kinds, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; use 1 or more, or None for all images.")
    if isinstance(source, ImageSet):
        Part(asked=split).without(source.name)
        images = source if transform is None else source.with_transform(transform)
    else:
        part = Part(asked=split, default=default)
        rows, name = open_rows(source, part=part, limit=limit)
        if not len(rows):
            raise DataError(f"{name}: no images found; {ALLOWED}.")
        notes = [*part.notes, *getattr(rows, "notes", ())]
        images = ImageSet(rows, name=name, transform=transform, seen=Seen(len(rows), notes))
    return images if limit is None else images.spaced(limit)


def first_images(image_set: ImageSet, num_images: int, *, seed: int, batch_size: int = 64) -> tuple[list[Tensor], int]:
    """Read images in a seeded random order, leaving out what can't be decoded.

    Args:
        image_set: set to draw from, without replacement.
        num_images: how many readable images to return; fewer if the set has fewer.
        seed: seed of the order.
        batch_size: images per returned batch (the last may be smaller).

    Returns:
        Batches (B, C, H, W), and how many unreadable images were left out.

    Raises:
        DataError: no image could be read.
    """
    order = torch.randperm(len(image_set), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[int, Tensor] = {}
    num_skipped = 0
    for index in order:
        if len(found) >= num_images:
            break
        item = image_set[index]
        if item is None:
            num_skipped += 1
        else:
            found[index] = item[0]
    for place, why in outlying(list(found.values())).items():
        image_set.leave_out(list(found)[place], why)
    images = [image for index, image in found.items() if not image_set.is_left_out(index)]
    num_skipped += len(found) - len(images)
    if not images:
        reason = image_set.problem(order[0]) if order else "the set is empty"
        raise DataError(f"{image_set.name}: none of {num_skipped} images could be read ({reason}); check the files.")
    return [_stack(images[i : i + batch_size]) for i in range(0, len(images), batch_size)], num_skipped


def split_indices(num_images: int, *, num_held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Split 0..num_images-1 at random into (rest, held out), both sorted, disjoint and fixed by the seed.

    Raises:
        DataError: `num_held_out` would leave nothing, or is negative.
    """
    if not 0 <= num_held_out < num_images:
        raise DataError(f"split: asked to hold out {num_held_out} of {num_images} images; use 0..{num_images - 1}.")
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


class _Loader(DataLoader):
    """A loader that leaves out batches without images and adds their count of corrupt images to a neighbour's."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        ready: Batch | None = None
        num_pending = 0
        for batch in super().__iter__():
            if not len(batch.images_BCHW):
                num_pending += batch.num_skipped
                continue
            if ready is not None:
                yield ready
            ready = batch._replace(num_skipped=batch.num_skipped + num_pending)
            num_pending = 0
        if ready is not None:
            yield ready._replace(num_skipped=ready.num_skipped + num_pending)


@contextmanager
def _seeded(seed: int | None, epoch: int, index: int) -> Iterator[None]:
    """Seed the global generators for one item, and restore them afterwards; with seed None leave them alone."""
    if seed is None:
        yield
        return
    digest = hashlib.blake2b(f"{seed},{epoch},{index}".encode(), digest_size=7).digest()
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "big"))  # torch.manual_seed would reseed CUDA too
        random.seed(digest)  # timm's own transforms draw from here
        try:
            yield
        finally:
            random.setstate(state)


def _to_unit_range(image: Image.Image) -> Tensor:
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image)


def _stack(images: Sequence[Tensor]) -> Tensor:
    shapes = sorted({() if is_named(image) else tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise DataError(
            f"a batch has images of shapes {shapes[0]} and {shapes[-1]}; pass transform=transform_for(model)."
        )
    return torch.stack(list(images))
