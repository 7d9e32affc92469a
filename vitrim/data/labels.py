"""Labels as class numbers: whole numbers as they are, names in sorted order; anything else is no label, or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vitrim.errors import DataError

MAX_LABEL = 2**31


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The label space of a source: how many classes (None where that can't be told), and their names where known."""

    count: int | None
    names: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What the classes are, for messages."""
        if self.names:
            shown = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
            return f"{len(self.names)} classes ({shown})"
        return "class numbers without names" if self.count is None else f"classes 0 to {self.count - 1}"


def number_labels(values: Sequence[Any], where: str, names: Sequence[str] = ()) -> tuple[Sequence[int], Classes | None]:
    """Return a class number for each value, -1 where there is none, and the classes; None if no value is a label.

    Args:
        values: labels of all images of a source, in order.
        where: shown in errors.
        names: of the classes, where the source says them; else text is numbered in sorted order.

    Raises:
        DataError: a label is neither a whole number nor text, or some are numbers and others text.
    """
    found = [plain_label(value, where) for value in values]
    texts = {label for label in found if isinstance(label, str)}
    numbers = {label for label in found if isinstance(label, int)}
    if texts and numbers:
        got = f"some labels are numbers ({min(numbers)}), others text ({min(texts)!r})"
        raise DataError(f"{where}: {got}; use one kind.")
    if not texts and not numbers:
        return [-1] * len(found), None
    known = tuple(names if names and texts <= set(names) else sorted(texts))
    if numbers and known and max(numbers) >= len(known):
        raise DataError(f"{where}: label {max(numbers)} with {len(known)} names of classes; number from 0.")
    code: dict[Any, int] = {name: number for number, name in enumerate(known)} if texts else {n: n for n in numbers}
    classes = Classes(count=len(known) or max(numbers, default=0) + 1, names=known)
    return [code.get(label, -1) for label in found], classes


def plain_label(value: Any, where: str) -> int | str | None:
    """Return a label as a number or text; None for what is no label (nothing, a negative number, a list, a dict).

    Raises:
        DataError: it is a bool, or a float without integer value.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return plain_label(value.item(), where)
    if isinstance(value, bool):
        raise DataError(f"{where}: labels are bools; use class numbers, or text.")
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"{where}: label {value} is no class number; use whole numbers, or text.")
        value = int(value)
    if isinstance(value, str):
        return value
    return value if isinstance(value, int) and 0 <= value < MAX_LABEL else None


def names_in_schema(schema: Any, column: str) -> tuple[str, ...]:
    """Return the names of classes that `datasets` has written into an arrow schema; () if there are none."""
    try:
        said = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
        return tuple(said) if all(isinstance(name, str) for name in said) else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
