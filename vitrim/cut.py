"""Cuts a student block after block: a method selects, least squares repairs, surgery cuts, a short refit settles.

This is the one place where the four meet. It decides nothing itself and touches no module but through surgery and
refit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, walk
from vitrim.checkpoint import CUT_STATE, versions, write_json
from vitrim.errors import BudgetError, CheckpointError, RecipeError
from vitrim.methods import Method, MethodOptions, find_method
from vitrim.models.origin import Origin
from vitrim.models.stock import nearest_stock_width
from vitrim.ops.least_squares import fit_output, squared_error
from vitrim.progress import progress
from vitrim.recipe import Recipe, RepairOptions
from vitrim.recover.refit import refit_, site_tensors
from vitrim.surgery import apply_, read_weights, reshape_
from vitrim.types import KeepUnits, MlpSite, MlpWeights, Plan, SiteView


@dataclass(frozen=True, kw_only=True)
class CutReport:
    """What the cut did at each site: errors per token against the target, and notes for the user."""

    plan: Plan
    errors: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]


def cut_(
    student: nn.Module,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    recipe: Recipe,
    batches: Sequence[Tensor] | None,
    *,
    quiet: bool = False,
    done: Sequence[KeepUnits] = (),
    keep_edit: Callable[[KeepUnits, Mapping[str, float]], KeepUnits] | None = None,
    spill: Path | None = None,
    moments: torch.dtype = torch.float64,
) -> CutReport:
    """Cut every site of a student in place.

    Args:
        student: a copy of the teacher.
        teacher: the original.
        sites: what to cut; each to `recipe.width_of(site)` units.
        recipe: method, options, repair.
        batches: calibration images, or None: then only methods that need weights alone can run, without repair.
        quiet: show no progress.
        done: edits that the student has behind it, from a run that was stopped.
        keep_edit: called with each edit and its errors; what it returns stands in the plan in its place.
        spill: folder for calibration activations; None keeps them in memory.
        moments: type in which second moments are stored.

    Returns:
        The plan (with the repaired tensors) and what was measured on the way.

    Raises:
        BudgetError: a width is outside what a site has.
        RecipeError: the method needs images and there are none.
    """
    method, options = find_method(recipe.method), find_method(recipe.method).parse_options(recipe.options)
    repair = recipe.repair_options() if batches is not None else None
    widths = {site.path: recipe.width_of(site) for site in sites}
    edits, behind = list(done), {edit.site.path for edit in done}
    errors: dict[str, dict[str, float]] = {}
    notes = _notes(method, recipe, batches)
    with progress("cut", len(sites), quiet=quiet) as bar:
        bar.done = len(edits)
        visits = _visits(
            teacher, student, sites, recipe, method, repair, batches, skip=behind, spill=spill, moments=moments
        )
        for site, visit in visits:
            seed = recipe.seed + len(edits)
            edit = select(read_weights(student, site), site, visit, widths[site.path], method, options, seed)
            if repair is not None and visit is not None:
                edit, errors[site.path] = _repair_(student, edit, visit, repair, recipe.seed)
                notes += _visit_notes(visit, repair)
            else:
                apply_(student, [edit])
            edits.append(edit if keep_edit is None else keep_edit(edit, errors.get(site.path, {})))
            bar.advance(1, site.path)
            del visit  # its sums must not live on beside those of the next one
    plan = Plan(
        edits=tuple(edits),
        method=recipe.method,
        options=options.model_dump(mode="json"),
        seed=recipe.seed,
        versions=versions(),
    )
    return CutReport(plan=plan, errors=errors, notes=tuple(notes))


def save_cut(student: nn.Module, cut: CutReport, recipe: Recipe, work: Path) -> None:
    """Keep a finished cut, so that a stopped recovery can go on from it."""
    save_file({name: tensor.contiguous() for name, tensor in student.state_dict().items()}, work / "cut.safetensors")
    (work / "recipe.yaml").write_text(recipe.dump())
    about = {"plan": cut.plan.to_json(), "errors": cut.errors, "notes": list(cut.notes)}
    write_json(work / CUT_STATE, about)


def resume_cut_(student: nn.Module, recipe: Recipe, work: Path) -> CutReport | None:
    """Take up the cut that `save_cut` kept, in place; None where there is none.

    Raises:
        RecipeError: it was made by another recipe.
        CheckpointError: it is damaged.
    """
    if not (work / CUT_STATE).exists():
        return None
    if (work / "recipe.yaml").read_text() != recipe.dump():
        raise RecipeError(f"resume: {work / 'recipe.yaml'} differs from this run's recipe; run without resume.")
    try:
        about = json.loads((work / CUT_STATE).read_text())
        tensors = load_file(work / "cut.safetensors")
        plan = Plan.from_json(about["plan"])
        reshape_(student, plan.edits)
        student.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{work}: the stopped run can't be read ({error!r:.200}); run without resume.") from None
    repaired = [bool(edit["repaired"]) for edit in about["plan"]["edits"]]
    edits = [
        replace(edit, repaired=site_tensors(student, edit.site)) if done else edit
        for edit, done in zip(plan.edits, repaired, strict=True)
    ]
    return CutReport(plan=replace(plan, edits=tuple(edits)), errors=about["errors"], notes=tuple(about["notes"]))


def with_stock_width(recipe: Recipe, origin: Origin, sites: Sequence[MlpSite]) -> Recipe:
    """Where a recipe asks for `stock`, the recipe with the nearest width that the library's own config can express.

    Raises:
        BudgetError: there is none near.
    """
    if not recipe.stock:
        return recipe
    asked = recipe.width_of(sites[0])
    found = nearest_stock_width(origin, sites, asked)
    if found is None:
        raise BudgetError(f"stock: {origin.library or origin.name} has no config for a width near {asked}; drop stock.")
    return recipe if found == asked else recipe.updated({"width_ratio": found / sites[0].d_model, "round_to": 1})


def _visits(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[MlpSite],
    recipe: Recipe,
    method: Method,
    repair: RepairOptions | None,
    batches: Sequence[Tensor] | None,
    *,
    skip: Collection[str],
    spill: Path | None,
    moments: torch.dtype,
) -> Iterator[tuple[MlpSite, SiteVisit | None]]:
    """Sites in the order in which they are to be cut, with what calibration saw of them, where anything asks for it."""
    if batches is None or (repair is None and method.needs == "weights"):
        yield from ((site, None) for site in sites if site.path not in skip)
        return
    repair = repair or RepairOptions(feedback=0.0)
    num_held_out = max(1, len(batches) // 10) if len(batches) > 1 else 0
    for visit in walk(
        teacher,
        student,
        sites,
        batches,
        feedback=repair.feedback,
        num_held_out=num_held_out,
        max_tokens=repair.max_tokens,
        skip=skip,
        spill=spill,
        moments=moments,
    ):
        yield visit.site, visit
        del visit


def select(
    weights: MlpWeights,
    site: MlpSite,
    visit: SiteVisit | None,
    width: int,
    method: Method,
    options: MethodOptions,
    seed: int,
) -> KeepUnits:
    """Ask the method which units stay."""
    view = SiteView(
        site=site,
        weights=weights,
        num_keep=width,
        generator=torch.Generator().manual_seed(seed),
        stats=None if visit is None else visit.stats,
        scale_D=None if visit is None else visit.scale_D,
    )
    return KeepUnits(site=site, keep=tuple(int(i) for i in method.select(view, options)))


def _repair_(
    student: nn.Module, edit: KeepUnits, visit: SiteVisit, repair: RepairOptions, seed: int
) -> tuple[KeepUnits, dict[str, float]]:
    """Least squares, the cut itself, then the refit; the edit ends up with the tensors that came of it."""
    original, site, keep = edit, edit.site, torch.tensor(edit.keep)
    if site.norm is not None:  # a norm over fewer units has other statistics: cut first, then see what they are
        apply_(student, [edit])
        site, keep = replace(site, d_hidden=edit.width), torch.arange(edit.width)
        edit, visit = KeepUnits(site=site, keep=tuple(range(edit.width))), visit.again()
    weights = read_weights(student, site)
    start_DK, bias_D = weights.output_DH[:, keep.to(weights.output_DH.device)], weights.output_bias_D
    fitted_DK, fitted_D = fit_output(visit.stats, keep, start_DK, bias_D, ridge=repair.ridge)
    errors = {
        "unrepaired": squared_error(visit.stats, keep, start_DK, bias_D),
        "repaired": squared_error(visit.stats, keep, fitted_DK, fitted_D),
    }
    repaired = {f"{site.output}.weight": fitted_DK}
    if fitted_D is not None:
        repaired[f"{site.output}.bias"] = fitted_D
    apply_(student, [replace(edit, repaired=repaired)])
    if repair.refit and visit.stands_alone:
        before, after = refit_(student, visit, num_steps=repair.refit_steps, lr=repair.refit_lr, seed=seed)
        errors |= {"held_out_repaired": before, "held_out_refitted": after}
    return replace(original, repaired=site_tensors(student, site)), errors


def _visit_notes(visit: SiteVisit, repair: RepairOptions) -> list[str]:
    """What could not be done at a site because of how its block is built."""
    notes = []
    if visit.scale_D is None and repair.feedback > 0:
        notes.append(f"{visit.site.path}: no fixed layer scale behind the MLP, so its target has no feedback.")
    if visit.site.norm is not None:
        notes.append(f"{visit.site.path}: a norm over the hidden units sees other statistics after the cut.")
    if not visit.stands_alone and repair.refit:
        notes.append(f"{visit.site.path}: the MLP can't be run outside its block, so it was not refitted.")
    return notes


def _notes(method: Method, recipe: Recipe, batches: Sequence[Tensor] | None) -> list[str]:
    """What the user should know about choices made for them."""
    if batches is not None:
        return []
    notes = []
    if method.needs == "images":
        notes.append("no images given: units were selected on weights alone; pass data to select by what they do.")
    if recipe.repair_options() is not None:
        notes.append("no images given: nothing was repaired; pass data for closed-form repair.")
    return notes
