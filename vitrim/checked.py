"""Base class of everything that a user fills in: frozen, strict about keys, and with errors in one line of our own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

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

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, given: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would turn into another type: text into numbers, numbers into true and false."""
        _check_kind(given, cls.model_fields[str(info.field_name)].annotation)
        return given

    @classmethod
    def refusal(cls, error: ValidationError) -> str:
        """Return an error text: what is wrong with the constructor's arguments, in one line."""
        return f"{cls.__name__}: {explain(error, cls)}"

    @classmethod
    def keys(cls) -> list[str]:
        """Return every allowed key, nested ones dotted."""
        return known_keys(cls)


def _check_kind(given: Any, annotation: Any) -> None:
    """Refuse text where a number or true and false are wanted, and one of these in place of the other.

    Raises:
        ValueError: it is refused.
    """
    kinds = list(_alternatives(annotation))
    if isinstance(given, Mapping | list | tuple):
        items = given.values() if isinstance(given, Mapping) else given
        for inner in [get_args(kind)[-1 if isinstance(given, Mapping) else 0] for kind in kinds if get_args(kind)]:
            for item in items:
                _check_kind(item, inner)
        return
    numbers, truths = int in kinds or float in kinds, bool in kinds
    is_truth, is_text = isinstance(given, bool), isinstance(given, str)
    if not (numbers or truths) or (is_text and not {str, Literal}.isdisjoint({*kinds, *map(get_origin, kinds)})):
        return
    if is_text or (is_truth and not truths) or (isinstance(given, int | float) and not is_truth and not numbers):
        plain = ", without quotes and in decimal digits" if is_text else ""
        raise ValueError("give true or false" if truths and not numbers else f"give a number{plain}")


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types of which an annotation allows one."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        parts = get_args(annotation)
        for part in parts[:1] if get_origin(annotation) is Annotated else parts:
            yield from _alternatives(part)
    else:
        yield annotation


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
