"""The list of methods. A method registers one function: of one MLP, which units stay; or of a whole model, edits."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ValidationError
from torch import Tensor

from vitrim.checked import Checked
from vitrim.errors import RecipeError
from vitrim.surgery import Edit, KeepUnits
from vitrim.types import ModelView, SiteView

Needs = Literal["weights", "images"]


class Method(Checked):
    name: ClassVar[str]
    paper: ClassVar[str]
    arxiv: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[Needs]
    repairs: ClassVar[bool]
    edits: ClassVar[tuple[type[Edit], ...]] = (KeepUnits,)
    takes: ClassVar[str] = "widths"

    @classmethod
    def edits_in_words(cls) -> str:
        return ", ".join(kind.KIND.replace("_", " ") for kind in cls.edits)

    @classmethod
    def first_order(cls) -> int:
        return min(kind.STAGE for kind in cls.edits)

    @classmethod
    def last_order(cls) -> int:
        return max(kind.STAGE for kind in cls.edits)


class SiteMethod(Method):
    def select(self, view: SiteView) -> Tensor: ...


class ModelMethod(Method):
    def propose(self, view: ModelView) -> Iterator[Edit]: ...


class MethodOptions(Checked):
    pass


METHODS: dict[str, type[Method]] = {}
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
        takes = "widths"
        if any(k.KIND not in ("keep_units", "keep_head_dims") for k in edits):
            takes = "nothing" if name in ("relufy", "int8") else "share"
        own = {
            "name": name,
            "paper": paper,
            "arxiv": arxiv,
            "summary": summary,
            "needs": needs,
            "repairs": repairs,
            "edits": edits,
            "takes": takes,
            "__module__": __name__,
        }
        if scope == "site":
            kind = type(name, (options, SiteMethod), {**own, "select": lambda self, view: decide(view, self)})
        else:
            kind = type(name, (options, ModelMethod), {**own, "propose": lambda self, view: decide(view, self)})
        METHODS[name] = kind
        return decide

    return add


def make_method(name, options=None):
    kind = find_method(name)
    try:
        return kind.model_validate(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(kind.model_fields) or "none"
        raise RecipeError(f"options.{key} of method {name}: {first['msg']}; its options are {allowed}.") from None


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
