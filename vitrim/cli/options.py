"""Options that several commands share, as they stand on the command line; what they mean is the recipe's business."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from vitrim.config.options import Precision
from vitrim.errors import RecipeError

SelectOn = Literal["weights", "activations", "outputs"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """What is cut, and how far."""

    recipe: Annotated[Path | None, Parameter(help="YAML file; options given here win over it")] = None
    method: Annotated[str | None, Parameter(help="one of `vitrim methods` (default dgmr)")] = None
    mlp_ratio: Annotated[float | None, Parameter(help="hidden width as a multiple of the model width (default 1)")] = (
        None
    )
    keep_ratio: Annotated[float | None, Parameter(help="share of each MLP's units to keep")] = None
    width: Annotated[int | None, Parameter(help="units to keep in each MLP")] = None
    allocate: Annotated[
        Literal["auto", "uniform"] | None, Parameter(help="auto: widths that differ from MLP to MLP, at the same cost")
    ] = None
    budget: Annotated[
        Literal["params", "macs", "latency"] | None, Parameter(help="what allocate counts cost in (default params)")
    ] = None
    select_on: Annotated[
        SelectOn | None,
        Parameter(help="what dgmr tells units apart by; outputs where there are images, else weights"),
    ] = None
    option: Annotated[
        list[str] | None, Parameter(negative="", help="an option of the method, as KEY=VALUE; may be given again")
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
            "mlp_ratio": self.mlp_ratio,
            "keep_ratio": self.keep_ratio,
            "width": self.width,
            "allocate": self._allocate(),
            "options": self._options() or None,
            "repair": self._repair(),
            "seed": self.seed,
            "device": self.device,
            "scope": self.scope,
            "stock": self.stock,
        }

    def _options(self) -> dict[str, Any]:
        """The method's options; values are read as YAML, as they would be in a recipe."""
        from vitrim.config.recipe import read_yaml  # slow to import

        found: dict[str, Any] = {} if self.select_on is None else {"select_on": self.select_on}
        for given in self.option or ():
            key, equals, value = given.partition("=")
            if not (key and equals):
                raise RecipeError(f"--option {given!r}: give KEY=VALUE, such as --option sparsity=0.75.")
            found[key] = read_yaml(value, where=f"--option {given!r}: give KEY=VALUE, such as sparsity=0.75")
        return found

    def _allocate(self) -> Any:
        """The recipe's allocation; `{}` stands for its defaults."""
        if self.budget is not None and self.allocate == "uniform":
            raise RecipeError("allocate: a budget needs allocate=auto; drop one of the two.")
        if self.budget is not None:
            return {"budget": self.budget}
        return {} if self.allocate == "auto" else self.allocate

    def _repair(self) -> Any:
        """The recipe's repair from two switches; `{}` stands for its defaults."""
        if self.repair is False:
            return False
        return {"refit": self.refit} if self.refit is not None else ({} if self.repair else None)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """What is trained after the cut."""

    blockwise: Annotated[
        Literal["mlp", "block"] | None,
        Parameter(help="first train each block by itself: its MLP, or all of it"),
    ] = None
    steps: Annotated[int | None, Parameter(help="distillation steps; none without steps or epochs")] = None
    epochs: Annotated[float | None, Parameter(help="distillation epochs")] = None
    lr: Annotated[float | None, Parameter(help="distillation rate; found by a range test if not given")] = None
    batch_size: Annotated[int | None, Parameter(help="images a pass, over all processes")] = None
    gradient_accumulation_steps: Annotated[
        int | None, Parameter(help="passes a step, which so sees that many times --batch-size images")
    ] = None
    precision: Annotated[Precision | None, Parameter(help="auto is bf16 on GPUs that have it, float32 elsewhere")] = (
        None
    )
    checkpoint_activations: Annotated[
        bool | None, Parameter(negative="", help="compute the student's blocks twice rather than keep what they saw")
    ] = None
    save_every: Annotated[
        int | None, Parameter(help="keep a state to resume from every so many steps, beside those at validations")
    ] = None
    epoch_images: Annotated[
        int | None, Parameter(help="images an epoch, for data that has no length, such as a stream")
    ] = None
    adapter: Annotated[
        Literal["lora", "op-lora"] | None, Parameter(help="train low-rank adapters, merged at the end")
    ] = None
    elastic: Annotated[
        str | None, Parameter(help="MLP ratios that one result shall serve, such as 0.5,1,2; see `vitrim slice`")
    ] = None
    cache_teacher: Annotated[
        bool | None, Parameter(negative="", help="store the teacher's targets once; later epochs don't run it")
    ] = None
    fsdp: Annotated[
        bool | None, Parameter(negative="", help="spread both models over the processes of torchrun (FSDP2)")
    ] = None
    report_to: Annotated[
        str | None, Parameter(help="trackers beside the log, such as tensorboard or wandb, separated by commas")
    ] = None

    def given(self) -> dict[str, Any]:
        """As values over a recipe; None stands for what was not given."""
        values = {
            "steps": self.steps,
            "epochs": self.epochs,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "precision": self.precision,
            "checkpoint_activations": self.checkpoint_activations,
            "save_every": self.save_every,
            "epoch_images": self.epoch_images,
            "adapter": self.adapter,
            "elastic": None if self.elastic is None else self.elastic.split(","),
            "cache_teacher": self.cache_teacher,
            "fsdp": self.fsdp,
            "report_to": None if self.report_to is None else self.report_to.split(","),
        }
        return {
            "blockwise": None if self.blockwise is None else {"train": self.blockwise},
            "recover": {key: value for key, value in values.items() if value is not None} or None,
        }
