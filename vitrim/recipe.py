"""What the user asked for, as one frozen value that the command line, YAML files and the Python API share.

Widths are resolved here too, because they are part of the request. Nothing is loaded or run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


class BlockwiseOptions(_Options):
    """Each block trained by itself to put out what the teacher's does, on images whose activations lie on disk.

    `steps` of one batch are spent on each block. `inputs` are the student's own, so that a block corrects what the
    blocks before it got wrong, or the teacher's, so that blocks are independent and are spread over processes. `train`
    says what of a block is trained: its MLP, or all of it, attention and norms too. `lr` None is 1e-3 for the MLP and
    5e-4 for all.
    """

    num_images: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    steps: int = Field(default=300, ge=1)
    lr: float | None = Field(default=None, gt=0)
    inputs: Literal["student", "teacher"] = "student"
    train: Literal["mlp", "block"] = "mlp"
    num_workers: int = Field(default=0, ge=0)


class CacheOptions(_Options):
    """Where and how the teacher's targets are kept, so that later epochs need not run the teacher.

    `views` is how many draws of augmentation each image has: epoch e sees draw e mod `views`. Of the patch tokens all
    are kept, or `patch_ratio` or `num_patches` of them at random. `folder` None keeps the cache beside the run's state,
    for this run alone; a named folder stays and serves other runs.
    """

    views: int = Field(default=1, ge=1)
    dtype: Literal["bf16", "int8", "float32"] = "bf16"
    patch_ratio: float | None = Field(default=None, gt=0, le=1)
    num_patches: int | None = Field(default=None, ge=1)
    folder: Path | None = None

    @model_validator(mode="after")
    def _one_share(self) -> CacheOptions:
        if self.patch_ratio is not None and self.num_patches is not None:
            raise ValueError("give one of patch_ratio and num_patches, or neither to keep all patches")
        return self


class AdapterOptions(_Options):
    """What trains in place of the linear weights and is merged into them: factors of rank `rank`, times alpha / rank.

    `targets` are ends of layer names, as in PEFT; without, every linear weight that the loss reaches. `hidden` and
    `latent` are the sizes inside an OP-LoRA generator, `decay_generator` lets weight decay act on it. `train_vectors`
    trains norms, biases and other vectors, too. `save` is a folder for the factors in PEFT's layout.
    """

    kind: Literal["lora", "op-lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    targets: tuple[str, ...] = ()
    hidden: int = Field(default=32, ge=1)
    latent: int = Field(default=32, ge=1)
    train_vectors: bool = False
    decay_generator: bool = False
    save: Path | None = None

    @model_validator(mode="after")
    def _all_in_factors(self) -> AdapterOptions:
        if self.save is not None and self.train_vectors:
            raise ValueError("with train_vectors the factors are not all that was trained; give one of it and save")
        return self


class RecoverOptions(_Options):
    """Label-free distillation. One of `steps` and `epochs` says how long; `lr` None runs a short range test.

    `elastic` are width ratios that the one student shall serve, each step training one of them. `epoch_images`,
    `stream_lanes` and `shuffle_buffer` are for streams: the length of an epoch, how many lanes are read side by side,
    and how many images are shuffled among each other. `track` names trackers that get what the log gets.
    `text_bank` is a text file: how similar the image tower of a pair finds each of its lines is to stay, too.
    `save_every` keeps a state to resume from every so many steps, beside those at validations. `shard` spreads both
    models over the processes, `checkpoint_activations` runs the student's blocks twice rather than keep what they saw.
    """

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
    save_every: int | None = Field(default=None, ge=1)
    shard: bool = False
    checkpoint_activations: bool = False
    epoch_images: int | None = Field(default=None, ge=1)
    stream_lanes: int = Field(default=8, ge=1)
    shuffle_buffer: int = Field(default=4096, ge=1)
    track: tuple[str, ...] = ()
    elastic: tuple[float, ...] | None = None
    text_bank: Path | None = None
    text_bank_weight: float = Field(default=1.0, gt=0)
    cache_teacher: CacheOptions | None = None
    adapter: AdapterOptions | None = None

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_by_kind(cls, given: Any) -> Any:
        """A kind alone stands for its defaults."""
        return {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _adapter_or_elastic(self) -> RecoverOptions:
        if self.adapter is not None and self.elastic is not None:
            raise ValueError("elastic trains the weights themselves; drop adapter or elastic")
        return self

    @field_validator("cache_teacher", mode="before")
    @classmethod
    def _cache_or_not(cls, given: Any) -> Any:
        """True stands for the defaults, False for no cache."""
        return {True: CacheOptions(), False: None}[given] if isinstance(given, bool) else given

    @field_validator("elastic")
    @classmethod
    def _several_widths(cls, ratios: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if ratios is None:
            return None
        if len(set(ratios)) < 2 or len(set(ratios)) < len(ratios) or not 0 < min(ratios) <= max(ratios) < math.inf:
            raise ValueError("give at least two different width ratios above 0")
        return tuple(sorted(ratios))

    @model_validator(mode="after")
    def _one_length(self) -> RecoverOptions:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    def view_of(self, epoch: int) -> int:
        """Which draw of augmentation an epoch sees: its own, or one of those for which targets are kept."""
        return epoch if self.cache_teacher is None else epoch % self.cache_teacher.views


class Step(_Options):
    """Another method, on what the steps before it have left. What is not given is as in a recipe."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    width_ratio: float | None = Field(default=None, gt=0)
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    width: int | None = None
    repair: RepairOptions | bool | None = None


class Recipe(_Options):
    """One run: a model, a method, a width, and what follows the cut.

    `repair` is None for the method's own habit, False for none, True or options for the closed-form repair. `then` are
    further methods, each on what the ones before it have left; recovery follows once, at the end.
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
    blockwise: BlockwiseOptions | None = None
    recover: RecoverOptions | None = None
    then: tuple[Step, ...] = ()
    seed: int = Field(default=0, ge=0)
    device: str = "auto"

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        given = [name for name in sorted(BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of width_ratio, keep_ratio and width, not {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _elastic_agrees(self) -> Recipe:
        ratios = None if self.recover is None else self.recover.elastic
        if ratios is None:
            return self
        if self.keep_ratio is not None or self.width is not None or self.stock:
            raise ValueError("recover.elastic names width ratios; drop keep_ratio, width and stock")
        if self.width_ratio not in (None, ratios[-1]):
            raise ValueError(
                f"width_ratio is {self.width_ratio:g} and the largest of recover.elastic is {ratios[-1]:g}; "
                "drop width_ratio, or make them equal"
            )
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
        for stage in recipe.stages():
            find_method(stage.method).parse_options(stage.options)
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
        for key in ("repair", "blockwise", "recover", "calibrate", "options"):
            if isinstance(base.get(key), dict) and isinstance(wins.get(key), Mapping):
                wins[key] = {**base[key], **wins[key]}
        return self.parse({**base, **wins})

    def stages(self) -> list[Recipe]:
        """The recipe as one recipe for each of its methods, in their order."""
        own = dict.fromkeys(Step.model_fields)  # what a step does not give is nobody's
        alone = self.model_copy(update={"then": ()})
        return [alone, *(alone.model_copy(update={**own, **dict(step)}) for step in self.then)]

    def dump(self) -> str:
        """The recipe as YAML; `load` gives it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def repair_options(self) -> RepairOptions | None:
        """The repair to run: what was asked for, or the method's own habit."""
        if isinstance(self.repair, RepairOptions):
            return self.repair
        wanted = find_method(self.method).repairs if self.repair is None else self.repair
        return RepairOptions() if wanted else None

    def width_of(self, site: MlpSite, *, width_ratio: float | None = None) -> int:
        """How many hidden units of a site stay.

        Args:
            site: the MLP, uncut.
            width_ratio: a ratio to use in place of the recipe's own budget.

        Raises:
            BudgetError: the request is below 1 or above the units there are.
        """
        asked, value = ("width_ratio", width_ratio) if width_ratio is not None else self._budget()
        if asked == "width":
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

    def _budget(self) -> tuple[str, float]:
        """What says how many units stay: the budget that was given, the largest elastic width, or ratio 1."""
        given = {"width": self.width, "keep_ratio": self.keep_ratio, "width_ratio": self.width_ratio}
        elastic = None if self.recover is None else self.recover.elastic
        default = 1.0 if elastic is None else elastic[-1]
        return next(((name, value) for name, value in given.items() if value is not None), ("width_ratio", default))

    def _rounded(self, exact: float, full: int) -> int:
        """To the nearest multiple of `round_to`, at least one; the full width stays as it is."""
        if round(exact) >= full:
            return round(exact)
        return min(full, max(self.round_to, round(exact / self.round_to) * self.round_to))


def _check_order(recipe: Recipe) -> None:
    """Refuse steps of which a later one would need what an earlier one has replaced.

    Raises:
        RecipeError: so it is.
    """
    methods = [find_method(stage.method) for stage in recipe.stages()]
    for before, after in pairwise(methods):
        if after.first_stage < before.last_stage:
            raise RecipeError(
                f"then: {after.name} ({after.edit}) can't follow {before.name} ({before.edit}), which puts other "
                f"modules in the place of those that it works on; put {after.name} first."
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
        "repair": RepairOptions,
        "blockwise": BlockwiseOptions,
        "recover": RecoverOptions,
        "recover.cache_teacher": CacheOptions,
        "recover.adapter": AdapterOptions,
    }
    keys = list(Recipe.model_fields)
    return keys + [f"{name}.{key}" for name, options in nested.items() for key in options.model_fields]
