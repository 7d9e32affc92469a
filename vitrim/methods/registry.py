"""The list of methods. A method registers one function that looks at a site and returns the units to keep."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from vitrim.errors import RecipeError
from vitrim.types import SiteView

Needs = Literal["weights", "images"]


class MethodOptions(BaseModel):
    """Base of each method's options: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Select = Callable[[SiteView, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A registered method.

    `needs` tells whether it looks at calibration images; `repairs` whether the closed-form repair follows by
    default, which it does not where a paper's own procedure is reproduced.
    """

    name: str
    select: Select
    options: type[MethodOptions]
    needs: Needs
    paper: str
    arxiv: str
    summary: str
    repairs: bool
    edit: str = "keep units"

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


def register(
    name: str,
    *,
    options: type[MethodOptions] = MethodOptions,
    needs: Needs,
    paper: str,
    arxiv: str,
    summary: str,
    repairs: bool,
) -> Callable[[Select], Select]:
    """Register a selection function under a name; one function may serve several names with other defaults."""

    def add(select: Select) -> Select:
        METHODS[name] = Method(
            name=name,
            select=select,
            options=options,
            needs=needs,
            paper=paper,
            arxiv=arxiv,
            summary=summary,
            repairs=repairs,
        )
        return select

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
