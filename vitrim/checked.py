"""Base class of everything that a user fills in: frozen, strict about keys, and with errors in one line of our own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vitrim.errors import RecipeError


class NotGiven(Enum):
    """Type of a marker for arguments that were not given, where None is a valid value."""

    NOT_GIVEN = "not given"

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN = NotGiven.NOT_GIVEN

if TYPE_CHECKING:
    _Checking = type(BaseModel)
else:

    class _Checking(type(BaseModel)):
        """Metaclass whose constructor raises `RecipeError`; errors in nested values are explained by the outermost."""

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise RecipeError(cls.refusal(error)) from None


class Checked(BaseModel, metaclass=_Checking):
    """A frozen value made of checked fields; numbers must be finite, and an unknown key is an error.

    Raises:
        RecipeError: a key is unknown (the nearest known one is named), or a value is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def refusal(cls, error: ValidationError) -> str:
        """Return an error text: what is wrong with the constructor's arguments, in one line."""
        return f"{cls.__name__}: {explain(error, cls)}"

    @classmethod
    def keys(cls) -> list[str]:
        """Return every allowed key, nested ones dotted."""
        return known_keys(cls)


def explain(error: ValidationError, kind: type[Checked]) -> str:
    """Return a description of the first error in one line, with the nearest known key for an unknown one.

    Args:
        error: the error that pydantic raised.
        kind: the class that was constructed.
    """
    first = error.errors()[0]
    path = path_of(first)
    if first["type"] == "extra_forbidden":
        return _unknown(path, kind.keys())
    said = str(first["msg"]).removeprefix("Value error, ")
    if isinstance(first["input"], Mapping):  # several keys that contradict each other: the message names them
        return f"{path}: {said}" if path else said
    said = f"{said} (got {first['input']!r:.80})"
    return f"{path}: {said}" if path else said


def _unknown(path: str, keys: list[str]) -> str:
    """Return an error text that names the key that was probably meant, or those that exist at that level."""
    where = re.sub(r"^steps\.\d+\.", "", path)
    close = difflib.get_close_matches(where, keys, n=1, cutoff=0.6)
    if close:
        return f"unknown key {path!r}; did you mean {close[0]!r}?"
    level = where.rpartition(".")[0]
    beside = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == level]
    return f"unknown key {path!r}; known: {', '.join(beside or keys)}."


def path_of(error: Mapping[str, Any]) -> str:
    """Return the dotted path of a key as the user wrote it.

    Names of alternative classes are left out, and so is the first step, whose keys may be given at the top level.
    """
    path = ".".join(str(part) for part in error["loc"] if not str(part)[:1].isupper())
    return re.sub(r"^steps\.0(\.|$)", "", path)


def known_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every key of a class, nested ones dotted."""
    keys = [f"{prefix}{name}" for name in kind.model_fields]
    for name, field in kind.model_fields.items():
        for part in _classes(field.annotation):
            keys += known_keys(part, f"{prefix}{name}.")
    return keys


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the option classes in an annotation such as `A | bool | None`, but not the members of a sequence."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif getattr(annotation, "__origin__", None) not in (tuple, list):
        for part in get_args(annotation):
            yield from _classes(part)
