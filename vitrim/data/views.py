"""Random views of calibration images: a fit on few images generalises better if it has seen them in several ways."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitrim.errors import DataError

# A view shows this part of an image's area at least, at an aspect ratio of at most 4:3 either way.
LEAST_AREA, MOST_ASPECT = 0.35, 4 / 3
# Views of each image at most, where nobody asked for a number.
MOST_VIEWS = 4


def fitting_views(num_images: int, num_units: int) -> int:
    """Return how many views of each image a fit of so many hidden units wants: few images are seen in several ways."""
    return max(1, min(MOST_VIEWS, math.ceil(num_units / max(1, num_images))))


def are_images(batch: Tensor) -> bool:
    """Return whether inputs can be cropped and mirrored."""
    return batch.ndim == 4 and batch.is_floating_point()


def with_views(batches: Sequence[Tensor], num_views: int, *, seed: int) -> list[Tensor]:
    """Return the batches with more views of each image beside it, in the same batch.

    So the images of some batches and their views can be held out from those of others. A view is a random crop of the
    preprocessed image, scaled to its size again, and mirrored half of the time; the image itself is the first.

    Args:
        batches: preprocessed images (B, C, H, W).
        num_views: views of each image, itself included.
        seed: of the crops.

    Raises:
        DataError: these are no images.
    """
    if num_views == 1:
        return list(batches)
    if not are_images(batches[0]):
        shape = tuple(batches[0].shape[1:]) if isinstance(batches[0], Tensor) else "named tensors"
        raise DataError(f"calibrate.views: {num_views} views are of images (C, H, W), and an input is {shape}; use 1.")
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.cat([batch, *(_view(image, generator)[None] for _ in range(num_views - 1) for image in batch)])
        for batch in batches
    ]


def _view(image_CHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random crop of an image at the image's size."""
    from torchvision.transforms.v2.functional import InterpolationMode, horizontal_flip, resized_crop

    height, width = image_CHW.shape[-2:]
    area, tilt, place, other, mirrored = torch.rand(5, generator=generator).tolist()
    side = math.sqrt(LEAST_AREA + (1 - LEAST_AREA) * area)
    aspect = MOST_ASPECT ** (tilt - 0.5)
    high, wide = (
        max(1, min(full, round(full * part))) for full, part in ((height, side * aspect), (width, side / aspect))
    )
    top, left = int(place * (height - high + 1)), int(other * (width - wide + 1))
    bicubic = InterpolationMode.BICUBIC
    view = resized_crop(image_CHW, top, left, high, wide, [height, width], interpolation=bicubic, antialias=True)
    return horizontal_flip(view) if mirrored < 0.5 else view
