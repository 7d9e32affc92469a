"""The recipe: what the user asked for, as one frozen value shared by command line, YAML files and Python API.

Nothing is loaded or run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from vitrim.checked import Checked, explain, known_keys
from vitrim.config.effort import EFFORT, with_effort, without_effort
from vitrim.config.options import AtOnceOptions, BlockwiseOptions, CalibrateOptions, ExitOptions, RecoverOptions
from vitrim.config.steps import Step
from vitrim.config.widths import BUDGETS, Width
from vitrim.config.yaml_files import read_yaml_file, write_yaml
from vitrim.errors import RecipeError
from vitrim.methods import Method, find_method
from vitrim.models.origin import Reading
from vitrim.storage.training_files import Which
from vitrim.surgery import DropBlocks, KeepTokens, MergeTokens

LENGTHS = {"steps", "epochs"}
MAX_STEPS = 16  # each is a pass over the whole model
MERGED = ("model_args", "repair", "allocate", "blockwise", "at_once", "recover", "exits", "calibrate", "options")


class Recipe(Checked):
    """One run: a model, the steps that compress it, and what follows them.

    A recipe with one step may give the step's own keys (`method`, `mlp_ratio`, `repair` and so on) instead of `steps`.
    `effort` (fast, default, max) is written out into the keys that it stands for; see `config.effort`.
    """

    model: str | None = None
    """Name or folder of the model."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the architecture of `vitrim/NAME`, or of `timm/NAME@FILE` where its tensors don't fix them."""
    weights: Which = "auto"
    """Which weights of a training checkpoint: `auto` takes averaged ones (EMA) where there are any, `raw` never."""
    data: str | None = None
    """Images to learn from; labels are not needed."""
    steps: tuple[Step, ...] = Field(default_factory=lambda: (Step(),), min_length=1, max_length=MAX_STEPS)
    """Methods to apply in turn, each to the result of the one before."""
    scope: str | None = None
    """Dotted path of the part to cut, or its end. By default the image tower, or the whole model if there is none."""
    calibrate: CalibrateOptions = CalibrateOptions()
    """Images that selection and repair use."""
    blockwise: BlockwiseOptions | None = None
    """Train each block by itself after the cut."""
    at_once: AtOnceOptions | None = None
    """Train all blocks at once, each by its own error, after the cut."""
    recover: RecoverOptions | None = None
    """Distil without labels, once, at the end."""
    exits: ExitOptions | None = None
    """Train early exits at the ends of loops, after distillation."""
    remote_code: bool = False
    """Where the model's own library can't load the result, write a modeling file with which transformers can."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Random seed; equal recipes and seeds give equal results."""
    device: str = "auto"
    """Device to run on: `auto`, `cpu`, `cuda`, `mps`, or any torch device."""

    if TYPE_CHECKING:  # a recipe of one step also takes the step's keys; this serves completion and type checkers

        def __init__(self, **keys: Any) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _one_step(cls, given: Any) -> Any:
        """Collect the keys that belong to a step into one step."""
        if not isinstance(given, Mapping):
            return given
        own = {key: value for key, value in given.items() if key in Step.model_fields}
        if own and "steps" in given:
            raise ValueError(f"{next(iter(own))}: belongs to a step; put it into one of steps, or drop steps")
        rest = {key: value for key, value in given.items() if key not in own}
        return with_effort({**rest, "steps": [own]} if own else rest)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for before, after in pairwise(find_method(step.method) for step in self.steps):
            if after.lowest_order() < before.highest_order():
                raise RecipeError(
                    f"steps: {after.name} ({after.edits_in_words()}) can't follow {before.name} "
                    f"({before.edits_in_words()}), which puts other modules in the place of those that it works on; "
                    f"put {after.name} first."
                )
        if self.recover is not None and self.recover.elastic is not None:
            self._check_elastic(self.recover.elastic)
        shorter = [step.method for step in self.steps if DropBlocks in find_method(step.method).edits]
        shorter += ["allocate.depth" for step in self.steps if step.allocate is not None and step.allocate.depth]
        by_block = next((name for name in ("blockwise", "at_once") if getattr(self, name) is not None), None)
        if shorter and by_block is not None:
            raise ValueError(
                f"{by_block}: {shorter[0]} takes blocks out, so those of the two models can't be compared one by one; "
                f"drop {by_block}, recover trains the whole model"
            )
        self._check_fewer_tokens()
        if self.exits is not None and self.recover is not None and self.recover.elastic is not None:
            raise ValueError("exits: are trained at one width; drop exits or recover.elastic")
        return self

    def _check_fewer_tokens(self) -> None:
        """Refuse options that run a student's blocks on all tokens, where a method leaves it some of them."""
        merged = [step.method for step in self.steps if MergeTokens in find_method(step.method).edits]
        if merged and self.blockwise is not None:
            raise ValueError(
                f"blockwise: {merged[0]} merges tokens, so the two models' blocks can't be compared one by one; drop "
                "blockwise, recover trains the whole model"
            )
        fewer = merged + [step.method for step in self.steps if KeepTokens in find_method(step.method).edits]
        if fewer and self.blockwise is not None and self.blockwise.inputs == "teacher":
            raise ValueError(
                f"blockwise.inputs: {fewer[0]} keeps some tokens, and the teacher's blocks give all; use student"
            )
        if fewer and self.recover is not None and self.recover.elastic is not None:
            raise ValueError(
                f"recover.elastic: fits widths on all tokens, and {fewer[0]} keeps some; drop one of the two"
            )

    @property
    def training(self) -> tuple[BlockwiseOptions | AtOnceOptions | RecoverOptions, ...]:
        """What is trained after the cut, in order."""
        return tuple(part for part in (self.blockwise, self.at_once, self.recover, self.exits) if part is not None)

    def _check_elastic(self, ratios: tuple[float, ...]) -> None:
        """Refuse options that conflict with several widths in one result."""
        step = self.steps[0]
        for name in ("widths", "allocate"):
            if getattr(step, name) is not None:
                raise ValueError(f"{name}: recover.elastic wants the same width in every MLP; drop one of the two")
        if step.budget not in (None, "mlp_ratio"):
            raise ValueError(f"recover.elastic names MLP ratios; drop {step.budget}")
        if step.mlp_ratio not in (None, ratios[-1]):
            raise ValueError(
                f"mlp_ratio is {step.mlp_ratio:g} and the largest of recover.elastic is {ratios[-1]:g}; "
                "drop mlp_ratio, or make them equal"
            )

    @classmethod
    def keys(cls) -> list[str]:
        """Return every key that may be given, nested ones dotted, including those of the first step."""
        return [*known_keys(cls), *known_keys(Step), EFFORT]

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            RecipeError: the file is missing, is not a YAML mapping, or has an unknown key or a forbidden value.
        """
        data = read_yaml_file(Path(path))
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: holds {type(data).__name__}; a recipe is a mapping of keys to values.")
        return cls.parse(data, where=str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """Make a recipe from a mapping; `where` names its source in errors.

        Raises:
            RecipeError: a key is unknown or a value is not allowed.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error, cls)}") from None

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe:
        """Return a recipe from a recipe, a mapping, the path of a YAML file, or None for the defaults.

        Raises:
            RecipeError: it is none of these, the file can't be read, or a key or value is not allowed.
        """
        if isinstance(given, Recipe):
            return given
        if given is None or isinstance(given, Mapping):
            return cls.parse(given or {})
        if not isinstance(given, str | Path):
            raise RecipeError(
                f"recipe: is {type(given).__name__}; pass a Recipe, a mapping, or the path of a YAML file."
            )
        return cls.load(given)

    def updated(self, given: Mapping[str, Any]) -> Recipe:
        """Return a copy with other values; a new budget, length or method replaces the old one.

        Args:
            given: keys of a recipe or, for its first step, of a step. Mappings are merged with the existing ones.

        Raises:
            RecipeError: the result is not a valid recipe.
        """
        base = self.model_dump(exclude_unset=True)
        base = base if given.get(EFFORT) is None else without_effort(base)
        steps = [dict(step) for step in base.pop("steps", ({},))]
        if "steps" in given:
            return self.parse({**_merged(base, given)})
        own = {key: value for key, value in given.items() if key in Step.model_fields}
        rest = {key: value for key, value in given.items() if key not in own}
        if any(own.get(name) is not None for name in BUDGETS):
            steps[0] = {key: value for key, value in steps[0].items() if key not in BUDGETS}
        named = own.get("method")
        if isinstance(named, Method) or named not in (None, self.steps[0].method):
            steps[0].pop("options", None)  # of the method that is replaced; an instance brings all of its own
        steps[0] = _merged(steps[0], own)
        return self.parse({**_merged(base, rest), "steps": steps})

    def reading(self) -> Reading:
        """Return how the model is to be read."""
        return Reading(model_args=self.model_args, weights=self.weights)

    def width(self, number: int = 0) -> Width:
        """Return how many hidden units of each MLP stay after a step.

        Without a budget, the first step keeps half of the encoder's parameters, or the largest width in
        `recover.elastic` if that is given. Later steps, and methods that use no budget, keep all units.
        """
        step = self.steps[number]
        if number or step.make_method().goes_by() == "nothing":
            return step.width(default=("keep_ratio", 1.0))
        elastic = None if self.recover is None else self.recover.elastic
        return step.width() if elastic is None else step.width(default=("mlp_ratio", elastic[-1]))

    def written_out(self) -> Recipe:
        """Return the recipe with the sizes and the repair of its steps in it, where these were left to defaults."""
        steps = []
        for number, step in enumerate(self.steps):
            repair = step.repair_options()
            found: dict[str, Any] = {"repair": False if repair is None else repair}
            if step.has_default_budget:
                width = self.width(number)
                found[width.kind] = width.value
            steps.append(step.model_copy(update=found))
        return self.model_copy(update={"steps": tuple(steps)})

    def dump(self) -> str:
        """Return the recipe as YAML, which `load` can read."""
        return write_yaml(self.model_dump(mode="json"))


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Override values with others; options that are mappings on both sides are merged key by key."""
    found = {**base, **given}
    for key in MERGED:
        old, new = base.get(key), given.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            kept = {k: v for k, v in old.items() if not (key == "recover" and k in LENGTHS and LENGTHS & new.keys())}
            found[key] = {**kept, **new}
    return found
