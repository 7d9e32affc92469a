"""What the user asked for, as one frozen value that the command line, YAML files and the Python API share.

Widths are resolved here too, because they are part of the request. Nothing is loaded or run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitrim.errors import BudgetError, RecipeError
from vitrim.methods import find_method
from vitrim.models.taps import FeaturesAt
from vitrim.types import MlpSite

LENGTHS = {"steps", "epochs"}
BUDGETS = {"width_ratio", "keep_ratio", "width"}


class _Options(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrateOptions(_Options):
    """The images from which selection and repair learn."""

    num_images: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=64, ge=1)


class RepairOptions(_Options):
    """Closed-form least squares, then a short local refit of each MLP.

    `ridge` is relative to the mean energy of a kept unit; `feedback` is the share of the residual stream's error that a
    block's target corrects; `refit_steps` bounds the refit's time.
    """

    ridge: float = Field(default=1e-4, gt=0)
    feedback: float = Field(default=1.0, ge=0, le=1)
    refit: bool = True
    refit_steps: int = Field(default=300, ge=1)
    refit_lr: float = Field(default=1e-2, gt=0)
    max_tokens: int = Field(default=100_000, ge=256)


class RecoverOptions(_Options):
    """Label-free distillation. One of `steps` and `epochs` says how long; `lr` None runs a short range test."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=128, ge=1)
    lr: float | None = Field(default=None, gt=0)
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    weight_decay: tuple[float, float] = (0.0, 0.0)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["auto", "no", "bf16"] = "auto"
    ema: float = Field(default=0.0, ge=0, lt=1)
    augment: Literal["none", "light", "strong"] = "light"
    flip: bool = False
    features_at: FeaturesAt = "final"
    num_validations: int = Field(default=10, ge=1)
    num_workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> RecoverOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Recipe(_Options):
    """One run: a model, a method, a width, and what follows the cut.

    `repair` is None for the method's own habit, False for none, True or options for the closed-form repair.
    """

    model: str | None = None
    data: str | None = None
    method: str = "dgmr"
    options: dict[str, Any] = Field(default_factory=dict)
    width_ratio: float | None = Field(default=None, gt=0)
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    width: int | None = None
    round_to: int = Field(default=8, ge=1)
    stock: bool = False
    scope: str | None = None
    calibrate: CalibrateOptions = CalibrateOptions()
    repair: RepairOptions | bool | None = None
    recover: RecoverOptions | None = None
    seed: int = Field(default=0, ge=0)
    device: str = "auto"

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        given = [name for name in sorted(BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of width_ratio, keep_ratio and width, not {' and '.join(given)}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from YAML.

        Raises:
            RecipeError: the file is missing, is no YAML mapping, or has an unknown key or a value not allowed.
        """
        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).replace("\n", " ")[:200]
            raise RecipeError(f"{path}: can't be read as YAML ({reason}).") from None
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
        find_method(recipe.method).parse_options(recipe.options)
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
        for key in ("repair", "recover", "calibrate", "options"):
            if isinstance(base.get(key), dict) and isinstance(wins.get(key), Mapping):
                wins[key] = {**base[key], **wins[key]}
        return self.parse({**base, **wins})

    def dump(self) -> str:
        """The recipe as YAML; `load` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def repair_options(self) -> RepairOptions | None:
        """The repair to run: what was asked for, or the method's own habit."""
        if isinstance(self.repair, RepairOptions):
            return self.repair
        wanted = find_method(self.method).repairs if self.repair is None else self.repair
        return RepairOptions() if wanted else None

    def width_of(self, site: MlpSite) -> int:
        """How many hidden units of a site stay.

        Raises:
            BudgetError: the request is below 1 or above the units there are.
        """
        if self.width is not None:
            wanted = self.width
        elif self.keep_ratio is not None:
            wanted = self._rounded(self.keep_ratio * site.d_hidden, site.d_hidden)
        else:
            ratio = 1.0 if self.width_ratio is None else self.width_ratio
            exact = ratio * site.d_model
            # r = 1 asks for exactly the model width; what is not a whole multiple of round_to is rounded.
            wanted = int(exact) if exact == site.d_model else self._rounded(exact, site.d_hidden)
        if not 1 <= wanted <= site.d_hidden:
            asked = next((f"{k}={v:g}" for k, v in self._budget().items() if v is not None), "width_ratio=1")
            raise BudgetError(
                f"{site.path}: {asked} asks to keep {wanted} of {site.d_hidden} units; use 1..{site.d_hidden}."
            )
        return wanted

    def _budget(self) -> dict[str, float | None]:
        return {"width": self.width, "keep_ratio": self.keep_ratio, "width_ratio": self.width_ratio}

    def _rounded(self, exact: float, full: int) -> int:
        """To the nearest multiple of `round_to`, at least one; the full width stays as it is."""
        if round(exact) >= full:
            return round(exact)
        return min(full, max(self.round_to, round(exact / self.round_to) * self.round_to))


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
    nested = {"calibrate": CalibrateOptions, "repair": RepairOptions, "recover": RecoverOptions}
    keys = list(Recipe.model_fields)
    return keys + [f"{name}.{key}" for name, options in nested.items() for key in options.model_fields]
