"""The phases of the main job, each a function from values to a value; only the shared student is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vitrim.compression.ahead import say_ahead
from vitrim.compression.allocate import EQUAL, FOUND, LEAST_GAIN, Allocation, allocate
from vitrim.compression.budget import near_stock, solve_widths
from vitrim.compression.cut import CutReport, cut_
from vitrim.compression.depth import Shallower, check_depth
from vitrim.compression.job import Job, Models
from vitrim.compression.judging import with_enough_to_choose
from vitrim.compression.saved_cut import resume_cut_, save_cut
from vitrim.compression.share import find_share
from vitrim.compression.training import training_source
from vitrim.compression.trials import Settled, settle
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import model_size
from vitrim.cost.memory import check_memory
from vitrim.data import split_images
from vitrim.data.inputs import check_inputs, random_inputs, scaled_notes
from vitrim.distributed.devices import resolve_device
from vitrim.distributed.processes import from_main, on_main, plan_from_main
from vitrim.distributed.sharing import shared_on
from vitrim.errors import DataError, RecipeError, SiteNotFoundError
from vitrim.evaluation import measure
from vitrim.inputs import Inputs
from vitrim.methods import ModelMethod, SiteMethod
from vitrim.metrics.record import Closeness, ModelCost
from vitrim.models.exits import Loops
from vitrim.models.features import device_of
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps
from vitrim.models.stock import stock_origin, why_not_stock
from vitrim.recover.at_once import check_blocks
from vitrim.recover.elastic import Widths
from vitrim.surgery import DropBlocks, Edit, KeepUnits, apply_
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class ChosenWidths:
    """Hidden units that stay in each MLP, by path.

    `share` is what was found by trial for a method that goes by one. `elastic` holds all widths of a result that serves
    several; `about` describes how unequal widths were found, `run` are blocks that are taken out (paths are those
    without them), and `cut` is the cut to them if that is made already, on the main process alone.
    """

    units: Mapping[str, int]
    share: float | None = None
    run: DropBlocks | None = None
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
    sites = _mlps(job, teacher)
    noise = random_inputs(job.origin)
    if noise is not None:
        _check_blocks(job.recipe, teacher, sites, noise)
    work = context.work
    seen = work if work is not None and work.is_dir() else None  # it may not exist on another machine
    split = None
    if job.images is not None:
        num_units = max((site.d_hidden for site in sites), default=0)
        split = split_images(job.images, job.recipe, work=seen, model=teacher, num_units=num_units)
        scaled = scaled_notes(split.counts.get("modes", {}), job.origin)
        split = replace(split, notes=(*scaled, *split.notes))
        if noise is None:
            _check_blocks(job.recipe, teacher, sites, split.sample)
        if job.recipe.steps[0].allocate is not None:
            split = with_enough_to_choose(split)
    if split is not None and not split.held_out and job.recipe.training:
        raise DataError(f"recover, at_once, blockwise, exits: {split.notes[-1]}")
    check_inputs(teacher, job.origin, split.calibration if split else [] if noise is None else [noise])
    return Models(teacher=teacher, student=student, sites=sites, split=split)


def _mlps(job: Job, teacher: nn.Module) -> Sequence[MlpSite]:
    """Return the MLPs to cut; none of a model without any, for methods that do not need them.

    Raises:
        SiteNotFoundError: there is none, and a method needs one.
    """
    try:
        return find_mlps(teacher, scope=job.scope_in_encoder)
    except SiteNotFoundError:
        if any(step.make_method().needs_mlps for step in job.recipe.steps):
            raise
        return ()


def _check_blocks(recipe: Recipe, teacher: nn.Module, sites: Sequence[MlpSite], images: Tensor) -> None:
    """Check that training can do with these images, and that blocks can be trained alone, or taken out, where asked.

    Raises:
        RecipeError: it can't.
    """
    allocate = recipe.steps[0].allocate
    if isinstance(images, Inputs) and recipe.recover is not None and recipe.recover.cache_teacher is not None:
        raise RecipeError("recover.cache_teacher: holds as many tokens of each image, and here they differ; drop it.")
    if isinstance(images, Inputs) and images.real_BN is not None and (recipe.at_once or recipe.blockwise):
        raise RecipeError("at_once, blockwise: compare blocks at all tokens, and some are padding; use recover alone.")
    if recipe.at_once is not None:
        check_blocks(teacher, images)
    if allocate is not None and allocate.depth:
        check_depth(teacher, sites, images)


def choose_widths(job: Job, models: Models, context: RunContext) -> ChosenWidths:
    """Turn the recipe's budget into hidden units of each MLP, rounded to what the library can load, or allocated.

    Raises:
        BudgetError: the MLPs can't meet the budget.
    """
    step, sites, notes = job.recipe.steps[0], models.sites, ()
    elastic = Widths.of(job.recipe, sites)
    units, share = on_main(_solve, job, models, context)
    if _may_round(job.recipe) and len(sites):
        units, note = near_stock(job.recipe.width(), units, job.origin, sites)
        notes = () if note is None else (note,)
    check_memory(models.teacher, sites, units.values(), job.recipe, models.batches)
    if step.allocate is None:
        return ChosenWidths(units=units, share=share, elastic=elastic, notes=notes)
    made: list[Settled] = []
    on_main(lambda: made.append(_allocated(job, models, units, context)))
    found = from_main(replace(made[0], cut=None) if made else None)
    assert found is not None
    cut = made[0].cut if made else None
    return ChosenWidths(units=found.units, run=found.run, notes=found.notes, about=found.about, cut=cut)


def _allocated(job: Job, models: Models, uniform: Mapping[str, int], context: RunContext) -> Settled:
    """Find widths that cost no more than equal ones, and keep the best; equal ones by preference if these are stock."""
    recipe, sites, teacher = job.recipe, models.sites, models.teacher
    equal = [KeepUnits.first(site.below(job.origin.encoder), uniform[site.path]) for site in sites]
    stock = recipe.steps[0].make_method().goes_by() == "widths" and stock_origin(job.origin, equal) is not None
    gain = LEAST_GAIN if stock else 0.0
    found = allocate(recipe, uniform, teacher, sites, models.batches, context=context, least_gain=gain)
    assert models.split is not None and models.batches is not None
    shallower = _shallower(job, models, found, gain)
    num_tried = len(found.candidates) + (0 if shallower is None else 2 * shallower.most)
    say_ahead(models, uniform, recipe, context, num_cuts=num_tried + (len(recipe.steps) > 1 and num_tried > 1))
    given = {"least_gain": gain, "shallower": shallower, "quiet": context.quiet}
    return settle(found, recipe, teacher, sites, models.split, **given)


def _shallower(job: Job, models: Models, found: Allocation, gain: float) -> Shallower | None:
    """Return what gives candidates with fewer blocks, None if nobody asked for them."""
    step = job.recipe.steps[0]
    if step.allocate is None or not step.allocate.depth:
        return None
    assert models.batches is not None
    return Shallower(
        found=found,
        origin=job.origin,
        teacher=models.teacher,
        sites=models.sites,
        batches=models.batches,
        counted=step.allocate.cost,
        mlps_alone=step.make_method().goes_by() == "widths",
        rounds=_may_round(job.recipe),
        least_gain=gain,
    )


def _solve(job: Job, models: Models, context: RunContext) -> tuple[dict[str, int], float | None]:
    """Return the widths that meet the budget, and the share that leads to them where it is found by trial."""
    width, method = job.recipe.width(), job.recipe.steps[0].make_method()
    inputs = models.split.sample if models.split is not None else random_inputs(job.origin)
    if method.goes_by() == "nothing":
        return {site.path: site.d_hidden for site in models.sites}, None
    share = None
    if method.goes_by() == "share" and width.is_of_the_model:
        share = find_share(job.recipe, models.teacher, models.sites, inputs)
        width = replace(width, kind="keep_ratio", value=share)
    return solve_widths(width, models.sites, models.teacher, inputs), share


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
    if widths.about is None:  # else it was said before cuts were tried
        on_main(say_ahead, models, widths.units, recipe, context)
    if widths.cut is not None:
        apply_(models.student, widths.cut.plan.edits)
    cut = _from_main(widths.cut, models.student)
    if cut is None:
        cut = _cut_(models, job, widths, context)
    if recipe.exits is not None:
        Loops(models.student)  # else it says that there are none, and leaves no state behind
    if work is not None and recipe.training:
        on_main(save_cut, models.student, cut, recipe, work)
    return cut


def _cut_(models: Models, job: Job, widths: ChosenWidths, context: RunContext) -> CutReport:
    """Cut the student by the chosen widths, or the share that was found, and send it to every process."""
    by_share = widths.share is not None and isinstance(job.recipe.steps[0].make_method(), ModelMethod)
    cut = cut_(
        models.student,
        models.teacher,
        models.sites,
        job.recipe.updated({"keep_ratio": widths.share}) if by_share else job.recipe,
        models.batches,
        widths=widths.units,
        run=widths.run,
        quiet=context.quiet,
        halves=True,
        source=training_source(models, job, context),
        share=shared_on(device_of(models.teacher)),
    )
    return _from_main(cut, models.student) or cut


def _from_main(cut: CutReport | None, student: nn.Module) -> CutReport | None:
    """Send the main process's cut and student to every process; return None if it has no cut."""
    plan = plan_from_main(None if cut is None else cut.plan, student)
    errors, notes = from_main(({}, ()) if cut is None else (cut.errors, cut.notes))
    return None if plan is None else CutReport(plan=plan, errors=errors, notes=notes)


def beside_equal_widths(widths: ChosenWidths, judged: Closeness | None) -> Mapping[str, Any] | None:
    """Return how widths were found, with the errors on held-out images: of the result, and of equal widths."""
    if widths.about is None or judged is None:
        return widths.about
    tried = widths.about.get("tried", {}).get(EQUAL, {})
    errors = {FOUND: judged.relative_error, EQUAL: tried.get("held_out", judged.relative_error)}
    return {**widths.about, "relative_error": errors}


def measure_costs(
    models: Models, job: Job, context: RunContext, judged: Closeness | None
) -> tuple[ModelCost, ModelCost]:
    """Measure what original and student cost, and their top-1 on held-out images if they have a head and labels.

    The student's top-1 is that of the tensors that are returned, from `judged`.
    """
    split = models.split
    sample, held_out = (None, None) if split is None else (split.sample, split.held_out)
    before, after = measure(models.teacher, models.student, job.origin, sample, held_out, quiet=context.quiet)
    return before, after if judged is None else replace(after, top1=judged.top1)


def with_bytes(cost: ModelCost, model: nn.Module) -> ModelCost:
    """Add the bytes of a model as it is written, in the original's tensor types."""
    return replace(cost, num_bytes=model_size(model)["num_bytes"])


def stock_notes(origin: Origin, edits: Sequence[Edit], stock: Origin | None) -> tuple[str, ...]:
    """Return a note on why the model's own library can't load the result, or nothing if it can."""
    return () if stock is not None else (why_not_stock(origin, edits),)
