"""The parts of a data set (training, validation, test): which names mean them, and which one is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrim.errors import DataError

MEANS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Of a folder's whole name, so that classes such as "test tube" are none: train, train2017, train_images, img-val.
NAMED = re.compile(rf"(images?[-_ ]|img[-_ ])?({'|'.join(MEANS)})([-_ ]?\d+|[-_ ](images?|imgs?|set|data))?")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a source to read.

    Args:
        asked: what the user asked for; None for nothing.
        default: what is read where nothing was asked for; where there is no "test", "val" stands in.
        notes: what was chosen, for the user.
    """

    asked: str | None = None
    default: str = "train"
    notes: list[str] = field(default_factory=list)

    def pick(self, names: Iterable[str], where: str) -> set[str]:
        """Return the names that are this part: the one that is called so, or those that mean the same.

        Raises:
            DataError: none does.
        """
        names = sorted(set(names))
        for word in [self.asked] if self.asked else [self.default, *(["val"] if self.default == "test" else [])]:
            chosen = {name for name in names if name == word} or {
                name for name in names if meaning_of(name) is not None and meaning_of(name) == meaning_of(word)
            }
            if chosen:
                read = "this one" if len(names) == 1 else " and ".join(sorted(chosen))
                self.notes.append(f"{where}: has splits {', '.join(names)}; {read} is read.")
                return chosen
        word = self.asked or self.default
        raise DataError(f"{where}: no split {word!r}; use one of {names}, or pass one part alone.")

    def without(self, where: str) -> None:
        """Refuse a part that was asked for, of a source that has none.

        Raises:
            DataError: one was.
        """
        if self.asked is not None:
            raise DataError(f"{where}: has no splits, so not {self.asked!r} either; leave out split.")

    def of_dataset(self, dataset: Any, where: str) -> Any:
        """Return this part of a Hugging Face set; the set itself if it has no parts."""
        if isinstance(dataset, Mapping):
            chosen = self.pick(dataset, where)
            if len(chosen) > 1:
                raise DataError(f"{where}: several splits mean the same; use one of {sorted(chosen)}.")
            return dataset[chosen.pop()]
        if str(getattr(dataset, "split", None)) != self.asked:
            self.without(where)
        return dataset

    def of_files(self, files: Sequence[Path], root: Path) -> Sequence[Path]:
        """Return the files with this part's name as a word of their path; all of them if no path names any part."""
        words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(root)).lower())) & MEANS.keys() for file in files}
        names: set[str] = set().union(*words.values())
        if not names:
            self.without(str(root))
            return files
        chosen = self.pick(names, f"{root}: {files[0].suffix[1:]} files")
        return [file for file in files if words[file] & chosen]


def meaning_of(name: str | None) -> str | None:
    """Return "train", "val" or "test" for a name that means it; None for others."""
    found = NAMED.fullmatch((name or "").lower())
    return MEANS[found[2]] if found else None


def level_of_parts(folders: Collection[tuple[str, ...]], where: str) -> int | None:
    """Return how deep the folders lie that are parts; None if none are.

    Names of parts are taken for such where they stand for two parts or more (`train/ val/`, `cat/train cat/test`), or
    where one stands alone.

    Args:
        folders: for each image, the names of the folders that it lies in, from the first.
        where: shown in errors.

    Raises:
        DataError: some images lie in such folders and others don't, below the first level.
    """
    for level in range(max(map(len, folders), default=0)):
        names = {path[level] if len(path) > level else "" for path in folders}
        found = {name for name in names if meaning_of(name)}
        meant = {meaning_of(name) for name in found}
        if len(meant) < 2 and not (level == 0 and names == found):
            continue
        if level and names != found:
            raise DataError(
                f"{where}: some images lie in folders named {', '.join(sorted(found))}, others beside them; pass the "
                "folder that is meant."
            )
        return level
    return None
