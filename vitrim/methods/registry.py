"""What a method is, and the list of all. A method is a class: its options are fields, and one function decides.

There are two kinds. A `SiteMethod` is asked about one MLP after the other: which hidden units stay. A `ModelMethod` is
asked about the whole model, and hands out edits of any kind.
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from vitrim.errors import RecipeError
from vitrim.surgery import Edit, KeepUnits
from vitrim.types import ModelView, SiteView

Needs = Literal["weights", "images"]
Takes = Literal["widths", "share", "nothing"]


class Method(BaseModel):
    """Base of both kinds of method. The fields of a method are its options; it is frozen, so it can be shared.

    What is true of every instance stands on the class, and is no option. `vitrim.catalog` reads it from the source, so
    a method writes it out as plain literals.

    Raises:
        RecipeError: an option is unknown or has a value that is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    name: ClassVar[str]
    """What recipes and the command line call it."""
    paper: ClassVar[str]
    """Title of the paper that it comes from."""
    arxiv: ClassVar[str]
    """Number of that paper on arXiv."""
    summary: ClassVar[str]
    """What it does, in a line of `vitrim methods`."""
    needs: ClassVar[Needs]
    """Whether it looks at calibration images, or at weights alone."""
    takes: ClassVar[Takes]
    """What of a budget it goes by: the width of each MLP, the share that stays of something else, or nothing."""
    repairs: ClassVar[bool] = False
    """Whether the closed-form repair follows if a recipe does not say; not where a paper's own procedure has none."""
    edits: ClassVar[tuple[type[Edit], ...]] = (KeepUnits,)
    """The kinds of edit that it makes."""

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise RecipeError(self._explain(error)) from None

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        """The first thing that is wrong with some options, as one line."""
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(cls.model_fields) or "none"
        return f"options.{key} of method {cls.name}: {first['msg']}; its options are {allowed}."

    @classmethod
    def edits_in_words(cls) -> str:
        """The kinds of edit that it makes, for tables and messages."""
        return ", ".join(kind.KIND.replace("_", " ") for kind in cls.edits)

    @classmethod
    def lowest_order(cls) -> int:
        """The lowest ORDER of its edits: no method of a higher one may come before it."""
        return min(kind.ORDER for kind in cls.edits)

    @classmethod
    def highest_order(cls) -> int:
        """The highest ORDER of its edits: no method of a lower one may come after it."""
        return max(kind.ORDER for kind in cls.edits)


class SiteMethod(Method):
    """A method that decides about one MLP at a time, with all MLPs before it already cut."""

    takes: ClassVar[Takes] = "widths"

    @abstractmethod
    def select(self, view: SiteView) -> Tensor:
        """Choose the hidden units that stay.

        Args:
            view: the MLP's weights, how many units are to stay, and where images are looked at its sums over them.

        Returns:
            int64 indices on the CPU, `view.num_keep` different ones, the best first where there is an order.
        """


class ModelMethod(Method):
    """A method that decides about a whole model."""

    @abstractmethod
    def propose(self, view: ModelView) -> Iterator[Edit]:
        """Hand out edits, one by one; each is carried out before the next is asked for.

        Cuts of hidden units that carry no tensors are carried out after the last edit, where the same repair follows
        as for a `SiteMethod`.

        Args:
            view: the model as the edits handed out so far have left it, and its calibration images.

        Yields:
            Edits of the kinds in `edits`.
        """


METHODS: dict[str, type[Method]] = {}
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(method: AnyMethod) -> AnyMethod:
    """Put a class on the list of methods, under its name; to be written above the class as a decorator.

    Raises:
        TypeError: it is of neither kind, or does not say all that a method has to.
    """
    if not issubclass(method, (SiteMethod, ModelMethod)):
        raise TypeError(f"{method.__qualname__}: is no method; derive it from SiteMethod or ModelMethod.")
    silent = [name for name in ("name", "paper", "arxiv", "summary", "needs", "takes") if not hasattr(method, name)]
    if silent:
        raise TypeError(f"{method.__qualname__}: says nothing about {', '.join(silent)}; set it on the class.")
    METHODS[method.name] = method
    return method


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(METHODS)}."
        raise RecipeError(f"method: unknown name {name!r}; {hint}")
    return METHODS[name]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method by its name and options, as a recipe has them.

    Raises:
        RecipeError: there is none of that name, or an option is unknown or has a value that is not allowed.
    """
    return find_method(name)(**(options or {}))
