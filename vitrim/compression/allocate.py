"""Widths that differ between MLPs, and sizes between attentions, under one budget for all of them together.

All are chosen together, optimally for what `curves` has measured of each place alone. Errors of several places are
assumed to add up, and the effects of feedback, refit and recovery are not modelled; so what is found here are
candidates, which `trials` judges by whole cuts. Where equal widths are foreseen to lose little, they stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrim.compression.curves import Measured, Request, key_of, measure_
from vitrim.compression.head_curves import STEPS
from vitrim.compression.heads import HeadsCut, equal_share
from vitrim.compression.timing import time_attention_, time_mlp_
from vitrim.config.options import Counted
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.config.steps import Step
from vitrim.cost.count import site_macs, site_parameters
from vitrim.errors import RecipeError
from vitrim.methods import SiteMethod
from vitrim.ops.allocation import Values, best_choices
from vitrim.types import AttentionSite, MlpSite

MAX_TIMED = 24  # widths of an MLP that are timed
LEAST_GAIN = 0.1  # share of equal widths' error that others have to save to be worth it
EQUAL, HALFWAY, FOUND = "uniform", "halfway", "allocated"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Widths to choose from, by name and path of the MLP or attention, equal ones first, and how they were found.

    Equal ones name no attention: it keeps the share that its block's MLPs keep.

    `measured` is the record that they were found from, and `places` are all that were chosen for.
    """

    candidates: Mapping[str, Mapping[str, int]]
    about: Mapping[str, Any]
    measured: Measured
    places: Sequence[Place]
    notes: tuple[str, ...] = ()


def allocate(
    recipe: Recipe,
    uniform: Mapping[str, int],
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor] | None,
    *,
    context: RunContext,
    least_gain: float = LEAST_GAIN,
) -> Allocation:
    """Find each MLP's width; the cost of equal widths is the budget.

    Args:
        recipe: the recipe; its first step asks for allocation.
        uniform: hidden units of each MLP at equal widths, by path.
        teacher: the uncut model in eval mode, which is not changed.
        sites: the MLPs to cut.
        batches: calibration images.
        context: its work folder stores the measurements, if the recipe names no folder for them.
        least_gain: share of equal widths' error that has to be foreseen as saved, or equal ones are the only candidate.

    Raises:
        RecipeError: there are no images.
    """
    step = recipe.steps[0]
    method, options = step.make_method(), step.allocate
    assert options is not None and isinstance(method, SiteMethod)
    if batches is None:
        raise RecipeError("allocate: error curves need calibration images; pass data, or use allocate=uniform.")
    request = Request(method=method, repair=step.repair_options(), seed=recipe.seed)
    folder, key = options.cache or context.work, key_of(request, teacher, sites, batches)
    found = Measured.kept_at(None if folder is None else folder / f"curves-{key[:16]}.json")
    if not found.errors:
        measure_(found, request, teacher, sites, batches, context.quiet)
    places = [] if method.cuts() == "attention" else _mlps(step, uniform, teacher, sites, found)
    if method.cuts() != "mlp":
        heads = HeadsCut.of(teacher, sites, batches, method, request.repair, {})
        equal = heads.sizes_at(equal_share(step, uniform, sites))
        for site in heads.sites:
            places.append(_attention(heads, site, equal[site.path], options.cost, teacher, batches[0], found))
    if options.cost == "latency":
        found.save()
    return _solved(places, uniform, options.cost, found, least_gain)


@dataclass(frozen=True, kw_only=True)
class Place:
    """An MLP or attention with sizes that it may have: each one's cost and foreseen error; `equal` is an index.

    Shapes: J sizes.
    """

    path: str
    sizes: Sequence[int]
    costs_J: NDArray[np.int64]
    errors_J: Values
    equal: int

    def between(self, size: int) -> Place:
        """Return the place with sizes from the equal one to the middle between it and another."""
        near = self.sizes[self.equal]
        low, high = sorted((near, (near + size) / 2))
        left = [j for j, each in enumerate(self.sizes) if low <= each <= high]
        return Place(
            path=self.path,
            sizes=[self.sizes[j] for j in left],
            costs_J=self.costs_J[left],
            errors_J=self.errors_J[left],
            equal=left.index(self.equal),
        )


def best_sizes(places: Sequence[Place], allowed: int) -> dict[str, int]:
    """Return the sizes, by path, with the smallest sum of errors that a budget allows."""
    picked = best_choices([place.errors_J for place in places], [place.costs_J for place in places], allowed)
    return {place.path: place.sizes[j] for place, j in zip(places, picked, strict=True)}


def halfway(places: Sequence[Place], allowed: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the best sizes of which none is farther than halfway from the equal one to those that were found."""
    return best_sizes([place.between(sizes[place.path]) for place in places], allowed)


def _solved(
    places: Sequence[Place], uniform: Mapping[str, int], counted: Counted, found: Measured, least_gain: float
) -> Allocation:
    """Return equal widths, and where these are foreseen to lose enough, the best for the measurements and others."""
    equal = {place.path: place.sizes[place.equal] for place in places}
    allowed = int(total(places, equal, "costs_J"))
    best = best_sizes(places, allowed)
    errors = {name: total(places, sizes, "errors_J") for name, sizes in ((FOUND, best), (EQUAL, equal))}
    about = {
        "counted": counted,
        "allowed": allowed,
        "cost": int(total(places, best, "costs_J")),
        "predicted": errors,
    }
    candidates, notes = {EQUAL: dict(uniform)}, list(found.notes)
    if errors[FOUND] > (1 - least_gain) * errors[EQUAL]:
        said = f"{errors[EQUAL]:.4g}, with others {errors[FOUND]:.4g}"
        notes.append(f"allocate: equal widths stay: the error foreseen with them is {said}, under a tenth less.")
    elif best != equal:
        middle = halfway(places, allowed, best)
        others = {HALFWAY: middle, FOUND: best} if middle not in (equal, best) else {FOUND: best}
        candidates |= {name: {**uniform, **sizes} for name, sizes in others.items()}
    return Allocation(candidates=candidates, about=about, measured=found, places=places, notes=tuple(notes))


def total(places: Sequence[Place], sizes: Mapping[str, int], what: str) -> float:
    """Return the sum over all places of one value at the sizes that were chosen."""
    return sum(getattr(place, what)[place.sizes.index(sizes[place.path])].item() for place in places)


def _mlps(
    step: Step, uniform: Mapping[str, int], teacher: nn.Module, sites: Sequence[MlpSite], found: Measured
) -> list[Place]:
    """Return every MLP with its widths to choose from; with latency as cost they are timed."""
    assert step.allocate is not None
    places, counted = [], step.allocate.cost
    for site in sites:
        grid = _grid(site, uniform[site.path], step.round_to, timed=counted == "latency")
        if counted == "latency":
            times = time_mlp_(found, teacher, site, grid)
            costs = [times[str(width)] for width in grid]
        elif counted == "macs":
            costs = [round(site_macs(site, width) * found.tokens[site.path]) for width in grid]
        else:
            costs = [site_parameters(site, width) for width in grid]
        places.append(_place(site.path, grid, costs, uniform[site.path], found))
    return places


def _attention(
    heads: HeadsCut,
    site: AttentionSite,
    equal: int,
    counted: Counted,
    teacher: nn.Module,
    batch: Tensor,
    found: Measured,
) -> Place:
    """Return an attention with its sizes to choose from, each with its time, or what it costs beyond the smallest."""
    whole = heads.size_of(site)
    step = max(1, whole // STEPS)
    grid = sorted({*range(step, whole + 1, step), equal, whole})
    if counted == "latency":
        times = time_attention_(found, teacher, heads, site, grid, batch)
        return _place(site.path, grid, [times[str(size)] for size in grid], equal, found)
    costs = found.costs[site.path][counted]
    return _place(site.path, grid, [costs[size - 1] - costs[0] for size in grid], equal, found)


def _place(path: str, grid: list[int], costs: Sequence[int], equal: int, found: Measured) -> Place:
    errors_J = np.array(found.errors[path])[np.array(grid) - 1]
    return Place(path=path, sizes=grid, costs_J=np.array(costs), errors_J=errors_J, equal=grid.index(equal))


def _grid(site: MlpSite, uniform: int, round_to: int, *, timed: bool) -> list[int]:
    """Return the widths to choose from: multiples of `round_to` (few if timed), the uniform width and all units."""
    step = round_to * (max(1, -(-site.d_hidden // (round_to * MAX_TIMED))) if timed else 1)
    return sorted({*range(step, site.d_hidden + 1, step), uniform, site.d_hidden})
