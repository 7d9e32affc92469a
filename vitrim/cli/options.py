"""Options that several commands share, as they stand on the command line; what they mean is the recipe's business."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

SelectOn = Literal["weights", "activations", "outputs"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """What is cut, and how far."""

    recipe: Annotated[Path | None, Parameter(help="YAML file; options given here win over it")] = None
    method: Annotated[str | None, Parameter(help="one of `vitrim methods` (default dgmr)")] = None
    width_ratio: Annotated[
        float | None, Parameter(help="hidden width as a multiple of the model width (default 1)")
    ] = None
    keep_ratio: Annotated[float | None, Parameter(help="share of each MLP's units to keep")] = None
    width: Annotated[int | None, Parameter(help="units to keep in each MLP")] = None
    select_on: Annotated[
        SelectOn | None,
        Parameter(help="what dgmr tells units apart by; outputs where there are images, else weights"),
    ] = None
    repair: Annotated[bool | None, Parameter(help="closed-form repair after the cut")] = None
    refit: Annotated[bool | None, Parameter(help="the local refit that follows the repair")] = None
    seed: Annotated[int | None, Parameter(help="makes two runs equal")] = None
    device: Annotated[str | None, Parameter(help="auto, cpu, cuda, mps")] = None
    scope: Annotated[str | None, Parameter(help="dotted path of the subtree to cut")] = None
    stock: Annotated[bool | None, Parameter(help="take the nearest width that the model's own library can load")] = None

    def given(self) -> dict[str, Any]:
        """As values over a recipe; None stands for what was not given."""
        return {
            "method": self.method,
            "width_ratio": self.width_ratio,
            "keep_ratio": self.keep_ratio,
            "width": self.width,
            "options": None if self.select_on is None else {"select_on": self.select_on},
            "repair": self._repair(),
            "seed": self.seed,
            "device": self.device,
            "scope": self.scope,
            "stock": self.stock,
        }

    def _repair(self) -> Any:
        """The recipe's repair from two switches; `{}` stands for its defaults."""
        if self.repair is False:
            return False
        return {"refit": self.refit} if self.refit is not None else ({} if self.repair else None)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """Distillation after the cut."""

    steps: Annotated[int | None, Parameter(help="distillation steps; none without steps or epochs")] = None
    epochs: Annotated[float | None, Parameter(help="distillation epochs")] = None
    lr: Annotated[float | None, Parameter(help="distillation rate; found by a range test if not given")] = None
    batch_size: Annotated[int | None, Parameter(help="images a distillation step")] = None
    adapter: Annotated[
        Literal["lora", "op-lora"] | None, Parameter(help="train low-rank adapters, merged at the end")
    ] = None
    elastic: Annotated[
        str | None, Parameter(help="width ratios that one result shall serve, such as 0.5,1,2; see `vitrim slice`")
    ] = None
    cache_teacher: Annotated[
        bool | None, Parameter(negative="", help="store the teacher's targets once; later epochs don't run it")
    ] = None
    shard: Annotated[
        bool | None, Parameter(negative="", help="spread both models over the processes of torchrun (FSDP2)")
    ] = None
    track: Annotated[
        str | None, Parameter(help="trackers beside the log, such as tensorboard or wandb, separated by commas")
    ] = None

    def given(self) -> dict[str, Any] | None:
        """What was given, as the recipe has it; None where nothing was."""
        values = {
            "steps": self.steps,
            "epochs": self.epochs,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "adapter": self.adapter,
            "elastic": None if self.elastic is None else self.elastic.split(","),
            "cache_teacher": self.cache_teacher,
            "shard": self.shard,
            "track": None if self.track is None else self.track.split(","),
        }
        return {key: value for key, value in values.items() if value is not None} or None
