"""Plans a run on paper: the memory of each device, the least time, how many processes it needs, and how to start it.

No weights are read and no GPU is needed. A step is rehearsed on tensors without values, so any model that can be
distilled can be planned for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from vitrim.compression.budget import near_stock, solve_widths
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.cost.count import num_parameters
from vitrim.cost.gpus import GPUS, PER_NODE, RUNTIME_BYTES, Gpu, GpuName
from vitrim.cost.memory import MARGIN, estimate_memory, show_bytes
from vitrim.cost.rehearsal import Rehearsal, on_paper, rehearse
from vitrim.cost.training import Setup, Sizes, StepTime, step_time
from vitrim.data.inputs import random_inputs
from vitrim.data.views import fitting_views
from vitrim.distributed.precision import attention_in_float32
from vitrim.distributed.sharding import block_paths, checkpointed
from vitrim.errors import BudgetError, RecipeError
from vitrim.inputs import Inputs
from vitrim.methods import SiteMethod
from vitrim.models.features import features
from vitrim.models.load import load_model
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.recover.losses import class_loss, feature_loss
from vitrim.recover.targets import in_precision
from vitrim.surgery import KeepUnits, reshape_
from vitrim.torch_state import own_torch_state
from vitrim.types import MlpSite

# Options of a distillation that change what it holds in ways that are not planned for.
UNPLANNED = ("adapter", "elastic", "cache_teacher", "text_bank")
# Forward passes that a share of a step may be cut into, to fit.
PARTS = (1, 2, 4, 8, 16, 32)
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Teacher and student without values, and what they are fed with."""

    teacher: nn.Module
    student: nn.Module
    image_CHW: Tensor
    sites: Sequence[MlpSite]
    widths: Mapping[str, int]

    @property
    def sizes(self) -> Sizes:
        """Parameters of the two, and of their largest blocks."""
        blocks = block_paths(self.teacher)
        of = {
            name: max(num_parameters(model.get_submodule(path)) for path in blocks)
            for name, model in (("teacher_block", self.teacher), ("student_block", self.student))
        }
        largest = max(p.numel() for p in self.student.parameters())
        return Sizes(teacher=num_parameters(self.teacher), student=num_parameters(self.student), largest=largest, **of)

    def rehearsed(self, setup: Setup, options: RecoverOptions) -> Rehearsal:
        """Return what a forward and backward pass takes of as many images as a process has in one."""
        precision = options.model_copy(update={"precision": "bf16" if setup.bf16 else "fp32"})
        blocks = block_paths(self.student) if setup.checkpointed else []
        with on_paper(self.teacher, self.student) as (teacher, student):
            student.requires_grad_(True)
            images = torch.empty(setup.micro, *self.image_CHW.shape, dtype=self.image_CHW.dtype)

            def step() -> Tensor:
                with torch.no_grad(), in_precision(precision, CPU):
                    target = features(teacher, images, at=options.features_at)
                with in_precision(precision, CPU):
                    found = features(student, images, at=options.features_at)
                return (class_loss if options.features_at == "logits" else feature_loss)(found, target)

            # On paper all is on a CPU, whose attention in bf16 is left out where a GPU is meant.
            around: Mapping[str, Any] = {"around": noop_context_fn} if setup.on_gpu else {}
            again = checkpointed(student, blocks, **around) if blocks else nullcontext()
            with again, attention_in_float32(CPU, enabled=setup.bf16 and not setup.on_gpu):
                return rehearse(step, teacher, student)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run takes; bytes and seconds.

    Attributes:
        model: its name.
        gpu: kind of device.
        sizes: parameters.
        setup: how the distillation is spread.
        held: what a device holds while it distils, by what it is.
        cut: what it holds while it cuts, with its part of the images.
        main: main memory of each process.
        least: the fewest processes that the run fits on.
        step: least time of a step.
        num_steps: how many steps the distillation has.
        options: options of `compress` that have to be given for this.
    """

    model: str
    gpu: GpuName
    sizes: Sizes
    setup: Setup
    held: Mapping[str, float]
    cut: float
    main: float
    least: int
    step: StepTime
    num_steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Most bytes that a device holds."""
        return max(sum(self.held.values()), self.cut)

    @property
    def hours(self) -> float:
        """Least hours of the distillation."""
        return self.step.total * self.num_steps / 3600

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as rows of a table for people."""
        of, step = self.setup, self.step
        parts = {
            "matrix products": step.products,
            "memory": step.traffic,
            "optimizer": step.optimizer,
            "sending": step.sending,
            "of that hidden": -step.hidden,
        }
        return [
            ("parameters", f"{self.sizes.teacher:,} -> {self.sizes.student:,}"),
            ("devices", f"{of.processes} x {self.gpu}; the fewest that it fits on: {self.least}"),
            ("memory of each, at most", f"{_shown(self.peak)} of {_shown(GPUS[self.gpu].memory)}"),
            ("distilling", _shown(sum(self.held.values()))),
            *((f"- {name}", _shown(size)) for name, size in self.held.items() if size),
            ("cutting", _shown(self.cut)),
            ("main memory of each process", _shown(self.main)),
            ("images on each", f"{of.micro}, {of.parts} times in a step of {of.batch}"),
            ("a step, at least", f"{1000 * step.total:.1f} ms"),
            *((f"- {name}", f"{1000 * seconds:.1f} ms") for name, seconds in parts.items() if seconds),
            ("distillation, at least", f"{self.hours:.2f} h for {self.num_steps:,} steps"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        plain = {name: value for name, value in self.__dict__.items() if name not in ("sizes", "setup", "step")}
        parts = {name: dict(getattr(self, name).__dict__) for name in ("sizes", "setup", "step")}
        return {**plain, **parts, "held": dict(self.held), "peak": self.peak, "hours": self.hours}


@own_torch_state()
def plan_run(model: str, recipe: Recipe, *, images: int, gpus: int, gpu: GpuName) -> RunPlan:
    """Plan a run of `compress` on GPUs of a kind; options of `recipe.recover` that are given are kept.

    Args:
        model: a name or folder, as for `compress`; no weights are read.
        recipe: as for `compress`, with options of `recover`.
        images: how many images there are to train on.
        gpus: how many GPUs there are, one process for each.
        gpu: their kind.

    Raises:
        RecipeError: a number is not allowed, or an option is not planned for.
        BudgetError: the run does not fit on so many.
        ModelError: there is no such model.
    """
    options = _checked(recipe, images, gpus, gpu)
    pair = paired(model, recipe)
    planner = _Planner(pair, options, recipe, GPUS[gpu])
    setup = planner.chosen(gpus)
    if setup is None:
        raise BudgetError(_too_few(planner, gpus, gpu))
    least = next(count for count in range(1, gpus + 1) if planner.chosen(count) is not None)
    epochs = options.epochs or 0
    num_steps = options.steps or max(1, round(epochs * max(1, images // setup.batch)))
    return RunPlan(
        model=model,
        gpu=gpu,
        sizes=planner.sizes,
        setup=setup,
        held=planner.held(setup),
        cut=planner.cut(gpus),
        main=4 * planner.sizes.teacher + setup.main_bytes(planner.sizes),  # the model as it was loaded stays
        least=least,
        step=step_time(setup, planner.sizes, planner.rehearsal(setup), GPUS[gpu]),
        num_steps=num_steps,
        options=_options_of(setup, options),
    )


def _checked(recipe: Recipe, images: int, gpus: int, gpu: GpuName) -> RecoverOptions:
    """Return the options of the distillation, one epoch if there are none.

    Raises:
        RecipeError: a number is not allowed, or an option is not planned for.
    """
    if gpu not in GPUS:
        raise RecipeError(f"gpu: {gpu!r} is not known; use {', '.join(GPUS)}.")
    for name, value in (("images", images), ("gpus", gpus)):
        if value < 1:
            raise RecipeError(f"{name}: {value} is not allowed; give 1 or more.")
    if gpus > PER_NODE and gpus % PER_NODE:
        raise RecipeError(f"gpus: {gpus} don't fill machines of {PER_NODE}; give {gpus // PER_NODE * PER_NODE}.")
    options = recipe.recover or RecoverOptions(epochs=1)
    refused = next((name for name in UNPLANNED if getattr(options, name) is not None), None)
    refused = "cycles" if options.cycles > 1 else "loss" if options.loss == "labels" else refused
    if refused is not None or not options.has_length:
        said = refused or "schedule"
        raise RecipeError(f"recover.{said}: what this takes is not planned for; leave it out and give steps or epochs.")
    return options


def paired(model: str, recipe: Recipe) -> Pair:
    """Return a model's encoder and what is left of it after the cut that a recipe asks for, without values.

    Raises:
        ModelError: there is no such model, or the size of its inputs is not known.
    """
    whole, origin = load_model(model, weights=False, reading=recipe.reading())
    path, scope = resolve_scope(whole, recipe.scope, origin.encoder)
    teacher = copy.deepcopy(whole.get_submodule(path)).to("meta")
    sites = [site.within(path) for site in find_mlps(whole, scope=scope)]
    noise = random_inputs(origin, 1)
    if noise is None or isinstance(noise, Inputs) or path != origin.encoder:
        raise RecipeError(f"{model}: what one image is for it is not known, so no step can be rehearsed.")
    widths = _widths(recipe, origin, teacher, sites, noise)
    student = copy.deepcopy(teacher)
    reshape_(student, [KeepUnits.first(site, widths[site.path]) for site in sites])
    return Pair(teacher=teacher, student=student, image_CHW=noise[0], sites=sites, widths=widths)


def _widths(
    recipe: Recipe, origin: Origin, teacher: nn.Module, sites: Sequence[MlpSite], noise: Tensor
) -> Mapping[str, int]:
    """Return the widths that `compress` would choose, all MLPs alike."""
    units: Mapping[str, int] = solve_widths(recipe.width(), sites, teacher, noise.to("meta"))
    return units if recipe.steps[0].exact else near_stock(recipe.width(), units, origin, sites)[0]


class _Planner:
    """Tries ways to spread a run; a pass is rehearsed once for each way to make it."""

    def __init__(self, pair: Pair, options: RecoverOptions, recipe: Recipe, gpu: Gpu) -> None:
        self.pair, self.options, self.recipe, self.gpu = pair, options, recipe, gpu
        self.sizes = pair.sizes
        self.room = gpu.memory - RUNTIME_BYTES
        self.done: dict[bool, tuple[Setup, Rehearsal]] = {}

    def chosen(self, processes: int) -> Setup | None:
        """Return the first way that fits on so many processes, the fastest first; None if there is none."""
        if self.cut(processes) > self.room:
            return None
        return next((way for way in self.ways(processes) if sum(self.held(way).values()) <= self.room), None)

    def ways(self, processes: int) -> Iterator[Setup]:
        """Yield ways to spread the distillation, what was asked for kept: whole, blocks run again, shards, in parts."""
        given, options = self.options.model_fields_set, self.options
        batch = options.batch_size * options.gradient_accumulation_steps

        def tried(name: str, choices: Sequence[Any]) -> Sequence[Any]:
            return [getattr(options, name)] if name in given else choices

        for parts in tried("gradient_accumulation_steps", [count for count in PARTS if batch % count == 0]):
            for shards in tried("fsdp", [False, True] if processes > 1 else [False]):
                for again in tried("checkpoint_activations", [False, True] if parts == 1 else [True]):
                    yield self.setup(processes, parts=parts, fsdp=shards and processes > 1, checkpointed=again)

    def setup(self, processes: int, *, parts: int, fsdp: bool, checkpointed: bool) -> Setup:
        """Return a way to spread the distillation; the size of a step is that of the options."""
        options = self.options
        steps_by = options.model_copy(update={"fsdp": fsdp}).steps_by
        return Setup(
            processes=processes,
            batch=options.batch_size * options.gradient_accumulation_steps,
            parts=parts,
            fsdp=fsdp,
            checkpointed=checkpointed,
            bf16=options.precision != "fp32",
            moments=2 if steps_by == "adamw" else 1,
            ema=options.ema > 0,
        )

    def rehearsal(self, setup: Setup) -> Rehearsal:
        """Return a rehearsal of a setup's own pass."""
        kept = self.done.get(setup.checkpointed)
        if kept is None or kept[0].micro != setup.micro:
            self.done[setup.checkpointed] = setup, self.pair.rehearsed(setup, self.options)
        return self.done[setup.checkpointed][1]

    def held(self, setup: Setup) -> dict[str, float]:
        """Return what a device holds while it distils; from a rehearsal of another size where there is one."""
        bare = setup.device_bytes(self.sizes, 0)
        if sum(bare.values()) > self.room:
            return bare  # no pass has to be rehearsed to see that
        first, found = self.done.get(setup.checkpointed) or (setup, self.rehearsal(setup))
        activations = first.scaled(found.peak, self.sizes, setup.micro)
        return {name: MARGIN * size for name, size in setup.device_bytes(self.sizes, activations).items()}

    def cut(self, processes: int) -> float:
        """Return what a device holds while it cuts: both models whole, sums, and its part of the activations."""
        step, pair = self.recipe.steps[0], self.pair
        models = 2 * 4 * self.sizes.teacher
        method, repair = step.make_method(), step.repair_options()
        if not (isinstance(method, SiteMethod) and (method.needs == "images" or repair is not None)):
            return MARGIN * models
        asked = self.recipe.calibrate
        views = asked.views or fitting_views(asked.num_images, max(site.d_hidden for site in pair.sites))
        needs = estimate_memory(
            pair.sites,
            pair.widths.values(),
            repair,
            pair.teacher,
            pair.image_CHW,
            num_images=math.ceil(asked.num_images * views / processes),
            batch_size=asked.batch_size,
        )
        halves = 0 if repair is None else 8 * needs.hidden**2
        return MARGIN * (models + halves) + replace(needs, resident=0).bytes(offloaded=False, moments=torch.float64)


def _shown(size: float) -> str:
    """Return bytes for people."""
    return show_bytes(math.ceil(size))


def _too_few(planner: _Planner, gpus: int, gpu: GpuName) -> str:
    """Return what to say where a run does not fit on so many devices."""
    room = show_bytes(planner.room)
    if planner.cut(gpus) > planner.room and 8 * planner.sizes.teacher > planner.room:
        return (
            f"gpu: both models whole take {show_bytes(8 * planner.sizes.teacher)} while they are cut, and a {gpu} has "
            f"{room}; cut file to file with prune-checkpoint, or plan for another kind."
        )
    more = [count for count in (2, 4, 8, 16, 32, 64, 128, 256) if count > gpus]
    enough = next((count for count in more if planner.chosen(count) is not None), None)
    advice = "give a smaller batch_size" if enough is None else f"give --gpus {enough}"
    return f"gpus: the run does not fit into {room} on each of {gpus} {gpu}; {advice}."


def _options_of(setup: Setup, options: RecoverOptions) -> dict[str, Any]:
    """Return the options of a distillation that make it what was planned; the images of a step stay as many."""
    found: dict[str, Any] = {"batch_size": setup.batch // setup.parts}
    if setup.parts > 1:
        found["gradient_accumulation_steps"] = setup.parts
    found |= {"fsdp": True} if setup.fsdp else {}
    found |= {"checkpoint_activations": True} if setup.checkpointed else {}
    return found | ({"epochs": options.epochs} if options.steps is None else {"steps": options.steps})
