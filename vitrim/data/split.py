"""Divide images by purpose: for training, for calibration (selection and repair), and held out for judging.

From a stream, the calibration and held-out images are its first ones, kept in memory; the held-out ones are skipped
whenever the stream reaches them again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.config.options import CalibrateOptions
from vitrim.config.recipe import Recipe
from vitrim.data.decode import UNREADABLE
from vitrim.data.images import Batch, ImageSet, first_images, split_indices
from vitrim.data.match import match_labels
from vitrim.data.pixels import digest, distinct
from vitrim.data.streams import ImageStream, Place
from vitrim.data.views import are_images, fitting_views, with_views
from vitrim.errors import DataError

# A tenth of the images, at most this many, is held out to judge on and is in nothing else.
MAX_HELD_OUT = 512


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images by purpose; `counts` says how many of each, None for the training images of a stream.

    Images that are exact copies of others are left out of the calibration images, and copies of those out of the
    held-out ones; with none left, nothing can be judged. In `counts`, `modes` are those of the calibration and held-out
    images; `notes` are on the same. `judged` is the source of the held-out images, copies included.
    """

    train: ImageSet | ImageStream
    calibration: list[Tensor]
    held_out: list[Batch]
    counts: dict[str, Any]
    notes: tuple[str, ...] = ()
    judged: ImageSet | None = None

    @property
    def sample(self) -> Tensor:
        """A batch of images to run, time and show: held-out ones if there are any."""
        return self.held_out[0].images_BCHW if self.held_out else self.calibration[0]


def split_images(
    source: ImageSet | ImageStream,
    recipe: Recipe,
    *,
    work: Path | None = None,
    model: nn.Module | None = None,
    num_units: int = 0,
) -> Split:
    """Hold some images out, and draw the calibration images from the rest.

    Args:
        source: all images.
        recipe: holds the number of calibration images, the batch size and the seed.
        work: folder of a run that can be resumed, for the sizes of a stream's shards.
        model: labels are numbered as its head does, and dropped if they can't be; None leaves them as they are.
        num_units: hidden units of the widest MLP that will be fitted, for how many views of few images are drawn.

    Raises:
        DataError: there are no images, or no held-out image could be read.
    """
    if isinstance(source, ImageSet):
        return _split(*_labelled(source, model), source, recipe, num_units)
    if work is not None:  # each process reads shards of its own
        source = source.remembering(work / f"shards-{os.environ.get('RANK', '0')}.jsonl")
    images, places = source.take(recipe.calibrate.num_images + MAX_HELD_OUT, seed=recipe.seed)
    return _split(*_labelled(images, model), source, recipe, num_units, places)


def _labelled(images: ImageSet, model: nn.Module | None) -> tuple[ImageSet, list[str]]:
    """Number the labels as a model's head does, or drop them; return notes on why."""
    if model is None:
        return images, []
    matched, fits, note = match_labels(images, model)
    return matched if fits else images.relabelled((), None), [] if note is None else [note]


def _split(
    images: ImageSet,
    notes: Sequence[str],
    source: ImageSet | ImageStream,
    recipe: Recipe,
    num_units: int,
    places: Sequence[Place] = (),
) -> Split:
    num_held_out = min(MAX_HELD_OUT, len(images) // 10) or min(1, len(images) - 1)
    rest, held = split_indices(len(images), num_held_out=num_held_out, seed=recipe.seed)
    train, options = images.subset(rest), recipe.calibrate
    drawn = draw_calibration(train, options, recipe.seed, num_units)
    judged = images.subset(held) if held else None
    loader = [] if judged is None else judged.loader(batch_size=options.batch_size)
    read = [batch for batch in loader if len(batch.images_BCHW)]
    if held and not read:
        raise DataError(f"{images.name}: none of the {len(held)} held-out images could be read; check the files.")
    held_out = _without_copies(read, drawn.images)
    counts: dict[str, Any] = {
        "train": len(train) if isinstance(source, ImageSet) else None,
        **drawn.counts(),
        "held_out": _num_images(held_out),
        "skipped": drawn.num_skipped + sum(batch.num_skipped for batch in read),
    }
    modes = {kind: count for kind, count in images.kinds().items() if kind != UNREADABLE}
    if modes:
        counts["modes"] = modes
    remaining = train if isinstance(source, ImageSet) else source.without([places[i] for i in held])
    said = [*images.remarks(), *notes, *on_copies(drawn.num_repeated, _num_images(read) - _num_images(held_out))]
    if not held_out:
        said.append(
            "quality was not measured: no image differs from those used for calibration; pass more images, of which "
            "a tenth is held out to judge on."
        )
    known: dict[str, Any] = {"counts": counts, "notes": tuple(said), "judged": judged}
    return Split(train=remaining, calibration=drawn.batches, held_out=held_out, **known)


class Calibration(NamedTuple):
    """Calibration images: batches to run, the images alone, views of each, and how many were unreadable or copies."""

    batches: list[Tensor]
    images: list[Tensor]
    num_views: int
    num_skipped: int
    num_repeated: int

    def counts(self) -> dict[str, int]:
        """Return how many images there are, and views of each where it is not the image alone."""
        found = {"calibration": sum(map(len, self.images))}
        return {**found, "views": self.num_views} if self.num_views > 1 else found


def draw_calibration(images: ImageSet, options: CalibrateOptions, seed: int, num_units: int = 0) -> Calibration:
    """Draw images to calibrate on, without exact copies, and further views of each beside it.

    Args:
        images: set to draw from.
        options: how many images, views and images in a batch.
        seed: of the order and of the crops.
        num_units: hidden units of the widest MLP that will be fitted, which decide on the views if the options don't.

    Raises:
        DataError: no image could be read, or what was read has no views.
    """
    num_views = options.views or fitting_views(min(len(images), options.num_images), num_units)
    size = max(1, options.batch_size // num_views)
    found, num_skipped = first_images(images, options.num_images, seed=seed, batch_size=size)
    alone, num_repeated = distinct(found)
    if options.views is None and not are_images(alone[0]):
        num_views = 1
    return Calibration(with_views(alone, num_views, seed=seed), alone, num_views, num_skipped, num_repeated)


def _without_copies(held_out: Sequence[Batch], calibration: Sequence[Tensor]) -> list[Batch]:
    """Return the batches without images that are exact copies of a calibration image, on which any fit looks good."""
    known = {digest(image) for batch in calibration for image in batch}
    kept = []
    for batch in held_out:
        new = torch.tensor([digest(image) not in known for image in batch.images_BCHW])
        if bool(new.all()):
            kept.append(batch)
        elif bool(new.any()):
            parts = {name: getattr(batch, name)[new] for name in ("images_BCHW", "labels_B", "places_B")}
            kept.append(batch._replace(**parts))
    return kept


def _num_images(batches: Sequence[Batch]) -> int:
    return sum(len(batch.images_BCHW) for batch in batches)


def on_copies(num_repeated: int, num_held_out: int) -> list[str]:
    """Return notes on images that are exact copies of others."""
    said = []
    if num_repeated:
        said.append(f"{num_repeated:,} calibration images are exact copies of others and were left out.")
    if num_held_out:
        said.append(f"{num_held_out:,} held-out images are exact copies of calibration images and were left out.")
    return said
