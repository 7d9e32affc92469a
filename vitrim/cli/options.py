"""Options that several commands share.

The recipe defines what they mean, and their help is the documentation of its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitrim.catalog import field_docs
from vitrim.errors import RecipeError

SelectOn = Literal["weights", "activations", "outputs", "features"]
Counted = Literal["params", "macs", "latency"]
Effort = Literal["fast", "default", "max"]
Precision = Literal["auto", "fp32", "bf16"]

STEP = field_docs("config.steps", "Step")
RECIPE = field_docs("config.recipe", "Recipe")
RECOVER = field_docs("config.options", "RecoverOptions")
REPAIR = field_docs("config.options", "RepairOptions")
ALLOCATE = field_docs("config.options", "AllocateOptions")
DGMR = field_docs("methods.dgmr", "Dgmr")


def _help(text: str, *, switch: bool = False) -> Parameter:
    """Return the help of an option; a `switch` has no negative form."""
    return Parameter(help=text, negative="") if switch else Parameter(help=text)


def keys_and_values(given: Sequence[str] | None, option: str, *, such_as: str) -> dict[str, Any]:
    """Return what KEY=VALUE pairs say; values are parsed as YAML, as in a recipe.

    Raises:
        RecipeError: one is no such pair.
    """
    found: dict[str, Any] = {}
    for pair in given or ():
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise RecipeError(f"{option} {pair!r}: give KEY=VALUE, such as {option} {such_as}.")
        found[key] = _values(value, where=f"{option} {pair!r}: give KEY=VALUE, such as {such_as}")
    return found


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """How small the result is; give at most one of the first five."""

    params_ratio: Annotated[float | None, _help(STEP["params_ratio"])] = None
    macs_ratio: Annotated[float | None, _help(STEP["macs_ratio"])] = None
    mlp_ratio: Annotated[float | None, _help(STEP["mlp_ratio"])] = None
    keep_ratio: Annotated[float | None, _help(STEP["keep_ratio"])] = None
    hidden_dim: Annotated[int | None, _help(STEP["hidden_dim"])] = None
    round_to: Annotated[int | None, _help(STEP["round_to"])] = None
    exact: Annotated[bool | None, _help(STEP["exact"], switch=True)] = None

    def any_given(self) -> bool:
        """Return whether a size was given, and not only how it is rounded."""
        return bool(self.given().keys() - {"round_to", "exact"})

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        return {name: value for name, value in self.__dict__.items() if value is not None}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a model is read, where its name leaves that open."""

    model_arg: Annotated[
        list[str] | None, Parameter(negative="", help=f"{RECIPE['model_args']} As KEY=VALUE; may be given again.")
    ] = None
    weights: Annotated[Literal["auto", "raw"] | None, _help(RECIPE["weights"])] = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given, as keys of a recipe."""
        args = keys_and_values(self.model_arg, "--model-arg", such_as="img_size=384")
        found = {"model_args": args or None, "weights": self.weights}
        return {name: value for name, value in found.items() if value is not None}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """What is cut, and how."""

    recipe: Annotated[Path | None, _help("YAML file; options given here win over it.")] = None
    method: Annotated[str | None, _help("One of `vitrim methods` (default dgmr).")] = None
    allocate: Annotated[Literal["auto", "uniform"] | None, _help(STEP["allocate"])] = None
    allocate_cost: Annotated[Counted | None, _help(ALLOCATE["cost"])] = None
    allocate_depth: Annotated[bool | None, _help(ALLOCATE["depth"], switch=True)] = None
    select_on: Annotated[SelectOn | None, _help(DGMR["select_on"])] = None
    option: Annotated[
        list[str] | None, Parameter(negative="", help="An option of the method, as KEY=VALUE; may be given again.")
    ] = None
    repair: Annotated[
        bool | None, _help("Closed-form repair after the cut; without either switch, the method's own habit.")
    ] = None
    refit: Annotated[bool | None, _help(REPAIR["refit"])] = None
    effort: Annotated[
        Effort | None,
        _help("fast: closed form alone; max: longer refits, then all blocks at once (default: refits)."),
    ] = None
    seed: Annotated[int | None, _help(RECIPE["seed"])] = None
    device: Annotated[str | None, _help(RECIPE["device"])] = None
    scope: Annotated[str | None, _help(RECIPE["scope"])] = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given, as updates to a recipe."""
        values = {
            "method": self.method,
            "allocate": self._allocate(),
            "options": self._options() or None,
            "repair": self._repair(),
            "effort": self.effort,
            "seed": self.seed,
            "device": self.device,
            "scope": self.scope,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _options(self) -> dict[str, Any]:
        """Return the method's options."""
        found = {} if self.select_on is None else {"select_on": self.select_on}
        return {**found, **keys_and_values(self.option, "--option", such_as="sparsity=0.75")}

    def _allocate(self) -> Any:
        """Return the recipe's allocation; `{}` means its default options."""
        given = {"cost": self.allocate_cost, "depth": self.allocate_depth}
        own = {name: value for name, value in given.items() if value is not None}
        if own and self.allocate == "uniform":
            raise RecipeError(f"--allocate-{next(iter(own))} goes with --allocate auto; drop one of the two.")
        return own if own or self.allocate == "auto" else self.allocate

    def _repair(self) -> Any:
        """Return the recipe's repair from the two switches; `{}` means its default options."""
        if self.repair is False:
            return False
        return {"refit": self.refit} if self.refit is not None else ({} if self.repair else None)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What is trained after the cut; nothing is, without one of the first six."""

    recover_steps: Annotated[int | None, _help(RECOVER["steps"])] = None
    recover_epochs: Annotated[float | None, _help(RECOVER["epochs"])] = None
    schedule: Annotated[Literal["published"] | None, _help(RECOVER["schedule"])] = None
    blockwise: Annotated[
        Literal["mlp", "block"] | None, _help("First train each block by itself: its MLP, or all of it.")
    ] = None
    at_once_steps: Annotated[
        int | None, _help("Then train all blocks at once for so many steps, each by its own error.")
    ] = None
    exit_steps: Annotated[int | None, _help("Last, train early exits at the ends of loops for so many steps.")] = None
    lr: Annotated[float | None, _help(RECOVER["lr"])] = None
    batch_size: Annotated[int | None, _help(RECOVER["batch_size"])] = None
    gradient_accumulation_steps: Annotated[int | None, _help(RECOVER["gradient_accumulation_steps"])] = None
    precision: Annotated[Precision | None, _help(RECOVER["precision"])] = None
    checkpoint_activations: Annotated[bool | None, _help(RECOVER["checkpoint_activations"], switch=True)] = None
    save_every: Annotated[int | None, _help(RECOVER["save_every"])] = None
    epoch_images: Annotated[int | None, _help(RECOVER["epoch_images"])] = None
    adapter: Annotated[Literal["lora", "op-lora"] | None, _help(RECOVER["adapter"])] = None
    elastic: Annotated[str | None, _help(f"{RECOVER['elastic']} Such as 0.5,1,2; see `vitrim slice`.")] = None
    cache_teacher: Annotated[bool | None, _help(RECOVER["cache_teacher"], switch=True)] = None
    fsdp: Annotated[bool | None, _help(RECOVER["fsdp"], switch=True)] = None
    report_to: Annotated[str | None, _help(f"{RECOVER['report_to']} Separated by commas.")] = None

    def given(self) -> dict[str, Any]:
        """Return the options that were given, as updates to a recipe."""
        values: dict[str, Any] = {**self.__dict__, "steps": self.recover_steps, "epochs": self.recover_epochs}
        if self.report_to is not None:
            values["report_to"] = self.report_to.split(",")
        if self.elastic is not None:
            values["elastic"] = _values(f"[{self.elastic}]", where=f"--elastic {self.elastic!r}: give ratios, as 0.5,1")
        for name in ("recover_steps", "recover_epochs", "blockwise", "at_once_steps", "exit_steps"):
            del values[name]
        recover = {name: value for name, value in values.items() if value is not None}
        found: dict[str, Any] = {"recover": recover} if recover else {}
        found |= {} if self.blockwise is None else {"blockwise": {"train": self.blockwise}}
        found |= {} if self.exit_steps is None else {"exits": {"steps": self.exit_steps}}
        return found if self.at_once_steps is None else {**found, "at_once": {"steps": self.at_once_steps}}


def _values(text: str, *, where: str) -> Any:
    """Read values as in a recipe."""
    from vitrim.config.yaml_files import read_yaml

    return read_yaml(text, where=where)
