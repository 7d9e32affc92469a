"""Checks that preprocessed images can be computed with: finite, and of a size that sums can hold.

No bound is a guessed scale: one follows from what float32 can square, the other from the other images.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitrim.errors import DataError
from vitrim.inputs import in_float32, is_named, numbers

log = logging.getLogger("vitrim")
# Norms and sums square what comes in, so a larger value is an infinity a few operations later.
LARGEST = torch.finfo(torch.float32).max ** 0.5
# Beside an image this many times as large, what float32 holds of the others is rounding error.
RATIO = 1 / torch.finfo(torch.float32).eps


def check_pixels(image: Tensor) -> None:
    """Check that a preprocessed image is finite and holds no value that float32 can't square.

    Raises:
        OSError: it does; the message names the first such value and its place.
    """
    if not image.is_floating_point():
        return
    bad = ~torch.isfinite(image)
    if torch.finfo(image.dtype).max > LARGEST:
        bad |= image.abs() > LARGEST
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        raise OSError(f"holds {float(image[place]):g} at {place}, and {int(bad.sum()):,} such values in all")


def outlying(images: Sequence[Tensor]) -> dict[int, str]:
    """Return which images are so large that others vanish beside them in sums, and why; by position.

    An image is if its largest value is over 8 million times the median of the images' largest values.
    """
    if len(images) < 2 or not all(image.is_floating_point() and numbers(image).numel() for image in images):
        return {}
    largest_N = torch.stack([numbers(image).abs().max().double().cpu() for image in images])
    usual = float(largest_N.median())
    if usual == 0:
        return {}
    return {
        place: f"reaches {float(largest_N[place]):g}, where the images' largest values have a median of {usual:g}"
        for place in (largest_N > RATIO * usual).nonzero()[:, 0].tolist()
    }


def usable(batches: Sequence[Tensor], name: str) -> list[Tensor]:
    """Return batches in float32 without the images that can't be computed with, and log which ones those are.

    Args:
        batches: preprocessed images (B, C, H, W), or token ids (B, N).
        name: who asks, for the messages.

    Raises:
        DataError: there are no batches, one is of another kind, or no image is left.
    """
    batches = [_in_float32(batch, f"{name}: batch {number}") for number, batch in enumerate(batches)]
    images = [(number, place, image) for number, batch in enumerate(batches) for place, image in enumerate(batch)]
    wrong: dict[int, str] = {}
    for at, (_, _, image) in enumerate(images):
        try:
            check_pixels(image)
        except OSError as error:
            wrong[at] = str(error)
    good = [at for at in range(len(images)) if at not in wrong]
    wrong |= {good[place]: why for place, why in outlying([images[at][2] for at in good]).items()}
    if not images:
        raise DataError(f"{name}: there are no images; pass some, or None to go by the weights alone.")
    if not wrong:
        return _said_distinct(batches, name)
    first = min(wrong)
    said = f"image {images[first][1]} of batch {images[first][0]} {wrong[first]}"
    if len(wrong) == len(images):
        raise DataError(f"{name}: none of {len(images)} images can be used; {said}.")
    log.warning("%s: %d of %d images were left out; the first: %s.", name, len(wrong), len(images), said)
    kept = [
        [image for at, (of, _, image) in enumerate(images) if of == number and at not in wrong]
        for number in range(len(batches))
    ]
    return _said_distinct([torch.stack(part) for part in kept if part], name)


def _in_float32(batch: Any, where: str) -> Tensor:
    """Return images in float32, and token ids as they are; what float32 can't hold becomes infinite."""
    is_batch = isinstance(batch, Tensor) and batch.ndim == (4 if batch.is_floating_point() else 2)
    if is_batch or is_named(batch):
        return in_float32(batch)
    got = f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}" if isinstance(batch, Tensor) else None
    raise DataError(
        f"{where} is {got or type(batch).__name__}; pass a list of preprocessed images as float tensors (B, C, H, W), "
        "or of token ids (B, N), or as vitrim.Inputs."
    )


def _said_distinct(batches: Sequence[Tensor], name: str) -> list[Tensor]:
    """Return batches without exact copies, and log how many there were."""
    new, num_repeated = distinct(batches)
    if num_repeated:
        log.warning("%s: %d images are exact copies of others and were left out.", name, num_repeated)
    return new


def distinct(batches: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Return batches without images that are exact copies of an earlier one, and how many those were."""
    seen: set[bytes] = set()
    images = [image for batch in batches for image in batch]
    new = [image for image in images if not ((key := digest(image)) in seen or seen.add(key))]
    if len(new) == len(images):
        return list(batches), 0
    size = len(batches[0])
    return [torch.stack(new[i : i + size]) for i in range(0, len(new), size)], len(images) - len(new)


def digest(image: Tensor) -> bytes:
    """Return a hash of an image's values."""
    flat = numbers(image).detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
