"""The base of everything a user fills in: frozen, unknown keys refused, and what is wrong said in one of our errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vitrim.errors import RecipeError


class NotGiven(Enum):
    """Stands for an argument that was not given, where None would be an answer of its own."""

    NOT_GIVEN = "not given"

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN = NotGiven.NOT_GIVEN

if TYPE_CHECKING:
    _Checking = type(BaseModel)
else:

    class _Checking(type(BaseModel)):
        """Lets a constructor raise `RecipeError`; values nested in another are explained by the outermost."""

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise RecipeError(cls.refusal(error)) from None


class Checked(BaseModel, metaclass=_Checking):
    """A frozen value made of checked fields; numbers are finite and an unknown key is an error.

    Raises:
        RecipeError: a key is unknown, with the nearest known one, or a value is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def refusal(cls, error: ValidationError) -> str:
        """Say in one line what is wrong with what the constructor was given."""
        return f"{cls.__name__}: {explain(error, cls)}"

    @classmethod
    def keys(cls) -> list[str]:
        """Return every key that may be given, nested ones dotted."""
        return known_keys(cls)


def explain(error: ValidationError, kind: type[Checked]) -> str:
    """Say in one line what is wrong first, with the nearest known key for an unknown one.

    Args:
        error: what pydantic raised.
        kind: the class that was to be made.
    """
    first = error.errors()[0]
    path = path_of(first)
    if first["type"] == "extra_forbidden":
        return _unknown(path, kind.keys())
    said = str(first["msg"]).removeprefix("Value error, ")
    if isinstance(first["input"], Mapping):  # several keys that don't go together: the message names them
        return f"{path}: {said}" if path else said
    said = f"{said} (got {first['input']!r:.80})"
    return f"{path}: {said}" if path else said


def _unknown(path: str, keys: list[str]) -> str:
    """Say which key was meant, or which there are beside it."""
    where = re.sub(r"^steps\.\d+\.", "", path)
    close = difflib.get_close_matches(where, keys, n=1, cutoff=0.6)
    if close:
        return f"unknown key {path!r}; did you mean {close[0]!r}?"
    level = where.rpartition(".")[0]
    beside = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == level]
    return f"unknown key {path!r}; known: {', '.join(beside or keys)}."


def path_of(error: Mapping[str, Any]) -> str:
    """Return the dotted path of a key in what the user wrote.

    Classes that were tried one after the other are left out, and so is the first step, whose keys may stand outside.
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
    """Yield the option classes in an annotation such as `A | bool | None`; members of a sequence are not named."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif getattr(annotation, "__origin__", None) not in (tuple, list):
        for part in get_args(annotation):
            yield from _classes(part)
