"""Fits the labels of images to the classes of a model's head, by name or by number."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vitrim.data.images import Batch, ImageSet
from vitrim.data.labels import Classes
from vitrim.errors import DataError
from vitrim.models.features import class_names, num_classes


def match_labels(images: ImageSet, model: nn.Module) -> tuple[ImageSet, bool, str | None]:
    """Call the classes of images as a model's head does: by name, or as they are where both have as many.

    Numbers are also those of the head of a model of vitrim's own, which has one task, where there are fewer.

    Returns:
        The images, whether their labels are those of the head, and a note if they are not.
    """
    size, mine, theirs = num_classes(model), images.classes, class_names(model)
    if not size:
        return images, False, None
    if mine is None:
        return images, False, f"{images.name}: has no labels, so top-1 is not measured."
    if mine.names and set(mine.names) <= set(theirs):
        return _by_name(images, mine.names, theirs), True, None
    fewer = hasattr(model, "vitrim_model") and not mine.names and mine.count is not None and mine.count < size
    if fewer or (mine.count == size and not set(mine.names) & set(theirs)):
        return images, True, None
    head = Classes(count=size, names=theirs).words
    note = f"{images.name}: has {mine.words}, the model's head {head}, so top-1 is not measured."
    return images, False, note


def check_numbers(images: ImageSet, batches: Sequence[Batch], model: nn.Module) -> None:
    """Check that class numbers without names are those of a model's head, where they seem to be meant for it.

    Where half of the labelled images or more are of no class of a foreign model's head, they are of another data set,
    on which its features can be judged all the same.

    Args:
        images: where they are from.
        batches: all of them.
        model: may have no head; then any number will do.

    Raises:
        DataError: a number is outside of the head's classes.
    """
    size, own = num_classes(model), hasattr(model, "vitrim_model")
    known = [label for batch in batches for label in batch.labels_B.tolist() if label >= 0]
    outside = [label for label in known if label >= size]
    if not size or not outside or (images.classes is not None and images.classes.names):
        return
    if not own and 2 * len(outside) >= len(known):
        return
    found = sorted(set(outside))
    shown = ("label " if len(found) == 1 else "labels ") + ", ".join(map(str, found[:3])) + ", ..." * (len(found) > 3)
    hint = "" if own else ", or text as labels if they are other classes, to judge features alone"
    raise DataError(
        f"{images.name}: {shown} ({len(outside):,} of {len(known):,} images), but the model's head has {size} classes; "
        f"use 0..{size - 1}{hint}."
    )


def match_names(images: ImageSet, names: Sequence[str]) -> ImageSet:
    """Call the classes of images by their places in a list of names; as they are if their own names are others.

    Raises:
        DataError: the images have other names, and not as many.
    """
    mine = images.classes
    if mine is None or not mine.names:
        return images
    if set(mine.names) <= set(names):
        return _by_name(images, mine.names, tuple(names))
    if len(mine.names) != len(names):
        given = Classes(count=len(names), names=tuple(names)).words
        raise DataError(f"{images.name}: has {mine.words}, and the names given are {given}; give one for each class.")
    return images


def _by_name(images: ImageSet, mine: Sequence[str], theirs: tuple[str, ...]) -> ImageSet:
    numbers = [theirs.index(name) for name in mine]
    return images.relabelled(numbers, Classes(count=len(theirs), names=theirs))
