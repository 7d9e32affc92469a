"""What the user asked for, as one frozen value that the command line, YAML files and the Python API share.

Widths are resolved here too, because they are part of the request. Nothing is loaded or run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from vitrim.config.options import (
    AdapterOptions,
    AllocateOptions,
    BlockwiseOptions,
    CacheOptions,
    CalibrateOptions,
    Options,
    RecoverOptions,
    RepairOptions,
)
from vitrim.errors import BudgetError, RecipeError
from vitrim.methods import find_method, make_method
from vitrim.types import MlpSite

LENGTHS = {"steps", "epochs"}
BUDGETS = {"mlp_ratio", "keep_ratio", "width"}
MAX_VALUES = 10_000


class Step(Options):
    """Another method, on what the steps before it have left, and without a width on all of it.

    What else is not given is as in a recipe.
    """

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    mlp_ratio: float | None = Field(default=None, gt=0)
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    width: int | None = None
    repair: RepairOptions | bool | None = None


class Recipe(Options):
    """One run: a model, a method, a width, and what follows the cut.

    `widths` gives MLPs a width of their own, by path or the end of it; `allocate` finds them. `repair` is None for the
    method's own habit, False for none, True or options for the closed-form repair. `then` are further methods, each on
    what the ones before it have left; recovery follows once, at the end.
    """

    model: str | None = None
    data: str | None = None
    method: str = "dgmr"
    options: dict[str, Any] = Field(default_factory=dict)
    mlp_ratio: float | None = Field(default=None, gt=0)
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    width: int | None = None
    round_to: int = Field(default=8, ge=1)
    widths: dict[str, int] | None = None
    allocate: AllocateOptions | None = None
    stock: bool = False
    scope: str | None = None
    calibrate: CalibrateOptions = CalibrateOptions()
    repair: RepairOptions | bool | None = None
    blockwise: BlockwiseOptions | None = None
    recover: RecoverOptions | None = None
    then: tuple[Step, ...] = ()
    seed: int = Field(default=0, ge=0)
    device: str = "auto"

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        given = [name for name in sorted(BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of mlp_ratio, keep_ratio and width, not {' and '.join(given)}")
        return self

    @field_validator("allocate", mode="before")
    @classmethod
    def _allocate_or_not(cls, given: Any) -> Any:
        """`auto` stands for the defaults, `uniform` for equal widths."""
        return {"auto": {}, "uniform": None}.get(given, given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_way_to_widths(self) -> Recipe:
        own = [name for name in ("widths", "allocate") if getattr(self, name) is not None]
        if len(own) > 1:
            raise ValueError("allocate finds widths and widths gives them; drop one of the two")
        if own and (self.stock or (self.recover is not None and self.recover.elastic is not None)):
            raise ValueError(f"{own[0]}: stock and recover.elastic want the same width in every MLP; drop them, or it")
        return self

    @model_validator(mode="after")
    def _elastic_agrees(self) -> Recipe:
        ratios = None if self.recover is None else self.recover.elastic
        if ratios is None:
            return self
        if self.keep_ratio is not None or self.width is not None or self.stock:
            raise ValueError("recover.elastic names MLP ratios; drop keep_ratio, width and stock")
        if self.mlp_ratio not in (None, ratios[-1]):
            raise ValueError(
                f"mlp_ratio is {self.mlp_ratio:g} and the largest of recover.elastic is {ratios[-1]:g}; "
                "drop mlp_ratio, or make them equal"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from YAML.

        Raises:
            RecipeError: the file is missing, is no YAML mapping, or has an unknown key or a value not allowed.
        """
        try:
            text = Path(path).read_text()
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: can't be read ({error}); pass a YAML file.") from None
        data = read_yaml(text, where=str(path))
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: holds {type(data).__name__}; a recipe is a mapping of keys to values.")
        return cls.parse(data, where=str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """Check a mapping; the method's own options are checked too.

        Raises:
            RecipeError: a key is unknown or a value is not allowed.
        """
        try:
            recipe = cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error.errors()[0])}") from None
        for stage in recipe.stages():
            make_method(stage.method, stage.options)
        _check_order(recipe)
        return recipe

    def updated(self, given: Mapping[str, Any]) -> Recipe:
        """This recipe with other values over it; None changes nothing, a new budget or length replaces the old one.

        Raises:
            RecipeError: the result is not a valid recipe.
        """
        wins = {key: value for key, value in given.items() if value is not None}
        base = self.model_dump(exclude_unset=True)
        if BUDGETS & wins.keys():
            base = {key: value for key, value in base.items() if key not in BUDGETS}
        base, length = dict(base), wins.get("recover")
        if isinstance(length, Mapping) and LENGTHS & length.keys() and isinstance(base.get("recover"), dict):
            base["recover"] = {key: value for key, value in base["recover"].items() if key not in LENGTHS}
        for key in ("repair", "allocate", "blockwise", "recover", "calibrate", "options"):
            if isinstance(base.get(key), dict) and isinstance(wins.get(key), Mapping):
                wins[key] = {**base[key], **wins[key]}
        return self.parse({**base, **wins})

    def stages(self) -> list[Recipe]:
        """The recipe as one recipe for each of its methods, in their order."""
        own = dict.fromkeys((*Step.model_fields, "widths", "allocate"))  # what a step does not give is nobody's
        alone = self.model_copy(update={"then": ()})
        steps = [dict(step) for step in self.then]
        for step in steps:
            if all(step[name] is None for name in BUDGETS):
                step["keep_ratio"] = 1.0
        return [alone, *(alone.model_copy(update={**own, **step}) for step in steps)]

    def dump(self) -> str:
        """The recipe as YAML; `load` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def repair_options(self) -> RepairOptions | None:
        """The repair to run: what was asked for, or the method's own habit."""
        if isinstance(self.repair, RepairOptions):
            return self.repair
        wanted = find_method(self.method).repairs if self.repair is None else self.repair
        return RepairOptions() if wanted else None

    def width_of(self, site: MlpSite, *, mlp_ratio: float | None = None) -> int:
        """How many hidden units of a site stay.

        Args:
            site: the MLP, uncut.
            mlp_ratio: a ratio to use in place of the recipe's own budget.

        Raises:
            BudgetError: the request is below 1 or above the units there are.
        """
        asked, value = ("mlp_ratio", mlp_ratio) if mlp_ratio is not None else self._budget(site)
        if asked in ("width", "widths"):
            wanted = int(value)
        elif asked == "keep_ratio":
            wanted = self._rounded(value * site.d_hidden, site.d_hidden)
        else:
            exact = value * site.d_model
            # r = 1 asks for exactly the model width; what is not a whole multiple of round_to is rounded.
            wanted = int(exact) if exact == site.d_model else self._rounded(exact, site.d_hidden)
        if not 1 <= wanted <= site.d_hidden:
            raise BudgetError(
                f"{site.path}: {asked}={value:g} asks to keep {wanted} of {site.d_hidden} units; "
                f"use 1..{site.d_hidden}."
            )
        return wanted

    def check_widths(self, sites: Sequence[MlpSite]) -> None:
        """Refuse a width for an MLP that is not there.

        Raises:
            BudgetError: so it is.
        """
        for path in self.widths or ():
            if not any(_is_end(path, site.path) for site in sites):
                raise BudgetError(f"widths: no MLP {path!r}; there are {', '.join(site.path for site in sites)}.")

    def _budget(self, site: MlpSite) -> tuple[str, float]:
        """What says how many units of a site stay: its own width, the budget, the largest elastic width, or ratio 1."""
        own = [path for path in self.widths or () if _is_end(path, site.path)]
        if self.widths and own:
            return "widths", self.widths[max(own, key=len)]
        given = {"width": self.width, "keep_ratio": self.keep_ratio, "mlp_ratio": self.mlp_ratio}
        elastic = None if self.recover is None else self.recover.elastic
        default = 1.0 if elastic is None else elastic[-1]
        return next(((name, value) for name, value in given.items() if value is not None), ("mlp_ratio", default))

    def _rounded(self, exact: float, full: int) -> int:
        """To the nearest multiple of `round_to`, at least one; the full width stays as it is."""
        if round(exact) >= full:
            return round(exact)
        return min(full, max(self.round_to, round(exact / self.round_to) * self.round_to))


def read_yaml(text: str, *, where: str) -> Any:
    """A value from YAML that holds plain data alone; what is larger than any recipe is refused before it is unfolded.

    Raises:
        RecipeError: it is no YAML, or holds too much: names for names for names can stand for any number of values.
    """
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # its constructors raise ValueError, KeyError, AttributeError, RecursionError and more
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(f"{where}: can't be read as YAML ({reason}).") from None
    left, waiting = MAX_VALUES, [value]
    while waiting:
        left -= 1
        if left < 0:
            raise RecipeError(f"{where}: holds more than {MAX_VALUES:,} values; a recipe has some dozens.")
        part = waiting.pop()
        waiting += [*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, list | set) else []
    return value


def _is_end(one: str, other: str) -> bool:
    """Whether one of two paths is the end of the other: inside an encoder paths start later."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _check_order(recipe: Recipe) -> None:
    """Refuse steps of which a later one would need what an earlier one has replaced.

    Raises:
        RecipeError: so it is.
    """
    methods = [find_method(stage.method) for stage in recipe.stages()]
    for before, after in pairwise(methods):
        if after.lowest_order() < before.highest_order():
            raise RecipeError(
                f"then: {after.name} ({after.edits_in_words()}) can't follow {before.name} "
                f"({before.edits_in_words()}), which puts other modules in the place of those that it works on; "
                f"put {after.name} first."
            )


def _explain(error: Mapping[str, Any]) -> str:
    """One validation error as one line, with the nearest key for an unknown one."""
    path = ".".join(str(part) for part in error["loc"] if not str(part).endswith("Options"))
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['msg']} (got {error['input']!r:.80})" if path else str(error["msg"])
    close = difflib.get_close_matches(path, known_keys(), n=1, cutoff=0.6)
    return f"unknown key {path!r}; " + (
        f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known_keys())}."
    )


def known_keys() -> list[str]:
    """Every key of a recipe, nested ones dotted."""
    nested = {
        "calibrate": CalibrateOptions,
        "allocate": AllocateOptions,
        "repair": RepairOptions,
        "blockwise": BlockwiseOptions,
        "recover": RecoverOptions,
        "recover.cache_teacher": CacheOptions,
        "recover.adapter": AdapterOptions,
    }
    keys = list(Recipe.model_fields)
    return keys + [f"{name}.{key}" for name, options in nested.items() for key in options.model_fields]
