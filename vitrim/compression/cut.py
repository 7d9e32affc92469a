"""Cuts a student block by block: a method selects, least squares repairs, surgery cuts, a short refit adjusts.

These four meet only here. This module decides nothing itself, and changes modules only through surgery and refit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.calibrate import LiveModelView, SiteVisit, num_held_out, walk
from vitrim.calibrate.activations import Activations
from vitrim.calibrate.runs import past_run
from vitrim.compression.asking import metrics_for, select
from vitrim.compression.budget import solve_widths
from vitrim.compression.heads import HeadsCut, equal_share
from vitrim.config.options import RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.config.steps import Step
from vitrim.errors import BudgetError, RecipeError, SiteNotFoundError
from vitrim.methods import Method, ModelMethod, ReplaceMe, SiteMethod, find_method
from vitrim.models.sites import find_mlps
from vitrim.output.provenance import versions
from vitrim.progress import progress
from vitrim.recover.factors import TrainingSource, train_factors_
from vitrim.repair.closed_form import repair_, visit_notes
from vitrim.share import ALONE, Share
from vitrim.surgery import DropBlocks, Edit, KeepUnits, Plan, apply_, read_weights
from vitrim.types import MlpSite

Entered = Callable[[str, Activations, Activations], None]
WHOLE = "every hidden unit stays, so nothing was cut or repaired."


@dataclass(frozen=True, kw_only=True)
class CutReport:
    """What the cut did at each MLP: errors per token relative to the target, and notes for the user."""

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
    widths: Mapping[str, int] | None = None,
    run: DropBlocks | None = None,
    quiet: bool = False,
    done: Sequence[KeepUnits] = (),
    keep_edit: Callable[[KeepUnits, Mapping[str, float]], KeepUnits] | None = None,
    offload: Path | None = None,
    moments: torch.dtype = torch.float64,
    halves: bool = False,
    source: TrainingSource | None = None,
    share: Share = ALONE,
) -> CutReport:
    """Cut a student in place, applying a recipe's steps in turn.

    Args:
        student: a copy of the teacher, which is changed.
        teacher: the original.
        sites: MLPs to cut.
        recipe: steps and seed.
        batches: calibration images, or None: then only methods that need weights alone can run, without repair.
        widths: hidden units that the first step keeps of each MLP, by path, and for a method that cuts attention also
            dimensions of each head, or heads; by default from the recipe's budget.
        run: blocks to take out before the first step, as `replace-me` found them; then paths are those without them.
        quiet: show no progress.
        done: edits already made to the student by a run that was stopped; for a recipe of one step.
        keep_edit: called with each cut of an MLP and its errors; its result replaces the cut in the plan.
        offload: folder for calibration activations; None keeps them in memory.
        moments: type in which second moments are stored.
        halves: also fit each MLP on half of the images, for what more of them would bring; takes sums twice.
        source: images for a method that trains, and where its state is kept; None trains on `batches`.
        share: of the calibration images, where processes cut together; each is given all `batches`.

    Returns:
        The plan (with the tensors from repair) and what was measured on the way.

    Raises:
        BudgetError: a width is outside what an MLP has.
        RecipeError: the method needs images and none are given.
    """
    edits: list[Edit] = [*done, *([] if run is None else [run])]
    errors: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    reference = teacher
    if run is not None:
        apply_(student, [run])
        reference = _reference(teacher, student, run, batches, notes)
    for number, step in enumerate(recipe.steps):
        left = sites if number == 0 and run is None else _sites_left(student, sites, step)
        units = widths if number == 0 else None
        if units is None:
            units = _widths(recipe, number, left, student, teacher, batches)
        work = _StepRun(
            student=student,
            teacher=reference,
            sites=left,
            step=step,
            seed=recipe.seed,
            widths=units,
            batches=batches,
            edits=edits,
            errors=errors,
            behind={edit.site.path for edit in done} if number == 0 else (),
            keep_edit=keep_edit,
            offload=offload,
            moments=moments,
            halves=halves,
            in_pick_order=recipe.recover is not None and recipe.recover.elastic is not None,
            number=number,
            source=source,
            share=share,
        )
        before, last = len(edits), number + 1 == len(recipe.steps)
        whole = student if last or DropBlocks not in work.method.edits else copy.deepcopy(student)
        said = work.run_(quiet)
        for drop in [edit for edit in edits[before:] if isinstance(edit, DropBlocks) and not last]:
            reference = _reference(whole, student, drop, batches, notes)
        notes += said if WHOLE in said else _notes(work.method, step, batches) + said
    return CutReport(plan=_plan(recipe, edits, run), errors=errors, notes=tuple(notes))


def _reference(
    whole: nn.Module, shorter: nn.Module, drop: DropBlocks, batches: Sequence[Tensor] | None, notes: list[str]
) -> nn.Module:
    """Return what a model without a run of blocks is compared with: its blocks have the same numbers."""
    found = None if batches is None else past_run(whole, shorter, drop.run, batches[0][:2])
    if found is None:
        notes.append(f"{drop.run.before}: what follows is compared with the model without the blocks behind it.")
    return found or copy.deepcopy(shorter).requires_grad_(False)


def _widths(
    recipe: Recipe,
    number: int,
    sites: Sequence[MlpSite],
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Tensor] | None,
) -> dict[str, int]:
    """Return the widths that a step's budget leads to, for the student as the steps before left it.

    Raises:
        BudgetError: the MLPs can't meet the budget, or it can only be met by trial, which is not done here.
    """
    width, method = recipe.width(number), recipe.steps[number].make_method()
    if method.goes_by() == "share" and width.is_of_the_model:
        raise BudgetError(
            f"{width.kind}: what {method.name} saves is not known before it is tried; give keep_ratio here."
        )
    return solve_widths(width, sites, student, None if batches is None else batches[0], original=teacher)


@dataclass(kw_only=True)
class _StepRun:
    """One step applied to a student; `edits` and `errors` grow as it runs."""

    student: nn.Module
    teacher: nn.Module
    sites: Sequence[MlpSite]
    step: Step
    seed: int
    widths: Mapping[str, int]
    batches: Sequence[Tensor] | None
    edits: list[Edit]
    errors: dict[str, dict[str, float]]
    behind: Collection[str]
    keep_edit: Callable[[KeepUnits, Mapping[str, float]], KeepUnits] | None
    offload: Path | None
    moments: torch.dtype
    halves: bool
    in_pick_order: bool
    number: int
    source: TrainingSource | None
    share: Share

    def __post_init__(self) -> None:
        self.method = self.step.make_method()
        self.repair = self.step.repair_options() if self.batches is not None else None
        self.metrics: dict[str, Tensor] = {}

    def run_(self, quiet: bool) -> list[str]:
        """Ask the method for edits and carry them out; return notes for the user."""
        if isinstance(self.method, ModelMethod):
            return self._propose_(self.method, quiet)
        return self._cut_sites_({}, quiet)

    def _propose_(self, method: ModelMethod, quiet: bool) -> list[str]:
        """Carry out a method's edits one by one; cuts without tensors of their own are made and repaired at the end."""
        if method.needs == "images" and self.batches is None:
            raise RecipeError(f"method: {method.name} needs calibration images; pass data.")
        chosen: dict[str, KeepUnits] = {}
        num_before = len(self.edits)
        with progress(method.name, 0, quiet=quiet) as bar:
            view = LiveModelView(
                self.student,
                self.sites,
                self.widths,
                self.batches,
                seed=self.seed,
                share=self.step.keep_ratio,
                repaired=self.repair is not None,
                bar=bar,
                trainer=self._train,
            )
            for edit in method.propose(view):
                if isinstance(edit, KeepUnits) and not edit.tensors:
                    chosen[edit.site.path] = edit
                else:
                    apply_(self.student, [edit])
                    self.edits.append(edit)
                bar.advance(1, edit.where)
        picked = self.share.on_main(lambda: chosen)  # each process has chosen by itself
        self.share.give_([*self.student.parameters(), *self.student.buffers()])
        if method.needs_mlps and not self.sites and not picked and len(self.edits) == num_before:
            raise _nothing_left(method.name)
        if self.repair is not None and not picked:
            own = any(isinstance(edit, KeepUnits) for edit in self.edits[num_before:])
            why = "gives what it keeps weights of its own" if own else "cut no hidden units"
            view.note(f"repair: {method.name} {why}, so nothing was repaired.")
        return view.notes + (self._cut_sites_(picked, quiet) if picked else [])

    def _train(self, model: nn.Module, **given: Any) -> Mapping[str, Tensor]:
        """Train factors in front of a model for a method."""
        source = self.source or TrainingSource.of_batches(self.batches or (), self.seed)
        return train_factors_(model, self.teacher, source, number=self.number, **given)

    def _cut_sites_(self, chosen: Mapping[str, KeepUnits], quiet: bool) -> list[str]:
        """Cut the MLPs one by one, to the chosen units or else to those that the method selects, and repair each.

        Return notes for the user.
        """
        if self._keeps_all(chosen):
            return self._leave_whole_()
        heads = self._heads()
        notes = [] if heads is None else heads.notes
        sites = [*self.sites, *(heads.sites if heads else ())]
        self.metrics |= metrics_for(self.method, self.teacher, sites, self.batches)
        with progress("cut", len(chosen) or len(self.sites), quiet=quiet) as bar:
            bar.done = len(self.behind)
            for site, visit in self._visits(chosen, heads):
                edit = chosen.get(site.path) or self._select(site, visit)
                if self.repair is not None and visit is not None:
                    edit, self.errors[site.path] = repair_(self.student, edit, visit, self.repair, self.seed)
                    notes += [n for n in visit_notes(visit, self.repair, edit.width) if n not in notes]
                else:
                    apply_(self.student, [edit])
                kept = edit if self.keep_edit is None else self.keep_edit(edit, self.errors.get(site.path, {}))
                self.edits.append(kept)
                bar.advance(1, site.path)
                del visit  # frees its sums before those of the next MLP are made
        return notes

    def _keeps_all(self, chosen: Mapping[str, KeepUnits]) -> bool:
        """Return whether all units of an unchanged student stay, and nobody asked for them in pick order."""
        widths = {path: edit.width for path, edit in chosen.items()} or self.widths
        unchanged = all(isinstance(edit, KeepUnits) and edit.is_whole for edit in self.edits)
        others = self.widths.keys() - {site.path for site in self.sites}  # attentions with sizes of their own
        return unchanged and not self.in_pick_order and not others and keeps_all(self.sites, widths)

    def _leave_whole_(self) -> list[str]:
        """Record cuts that change nothing, so that the result is the original bit for bit; return a note."""
        for site in [site for site in self.sites if site.path not in self.behind]:
            edit = KeepUnits.first(site, site.d_hidden)
            self.edits.append(edit if self.keep_edit is None else self.keep_edit(edit, {}))
        return [WHOLE]

    def _select(self, site: MlpSite, visit: SiteVisit | None) -> KeepUnits:
        """Ask the method which units of an MLP to keep."""
        assert isinstance(self.method, SiteMethod)
        given = site, visit, self.widths[site.path], self.method, self.seed + len(self.edits)
        return self.share.on_main(lambda: select(read_weights(self.student, site), *given))

    def _heads(self) -> HeadsCut | None:
        """Return how attention is cut on the way, None if it is not."""
        method = self.method
        if not isinstance(method, SiteMethod) or method.cuts() == "mlp":
            return None
        return HeadsCut.of(self.student, self.sites, self.batches, method, self.repair, self.metrics, self.share)

    def _entered(self, heads: HeadsCut) -> Entered:
        """Return what is done in a block before its MLPs are visited: its attentions are cut, and kept in the plan."""
        sizes = heads.sizes_at(equal_share(self.step, self.widths, self.sites))
        own = {path: size for path, size in self.widths.items() if path in sizes}

        def keep(edit: Edit, errors: Mapping[str, float]) -> None:
            self.edits.append(edit)
            self.errors[edit.where] = dict(errors)

        return partial(heads.enter_, sizes={**sizes, **own}, keep=keep)

    def _visits(
        self, chosen: Mapping[str, KeepUnits], heads: HeadsCut | None
    ) -> Iterator[tuple[MlpSite, SiteVisit | None]]:
        """Yield sites in the order in which they are cut, with calibration data if selection or repair needs it."""
        sites = [site for site in self.sites if site.path in chosen or not chosen]
        looks = self.method.needs == "images" and not chosen
        if self.batches is None or (self.repair is None and not looks):
            yield from ((site, None) for site in sites if site.path not in self.behind)
            return
        repair, mlps = self.repair or RepairOptions(feedback=0.0), heads is None or heads.method.cuts() == "both"
        for visit in walk(
            self.teacher,
            self.student,
            sites,
            self.batches,
            feedback=repair.feedback,
            num_held_out=num_held_out(self.batches),
            max_tokens=repair.max_tokens,
            skip=self.behind if mlps else [site.path for site in sites],
            offload=self.offload,
            moments=self.moments,
            halves=self.halves and self.repair is not None,
            entered=None if heads is None else self._entered(heads),
            share=self.share,
        ):
            yield visit.site, replace(visit, metric_DD=self.metrics.get(visit.site.output))
            del visit


def _sites_left(student: nn.Module, sites: Sequence[MlpSite], step: Step) -> list[MlpSite]:
    """Return those of the given MLPs that a partly cut student still has, as they are now."""
    asked = {site.path for site in sites}
    try:
        left = [site for site in find_mlps(student) if site.path in asked]
    except SiteNotFoundError:
        left = []
    if not left and issubclass(find_method(step.method), SiteMethod):
        raise _nothing_left(step.method)
    return left


def _nothing_left(name: str) -> SiteNotFoundError:
    """Return the error to raise for a step that would do nothing."""
    return SiteNotFoundError(
        f"steps: {name} finds no MLP as it needs one, since the steps before it replaced them all; put it first, "
        "or leave it out."
    )


def _plan(recipe: Recipe, edits: Sequence[Edit], run: DropBlocks | None) -> Plan:
    """Return a recipe's plan; with several methods, `options` holds each one's options under its name."""
    first = [] if run is None else [ReplaceMe(num_blocks=run.run.total - run.run.length)]
    methods = [*first, *(step.make_method() for step in recipe.steps)]
    options = {method.name: method.model_dump(mode="json") for method in methods}
    return Plan(
        edits=tuple(edits),
        method="+".join(method.name for method in methods),
        options=options if len(methods) > 1 else options[methods[0].name],
        seed=recipe.seed,
        versions=versions(),
    )


def keeps_all(sites: Sequence[MlpSite], widths: Mapping[str, int]) -> bool:
    """Return whether widths by path keep every unit of these MLPs; those without a width are left alone."""
    return all(widths.get(site.path, site.d_hidden) == site.d_hidden for site in sites)


def _notes(method: Method, step: Step, batches: Sequence[Tensor] | None) -> list[str]:
    """Return notes on choices that were made for the user."""
    if batches is not None:
        return []
    notes = []
    if method.needs == "images":
        notes.append("no images given: units were selected on weights alone; pass data to select by what they do.")
    if step.repair_options() is not None:
        notes.append("no images given: nothing was repaired; pass data for closed-form repair.")
    return notes
