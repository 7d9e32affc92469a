"""The images of a folder with their classes, from one walk, by the rules of torchvision's ImageFolder.

Every first-level folder is a class and holds images at any depth; classes are numbered in the order of their names.
Hidden folders and files and `__MACOSX` are never looked at. Folders that are links are followed, but not in a circle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrim.data.parts import Part, level_of_parts, meaning_of
from vitrim.data.shards import IMAGE_SUFFIXES
from vitrim.errors import DataError

Folder = tuple[str, ...]
ENDINGS = ", ".join(sorted(IMAGE_SUFFIXES))


@dataclass(frozen=True, kw_only=True)
class Found:
    """Images of a folder, in order; the class of each and the names of the classes, both empty if there are none."""

    files: Sequence[Path]
    labels: Sequence[int] = ()
    classes: Sequence[str] = ()


def walk(root: Path) -> Iterator[tuple[Folder, list[Path]]]:
    """Yield each folder below a root, the root first, as the names that lead to it, with its files by name.

    Raises:
        DataError: a folder can't be listed.
    """
    yield from _walk(root, (), (os.path.realpath(root),))


def read_folder(root: Path, tree: Sequence[tuple[Folder, list[Path]]], part: Part) -> Found:
    """Return the images of a part of a folder, with classes where its folders are classes.

    Args:
        root: shown in errors and notes.
        tree: what `walk` found.
        part: the part to read, if the folder has parts.

    Raises:
        DataError: there is no image, no such part, or a class without images.
    """
    images = {folder: found for folder, files in tree if (found := [file for file in files if is_image(file)])}
    if not images:
        others = sorted({file.suffix.lower() for _, files in tree for file in files} - {""})
        seen = f" (but {', '.join(others[:5])})" if others else ""
        raise DataError(
            f"{root}: no images found{seen}; pass a folder of images ({ENDINGS}) or of .parquet or .tar files."
        )
    level = level_of_parts(images, str(root))
    if level is None:
        part.without(str(root))
        return _classified(root, [folder for folder, _ in tree], list(images.items()), part)
    names = {folder[level] for folder in images if len(folder) > level}
    chosen = part.pick({name for name in names if meaning_of(name)}, str(root))
    outside = sum(len(files) for folder, files in images.items() if not (folder[level:] and meaning_of(folder[level])))
    if outside:
        part.notes.append(f"{root}: {outside:,} images outside of its splits are left out.")
    mine = [folder for folder, _ in tree if len(folder) > level and folder[level] in chosen]
    inner = {folder: folder[:level] + folder[level + 1 :] for folder in mine}
    return _classified(root, list(inner.values()), [(inner[f], images[f]) for f in mine if f in images], part)


def is_image(file: Path) -> bool:
    """Whether a file's name ends as an image's does."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def _classified(
    root: Path, folders: Sequence[Folder], images: Sequence[tuple[Folder, list[Path]]], part: Part
) -> Found:
    """Number the classes, if every image lies in one of two or more first-level folders."""
    by_class: dict[str, list[Path]] = {folder[0]: [] for folder in sorted(folders) if folder}
    loose: list[Path] = []
    for folder, files in images:
        (by_class[folder[0]] if folder else loose).extend(files)
    if loose or len(by_class) < 2:
        if by_class:
            why = "images lie beside its folders" if loose else "its images lie in one folder"
            part.notes.append(f"{root}: {why}, so folders are no classes and there are no labels.")
        return Found(files=sorted([*loose, *(file for files in by_class.values() for file in files)], key=_order))
    empty = [name for name, files in by_class.items() if not files]
    if empty:
        raise DataError(
            f"{root}: every folder is a class, and {', '.join(map(repr, empty[:3]))} holds no image that ends in "
            f"{ENDINGS}; move it elsewhere, or pass the folder of the images."
        )
    labels = [label for label, files in enumerate(by_class.values()) for _ in files]
    ordered = [file for files in by_class.values() for file in sorted(files, key=_order)]
    return Found(files=ordered, labels=labels, classes=tuple(by_class))


def _order(file: Path) -> tuple[str, str]:
    return str(file.parent), file.name


def _walk(folder: Path, names: Folder, above: tuple[str, ...]) -> Iterator[tuple[Folder, list[Path]]]:
    """Walk a folder; `above` are the real places of the folders that lead to it."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: can't be listed ({error.strerror}); make it readable, or move it.") from None
    seen = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    inner = [entry for entry in seen if entry.is_dir()]
    # A link that leads nowhere is listed as the image that it should be, to be counted as unreadable.
    yield names, [folder / entry.name for entry in seen if entry.is_file() or not Path(entry).exists()]
    for entry in inner:
        place = os.path.realpath(entry.path)
        if place not in above:
            yield from _walk(folder / entry.name, (*names, entry.name), (*above, place))
