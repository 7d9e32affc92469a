"""The phases of the main job, each a function from values to a value; only the shared student is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from vitrim.compression.allocate import EQUAL, FOUND, LEAST_GAIN, allocate
from vitrim.compression.budget import near_stock, solve_widths
from vitrim.compression.cut import CutReport, cut_
from vitrim.compression.dtypes import check_result, is_float32, too_large, typed_copy
from vitrim.compression.job import Job
from vitrim.compression.saved_cut import resume_cut_, save_cut
from vitrim.compression.share import find_share
from vitrim.compression.trials import Settled, settle
from vitrim.config.options import AtOnceOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import model_size
from vitrim.cost.memory import check_memory
from vitrim.data import ImageSet, ImageStream, Split, augment_for, split_images
from vitrim.data.inputs import check_inputs, random_inputs
from vitrim.distributed.devices import resolve_device
from vitrim.distributed.processes import from_main, num_processes, on_main, plan_from_main, rank
from vitrim.errors import DataError
from vitrim.evaluation import measure, own_top1
from vitrim.methods import SiteMethod
from vitrim.metrics.fidelity import block_fidelity, compare, too_few
from vitrim.metrics.record import Closeness, ModelCost
from vitrim.models.features import device_of
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps
from vitrim.models.stock import stock_origin, why_not_stock
from vitrim.recover.at_once import train_at_once_
from vitrim.recover.distill import OnValidation, recover_
from vitrim.recover.elastic import Slice, Widths
from vitrim.recover.elastic_fit import Fitting, serving
from vitrim.recover.exits import train_exits_
from vitrim.recover.factors import TrainingSource
from vitrim.recover.result import Recovery
from vitrim.repair.blockwise import Blockwise, follow_cut_
from vitrim.surgery import Edit, KeepUnits, Plan, apply_
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class Models:
    """Both encoders on the device, in float32, and the data to compare them on.

    Attributes:
        teacher: the original, frozen.
        student: a copy, which the phases change.
        sites: MLPs to cut, by paths from the encoder.
        split: images for calibration, training and evaluation; None if there are none.
    """

    teacher: nn.Module
    student: nn.Module
    sites: Sequence[MlpSite]
    split: Split | None

    @property
    def batches(self) -> Sequence[Tensor] | None:
        """Calibration images, None if there are none."""
        return None if self.split is None else self.split.calibration

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the images."""
        return () if self.split is None else self.split.notes

    @property
    def counts(self) -> Mapping[str, Any]:
        """Number of images for each purpose."""
        return {} if self.split is None else self.split.counts


@dataclass(frozen=True, kw_only=True)
class ChosenWidths:
    """Hidden units that stay in each MLP, by path.

    `elastic` holds all widths of a result that serves several; `about` describes how unequal widths were found, and
    `cut` is the cut to them if that is made already, on the main process alone.
    """

    units: Mapping[str, int]
    elastic: Widths | None = None
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] | None = None
    cut: CutReport | None = None


def prepare(job: Job, context: RunContext) -> Models:
    """Copy the encoder twice, find the MLPs to cut, split the images, and check that the model runs on them.

    Raises:
        VitrimError: there is no MLP, the images don't fit the model, or memory is too small.
    """
    device = resolve_device(context.device)
    student = copy.deepcopy(job.encoder).to(device).float().eval()  # moments and small steps need more than bf16
    teacher = copy.deepcopy(student).requires_grad_(False)
    sites = find_mlps(teacher, scope=job.scope_in_encoder)
    work = context.work
    seen = work if work is not None and work.is_dir() else None  # it may not exist on another machine
    split = None
    if job.images is not None:
        num_units = max(site.d_hidden for site in sites)
        split = split_images(job.images, job.recipe, work=seen, model=teacher, num_units=num_units)
    if split is not None and not split.held_out and job.recipe.training:
        raise DataError(f"recover, at_once, blockwise, exits: {split.notes[-1]}")
    noise = random_inputs(job.origin) if split is None else None  # costs are measured on it
    check_inputs(teacher, job.origin, split.calibration if split else [] if noise is None else [noise])
    return Models(teacher=teacher, student=student, sites=sites, split=split)


def choose_widths(job: Job, models: Models, context: RunContext) -> ChosenWidths:
    """Turn the recipe's budget into hidden units of each MLP, rounded to what the library can load, or allocated.

    Raises:
        BudgetError: the MLPs can't meet the budget.
    """
    step, sites, notes = job.recipe.steps[0], models.sites, ()
    elastic = Widths.of(job.recipe, sites)
    units = on_main(_solve, job, models, context)
    if _may_round(job.recipe) and len(sites):
        units, note = near_stock(job.recipe.width(), units, job.origin, sites)
        notes = () if note is None else (note,)
    check_memory(models.teacher, sites, units.values(), job.recipe, models.batches)
    if step.allocate is None:
        return ChosenWidths(units=units, elastic=elastic, notes=notes)
    made: list[Settled] = []
    on_main(lambda: made.append(_allocated(job, models, units, context)))
    found = from_main(replace(made[0], cut=None) if made else None)
    assert found is not None
    cut = made[0].cut if made else None
    return ChosenWidths(units=found.units, notes=found.notes, about=found.about, cut=cut)


def _allocated(job: Job, models: Models, uniform: Mapping[str, int], context: RunContext) -> Settled:
    """Find widths that cost no more than equal ones, and keep the best; equal ones by preference if these are stock."""
    recipe, sites, teacher = job.recipe, models.sites, models.teacher
    equal = [KeepUnits.first(site.below(job.origin.encoder), uniform[site.path]) for site in sites]
    stock = recipe.steps[0].make_method().goes_by() == "widths" and stock_origin(job.origin, equal) is not None
    gain = LEAST_GAIN if stock else 0.0
    found = allocate(recipe, uniform, teacher, sites, models.batches, context=context, least_gain=gain)
    assert models.split is not None
    return settle(found, recipe, teacher, sites, models.split, least_gain=gain, quiet=context.quiet)


def _solve(job: Job, models: Models, context: RunContext) -> dict[str, int]:
    """Return the widths that meet the budget; for a method that does not cut units, they are found by trial."""
    width, method = job.recipe.width(), job.recipe.steps[0].make_method()
    inputs = models.split.sample if models.split is not None else random_inputs(job.origin)
    if method.goes_by() == "nothing":
        return {site.path: site.d_hidden for site in models.sites}
    if method.goes_by() == "share" and width.is_of_the_model:
        width = replace(width, kind="keep_ratio", value=find_share(job.recipe, models.teacher, models.sites, inputs))
    return solve_widths(width, models.sites, models.teacher, inputs)


def _may_round(recipe: Recipe) -> bool:
    """Return whether widths may be rounded to what a library can load.

    They may if all MLPs get equal widths, which allocated ones go by, and the one method cuts units of each MLP.
    """
    step = recipe.steps[0]
    elastic = recipe.recover is not None and recipe.recover.elastic is not None
    chosen = step.exact or step.widths is not None or elastic
    method = step.make_method()
    return len(recipe.steps) == 1 and isinstance(method, SiteMethod) and method.cuts() == "mlp" and not chosen


def cut_models_(models: Models, job: Job, widths: ChosenWidths, context: RunContext) -> CutReport:
    """Cut the student, or restore the cut of a stopped run; a cut that training follows is saved.

    Every process gets the main one's cut, so that all continue from the same bits.
    """
    work, recipe = context.work, job.recipe
    kept: list[CutReport | None] = []
    if context.resume and work is not None:
        on_main(lambda: kept.append(resume_cut_(models.student, recipe, work)))
        models.student.to(device_of(models.teacher))  # a restored cut was read from a file onto the CPU
    cut = _from_main(kept[0] if kept else None, models.student)
    if cut is not None:
        return cut
    if widths.cut is not None:
        apply_(models.student, widths.cut.plan.edits)
    cut = _from_main(widths.cut, models.student)
    if cut is None:
        cut = cut_(
            models.student,
            models.teacher,
            models.sites,
            recipe,
            models.batches,
            widths=widths.units,
            quiet=context.quiet,
            source=_source(models, job, context),
        )
        cut = _from_main(cut, models.student) or cut
    if work is not None and recipe.training:
        on_main(save_cut, models.student, cut, recipe, work)
    return cut


def _from_main(cut: CutReport | None, student: nn.Module) -> CutReport | None:
    """Send the main process's cut and student to every process; return None if it has no cut."""
    plan = plan_from_main(None if cut is None else cut.plan, student)
    errors, notes = from_main(({}, ()) if cut is None else (cut.errors, cut.notes))
    return None if plan is None else CutReport(plan=plan, errors=errors, notes=notes)


def judge(models: Models, job: Job, plan: Plan) -> tuple[Closeness | None, str | None]:
    """Measure how close the student, as it is returned, is on held-out images, overall and for each block.

    Returns:
        The closeness, None without images; and why the result has to be in float32, None where the original's types
        can hold it.

    Raises:
        ModelError: a tensor of the student is not finite.
    """
    check_result(job.encoder, models.student)
    why = too_large(job.encoder, models.student)
    if why is None:
        found = _closeness(models, typed_copy(job.encoder, models.student), plan)
        if found is None or math.isfinite(found.relative_error) or is_float32(job.encoder):
            return found, None
        why = "features overflow in the original's type, so the result is in float32; load it in that or in bfloat16."
    return _closeness(models, models.student, plan), why


def _closeness(models: Models, student: nn.Module, plan: Plan) -> Closeness | None:
    if models.split is None or not models.split.held_out:
        return None
    found, outputs, _ = compare(student, models.teacher, models.split.held_out)
    every = {site.block: plan.new_path(site.block) for site in models.sites}
    left = {block: new for block, new in every.items() if new is not None}
    rows = block_fidelity(student, models.teacher, models.split.held_out, list(left), new_names=left)
    own = own_top1(student, outputs)
    return Closeness(fidelity=found, blocks=rows, top1=own, num_labelled=outputs.num_labelled)


def judging_notes(judged: Closeness | None) -> tuple[str, ...]:
    """Return a warning where too few images judged the student."""
    return () if judged is None else too_few(judged.num_images)


def beside_equal_widths(widths: ChosenWidths, judged: Closeness | None) -> Mapping[str, Any] | None:
    """Return how widths were found, with the errors on held-out images: of the result, and of equal widths."""
    if widths.about is None or judged is None:
        return widths.about
    tried = widths.about.get("tried", {}).get(EQUAL, {})
    errors = {FOUND: judged.relative_error, EQUAL: tried.get("held_out", judged.relative_error)}
    return {**widths.about, "relative_error": errors}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Results of training after the cut, in order, and the other widths of an elastic run."""

    blocks: Blockwise | None = None
    at_once: Recovery | None = None
    recovery: Recovery | None = None
    exits: Recovery | None = None
    slices: Mapping[float, Slice] = field(default_factory=dict)

    @property
    def anything(self) -> bool:
        """Whether anything was trained."""
        return any(step is not None for step in (self.blocks, self.at_once, self.recovery, self.exits))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""
        steps = (self.blocks, self.at_once, self.recovery, self.exits)
        return tuple(note for step in steps if step is not None for note in step.notes)

    def describe(self) -> dict[str, Any]:
        """Return the fields of `Metrics` about training."""
        return {
            "blockwise": None if self.blocks is None else dict(self.blocks.__dict__),
            "at_once": None if self.at_once is None else dict(self.at_once.__dict__),
            "recovery": None if self.recovery is None else dict(self.recovery.__dict__),
            "exits": None if self.exits is None else dict(self.exits.__dict__),
            "elastic": {f"{ratio:g}": dict(found.errors) for ratio, found in self.slices.items()} or None,
        }


def train_(
    models: Models, job: Job, widths: Widths | None, context: RunContext, on_validation: OnValidation | None
) -> Trained:
    """Train the student by block, all blocks at once, end to end and at exits, as far as the recipe asks for it."""
    recipe, split = job.recipe, models.split
    blocks = follow_cut_(models.student, models.teacher, models.sites, recipe, split, context=context)
    at_once = None if split is None or recipe.at_once is None else _train_at_once_(models, job, split, context)
    recovery, slices = None, {}
    if split is not None and recipe.recover is not None:
        fitting = Fitting(
            teacher=models.teacher,
            batches=split.calibration,
            held_out=[batch.images_BCHW for batch in split.held_out],
            options=recipe.steps[0].repair_options(),
            at=recipe.recover.features_at,
        )
        with serving(models.student, widths, fitting) as slices:
            recovery = _distil_(models, job, split, widths, context, on_validation)
    exits = _train_exits_(models, job, context)
    return Trained(blocks=blocks, at_once=at_once, recovery=recovery, exits=exits, slices=slices)


def _train_at_once_(models: Models, job: Job, split: Split, context: RunContext) -> Recovery:
    """Train all blocks at once on the training images, augmented as in distillation."""
    options = job.recipe.at_once
    assert options is not None
    images, held_out = _augmented(job, split, options, context), [batch.images_BCHW for batch in split.held_out]
    given = {"held_out": held_out, "options": options, "context": context}
    return train_at_once_(models.student, models.teacher, images, **given)


def _train_exits_(models: Models, job: Job, context: RunContext) -> Recovery | None:
    """Train early exits on the training images, if the recipe asks for it, augmented as in distillation."""
    options, split = job.recipe.exits, models.split
    if options is None or split is None:
        return None
    images, held_out = _augmented(job, split, options, context), [batch.images_BCHW for batch in split.held_out]
    given = {"held_out": held_out, "options": options, "context": context}
    return train_exits_(models.student, models.teacher, images, **given)


def _source(models: Models, job: Job, context: RunContext) -> TrainingSource | None:
    """Return the images that a method which trains sees, augmented as for recovery; None if there are none."""
    if models.split is None:
        return None
    options = job.recipe.recover or RecoverOptions(steps=1)
    images = _augmented(job, models.split, options, context)
    ranks = {"rank": rank(), "num_processes": num_processes()}
    return TrainingSource(images=images, context=context, made=job.recipe.dump(), **ranks)


def _augmented(
    job: Job, split: Split, options: AtOnceOptions | RecoverOptions, context: RunContext
) -> ImageSet | ImageStream:
    """Return the training images, augmented where the model's preprocessing is known."""
    known = job.origin.preprocessing
    augment = augment_for(known, options.augment, flip=options.flip) if "mean" in known else None
    return split.train.augmented(augment, context.seed)


def _distil_(
    models: Models,
    job: Job,
    split: Split,
    widths: Widths | None,
    context: RunContext,
    on_validation: OnValidation | None,
) -> Recovery:
    """Distil on the training images, augmented; tensors are used as they are."""
    options = job.recipe.recover
    assert options is not None
    return recover_(
        models.student,
        models.teacher,
        _augmented(job, split, options, context),
        held_out=[batch.images_BCHW for batch in split.held_out],
        options=options,
        context=context,
        widths=widths,
        space=job.space,
        on_validation=on_validation,
    )


def measure_costs(models: Models, job: Job, judged: Closeness | None) -> tuple[ModelCost, ModelCost]:
    """Measure what original and student cost, and their top-1 on held-out images if they have a head and labels.

    The student's top-1 is that of the tensors that are returned, from `judged`.
    """
    split = models.split
    sample, held_out = (None, None) if split is None else (split.sample, split.held_out)
    before, after = measure(models.teacher, models.student, job.origin, sample, held_out)
    return before, after if judged is None else replace(after, top1=judged.top1)


def with_bytes(cost: ModelCost, model: nn.Module) -> ModelCost:
    """Add the bytes of a model as it is written, in the original's tensor types."""
    return replace(cost, num_bytes=model_size(model)["num_bytes"])


def stock_notes(origin: Origin, edits: Sequence[Edit], stock: Origin | None) -> tuple[str, ...]:
    """Return a note on why the model's own library can't load the result, or nothing if it can."""
    return () if stock is not None else (why_not_stock(origin, edits),)
