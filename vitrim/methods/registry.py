"""The list of methods. A method registers one function: of one MLP, which units stay; or of a whole model, edits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from vitrim.errors import RecipeError
from vitrim.surgery import Edit, KeepUnits
from vitrim.types import ModelView, SiteView

Needs = Literal["weights", "images"]


class MethodOptions(BaseModel):
    """Base of each method's options: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Select = Callable[[SiteView, Any], Tensor]
Propose = Callable[[ModelView, Any], Iterator[Edit]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A registered method.

    A method of scope `site` has `select`: which hidden units of one MLP stay, in pick order. One of scope `model` has
    `propose`: a generator of edits, each carried out before it is asked for the next. `needs` tells whether it looks
    at calibration images; `repairs` whether the closed-form repair follows by default, which it does not where a
    paper's own procedure is reproduced. Cuts of hidden units that come without tensors are repaired like those of
    any other method, after the last edit. `edits` are the kinds it makes.
    """

    name: str
    select: Select | None
    propose: Propose | None
    options: type[MethodOptions]
    needs: Needs
    paper: str
    arxiv: str
    summary: str
    repairs: bool
    edits: tuple[type[Edit], ...] = (KeepUnits,)

    @property
    def edit(self) -> str:
        """The kinds of edit in words."""
        return ", ".join(kind.KIND.replace("_", " ") for kind in self.edits)

    @property
    def first_stage(self) -> int:
        """The lowest stage of its edits: nothing before it may have a higher one."""
        return min(kind.STAGE for kind in self.edits)

    @property
    def last_stage(self) -> int:
        """The highest stage of its edits."""
        return max(kind.STAGE for kind in self.edits)

    def parse_options(self, values: dict[str, Any] | None) -> MethodOptions:
        """Check a mapping of options against the method's own class.

        Raises:
            RecipeError: an option is unknown or has a value that is not allowed.
        """
        try:
            return self.options.model_validate(values or {})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            allowed = ", ".join(self.options.model_fields) or "none"
            raise RecipeError(
                f"options.{key} of method {self.name}: {first['msg']}; its options are {allowed}."
            ) from None


METHODS: dict[str, Method] = {}
Decide = TypeVar("Decide", bound=Callable[..., Any])


def register(
    name: str,
    *,
    scope: Literal["site", "model"] = "site",
    edits: tuple[type[Edit], ...] = (KeepUnits,),
    options: type[MethodOptions] = MethodOptions,
    needs: Needs,
    paper: str,
    arxiv: str,
    summary: str,
    repairs: bool,
) -> Callable[[Decide], Decide]:
    """Register a function under a name; one function may serve several names with other defaults."""

    def add(decide: Decide) -> Decide:
        METHODS[name] = Method(
            name=name,
            select=decide if scope == "site" else None,
            propose=decide if scope == "model" else None,
            edits=edits,
            options=options,
            needs=needs,
            paper=paper,
            arxiv=arxiv,
            summary=summary,
            repairs=repairs,
        )
        return decide

    return add


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(METHODS)}."
        raise RecipeError(f"method: unknown name {name!r}; {hint}")
    return METHODS[name]
