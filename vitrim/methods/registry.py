"""What a method is, and the list of all: a class with its options as fields and one function that decides.

A method looks at plain matrices and sums and decides; it changes no module. Either it is asked MLP by MLP which hidden
units stay (`SiteMethod`), or once for the whole model, which edits to make (`ModelMethod`).
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ValidationError
from torch import Tensor

from vitrim.checked import Checked
from vitrim.errors import RecipeError
from vitrim.surgery import Edit, KeepUnits
from vitrim.types import ModelView, SiteView

Needs = Literal["weights", "images"]
BudgetUse = Literal["widths", "share", "nothing"]


class Method(Checked):
    """Base of all methods; an instance holds the options.

    Attributes:
        name: how recipes and the command line call it.
        paper: title of the paper.
        arxiv: its number.
        summary: what the method does, in a line.
        needs: whether it looks at calibration images.
        repairs: whether the closed-form repair follows by default, which it does not where a paper's own procedure is
            reproduced. Cuts of hidden units that come without tensors can be repaired, whichever method made them.
        edits: kinds of edit that it makes.
        takes: what of a budget it goes by: hidden units of each MLP (`widths`), a `share` of something else, or
            `nothing`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    arxiv: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[Needs]
    repairs: ClassVar[bool] = False
    edits: ClassVar[tuple[type[Edit], ...]] = (KeepUnits,)
    takes: ClassVar[BudgetUse]

    @classmethod
    def refusal(cls, error: ValidationError) -> str:
        """Say what is wrong with an option, and which there are."""
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(cls.model_fields) or "none"
        said = first["msg"].removeprefix("Value error, ")
        return f"options.{key} of method {cls.name}: {said}; its options are {allowed}."

    def goes_by(self) -> BudgetUse:
        """Return what of a budget these options leave to go by."""
        return self.takes

    @classmethod
    def edits_in_words(cls) -> str:
        """Return its kinds of edit in words."""
        return ", ".join(kind.KIND.replace("_", " ") for kind in cls.edits)

    @classmethod
    def lowest_order(cls) -> int:
        """Return the lowest order of its edits: nothing before it may have a higher one."""
        return min(kind.ORDER for kind in cls.edits)

    @classmethod
    def highest_order(cls) -> int:
        """Return the highest order of its edits."""
        return max(kind.ORDER for kind in cls.edits)


class SiteMethod(Method):
    """A method that is asked MLP by MLP which hidden units stay."""

    takes: ClassVar[BudgetUse] = "widths"

    @abstractmethod
    def select(self, view: SiteView) -> Tensor:
        """Return the indices of the `view.num_keep` units of one MLP that stay, in pick order."""


class ModelMethod(Method):
    """A method that decides about the whole model."""

    @abstractmethod
    def propose(self, view: ModelView) -> Iterator[Edit]:
        """Yield edits; each is carried out before the next is asked for."""


METHODS: dict[str, type[Method]] = {}
Kind = TypeVar("Kind", bound=type[Method])


def register(kind: Kind) -> Kind:
    """Add a method to the list, under its name; written above its class as a decorator.

    Raises:
        TypeError: it is of neither kind, or does not say all that a method has to.
    """
    if not issubclass(kind, SiteMethod | ModelMethod):
        raise TypeError(f"{kind.__qualname__}: is no method; derive it from SiteMethod or ModelMethod.")
    silent = [name for name in ("name", "paper", "arxiv", "summary", "needs", "takes") if not hasattr(kind, name)]
    if silent:
        raise TypeError(f"{kind.__qualname__}: says nothing about {', '.join(silent)}; set it on the class.")
    METHODS[kind.name] = kind
    return kind


def find_method(name: str) -> type[Method]:
    """Return a method's class by its name.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(METHODS)}."
        raise RecipeError(f"method: unknown name {name!r}; {hint}")
    return METHODS[name]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return a method with its options, by name.

    Raises:
        RecipeError: there is no method of that name, or an option is unknown or has a value that is not allowed.
    """
    return find_method(name)(**dict(options or {}))
