"""Widths that differ between MLPs, under one budget for all of them together.

One calibration pass on the uncut model gives each MLP's error at all widths at once. How such an error affects the
final features is measured by cutting only that MLP, at a few widths. Then the widths of all MLPs are chosen together,
optimally. All measurements are kept in a file, so another budget needs no forward pass.

Errors of several MLPs are assumed to add up, and the later effects of feedback, refit and recovery are not modelled; so
the result is compared with equal widths of the same cost.

Shapes: H hidden units, D model width.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, num_held_out, walk
from vitrim.compression.cut import cut_, metrics_for, select
from vitrim.config.options import Counted, RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import site_macs, site_parameters
from vitrim.cost.latency import import_timer
from vitrim.data import Split
from vitrim.errors import CheckpointError, RecipeError
from vitrim.methods import SiteMethod
from vitrim.metrics.fidelity import fidelity
from vitrim.metrics.judging import features_on_cpu, relative_error
from vitrim.metrics.record import Closeness
from vitrim.models.features import device_of, evaluating
from vitrim.ops.allocation import Values, best_choices, dropped_energy, explained_energy
from vitrim.ops.least_squares import fit_output, moments, ridge_for
from vitrim.ops.output_metric import weighed
from vitrim.output.provenance import versions
from vitrim.progress import progress
from vitrim.storage.hashes import tensor_sha256
from vitrim.storage.sealed import read_sealed, write_sealed
from vitrim.surgery import KeepUnits, apply_, read_weights, submodule
from vitrim.surgery.modules import run_mlp
from vitrim.types import MlpSite, MlpWeights

PROBED = (0.5, 0.25, 0.125)  # shares of an MLP's units at which its effect on the final features is measured
NUM_PROBE_IMAGES = 32
TINY = 1e-9  # share of an MLP's energy below which an error is rounding error
WORST = 1e6  # replaces a relative error that is infinite or not a number
TIMED_IMAGES, TIMED_ROUNDS, MAX_TIMED = 8, 15, 24

log = logging.getLogger("vitrim")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The widths that were found, by path of the MLP, and how they were found (`about`)."""

    units: Mapping[str, int]
    about: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Measured:
    """Measurements: by site, final error at widths 1..H and tokens per image; by shape and width, times in ns.

    They are kept in a file, unless `path` is None.
    """

    path: Path | None
    errors: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    times: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def kept_at(cls, path: Path | None) -> _Measured:
        """Return the measurements of an earlier run, or an empty record if there are none or the file is damaged."""
        if path is None or not path.exists():
            return cls(path=path)
        try:
            return cls(path=path, **read_sealed(path, {"errors": dict, "tokens": dict, "times": dict, "notes": list}))
        except CheckpointError as error:
            log.warning("%s The errors are measured again.", error)
            return cls(path=path)

    def save(self) -> None:
        """Write the measurements to the file, for use with another budget."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(self.path, {name: value for name, value in self.__dict__.items() if name != "path"})


@dataclass(frozen=True, kw_only=True)
class _Request:
    """How units are picked: the method, the repair that follows (or None), and the seed."""

    method: SiteMethod
    repair: RepairOptions | None
    seed: int


def allocate(
    recipe: Recipe,
    uniform: Mapping[str, int],
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor] | None,
    *,
    context: RunContext,
) -> Allocation:
    """Find each MLP's width; the cost of equal widths is the budget.

    Args:
        recipe: the recipe; its first step asks for allocation.
        uniform: hidden units of each MLP at equal widths, by path.
        teacher: the uncut model in eval mode, which is not changed.
        sites: the MLPs to cut.
        batches: calibration images.
        context: its work folder stores the measurements, if the recipe names no folder for them.

    Raises:
        RecipeError: there are no images, or the method decides for the whole model at once.
    """
    step = recipe.steps[0]
    method, options = step.make_method(), step.allocate
    assert options is not None
    if not isinstance(method, SiteMethod):
        raise RecipeError(f"allocate: {method.name} decides about the whole model by itself; use allocate=uniform.")
    if method.cuts() != "mlp":
        raise RecipeError("allocate: finds widths of MLPs alone; use allocate=uniform, or options.parts='mlp'.")
    if batches is None:
        raise RecipeError("allocate: error curves need calibration images; pass data, or use allocate=uniform.")
    request = _Request(method=method, repair=step.repair_options(), seed=recipe.seed)
    folder, key = options.cache or context.work, _key(request, teacher, sites, batches)
    found = _Measured.kept_at(None if folder is None else folder / f"curves-{key[:16]}.json")
    if not found.errors:
        _measure_(found, request, teacher, sites, batches, context.quiet)
    return _solved(options.cost, step.round_to, uniform, teacher, sites, found)


def compare_with_uniform(
    recipe: Recipe,
    uniform: Mapping[str, int],
    judged: Closeness,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    split: Split,
) -> tuple[float, str]:
    """Cut a second time, at equal widths of the same cost, and compare.

    Args:
        recipe: the user's recipe.
        uniform: the equal widths, by path.
        judged: closeness of the student that was cut by the allocation, on the held-out images.
        teacher: the uncut model.
        sites: the MLPs.
        split: calibration and held-out images.

    Returns:
        The relative error at equal widths, and a note for the user.
    """
    student = copy.deepcopy(teacher)
    cut_(student, teacher, sites, recipe, split.calibration, widths=uniform, quiet=True)
    equal = fidelity(student, teacher, split.held_out)["relative_error"]
    error, count = judged.relative_error, judged.num_images
    advice = "; equal widths do better here, so drop allocate" if error > equal else ""
    errors = f"{error:.4g}, with equal widths {equal:.4g}, on {count:,} images"
    return equal, f"allocate: relative error after the cut {errors}{advice}."


def _solved(
    counted: Counted,
    round_to: int,
    uniform: Mapping[str, int],
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    found: _Measured,
) -> Allocation:
    """Return the best widths for the measurements."""
    grids = [_grid(site, uniform[site.path], round_to, timed=counted == "latency") for site in sites]
    if counted == "latency":
        for site, grid in zip(sites, grids, strict=True):
            _time_(found, teacher, site, grid)
        found.save()
    costs = [
        np.array([_cost(counted, site, width, found) for width in grid])
        for site, grid in zip(sites, grids, strict=True)
    ]
    errors = [np.array(found.errors[site.path])[np.array(grid) - 1] for site, grid in zip(sites, grids, strict=True)]
    equal = [grid.index(uniform[site.path]) for site, grid in zip(sites, grids, strict=True)]
    allowed = _sum(costs, equal)
    picked = best_choices(errors, costs, int(allowed))
    about = {
        "counted": counted,
        "allowed": int(allowed),
        "cost": int(_sum(costs, picked)),
        "predicted": {"allocated": _sum(errors, picked), "uniform": _sum(errors, equal)},
    }
    units = {site.path: grid[j] for site, grid, j in zip(sites, grids, picked, strict=True)}
    return Allocation(units=units, about=about, notes=tuple(found.notes))


def _sum(values: Sequence[NDArray[Any]], choices: Sequence[int]) -> float:
    """Return the sum of one chosen value per MLP."""
    return sum(value_J[j].item() for value_J, j in zip(values, choices, strict=True))


def _cost(counted: Counted, site: MlpSite, width: int, found: _Measured) -> int:
    """Return what an MLP of a width costs: parameters, multiply-accumulates per image, or nanoseconds."""
    if counted == "params":
        return site_parameters(site, width)
    if counted == "macs":
        return round(site_macs(site, width) * found.tokens[site.path])
    return found.times[_shape(site, found)][str(width)]


def _grid(site: MlpSite, uniform: int, round_to: int, *, timed: bool) -> list[int]:
    """Return the widths to choose from: multiples of `round_to` (few if timed), the uniform width and all units."""
    step = round_to * (max(1, -(-site.d_hidden // (round_to * MAX_TIMED))) if timed else 1)
    return sorted({*range(step, site.d_hidden + 1, step), uniform, site.d_hidden})


def _key(request: _Request, teacher: nn.Module, sites: Sequence[MlpSite], batches: Sequence[Tensor]) -> str:
    """Return a hash of all that affects the measurements: weights, images, method, options, seed, repair, versions."""
    digest, repair = hashlib.sha256(), request.repair
    about = {
        "method": request.method.name,
        "options": request.method.model_dump(mode="json"),
        "ridge": None if repair is None else repair.ridge,
        "seed": request.seed,
        "sites": [site.path for site in sites],
        "versions": versions(),
        "device": str(device_of(teacher)),
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    for tensor in (*teacher.state_dict().values(), *batches):
        digest.update(tensor_sha256(tensor).encode())
    return digest.hexdigest()


def _measure_(
    found: _Measured,
    request: _Request,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor],
    quiet: bool,
) -> None:
    """Measure all MLPs in one pass over the calibration images; each MLP sees an uncut model."""
    num_judging = num_held_out(batches)
    num_images = sum(map(len, batches[: len(batches) - num_judging]))
    images = batches[-1][:NUM_PROBE_IMAGES]
    judged = [(images, features_on_cpu(teacher, images, "final"))]

    def judge(edit: KeepUnits) -> float:
        """Return the error of the final features if this is the only cut."""
        student = copy.deepcopy(teacher)
        apply_(student, [edit])
        return min(WORST, relative_error(student, judged, "final"))

    metrics = metrics_for(request.method, teacher, sites, batches)
    visits = walk(teacher, copy.deepcopy(teacher), sites, batches, feedback=0.0, num_held_out=num_judging, max_tokens=0)
    with progress("allocate", len(sites), quiet=quiet) as bar:
        for visit in visits:
            weighing = replace(visit, metric_DD=metrics.get(visit.site.output))
            picks = _Picks(request=request, visit=weighing, weights=read_weights(teacher, visit.site), number=bar.done)
            found.errors[visit.site.path] = picks.curve(judge).tolist()
            found.tokens[visit.site.path] = visit.stats.num_tokens / num_images
            if bar.done == 0 and not picks.nested():
                found.notes.append(
                    f"allocate: {request.method.name} picks units in another order at each width; the curves are rough."
                )
            bar.advance(1, visit.site.path)
    found.save()


@dataclass(frozen=True, kw_only=True)
class _Picks:
    """One MLP, the `number`th in forward order, and which of its units a method picks."""

    request: _Request
    visit: SiteVisit
    weights: MlpWeights
    number: int

    @cached_property
    def order(self) -> tuple[int, ...]:
        """All units in the order in which they are kept, most important first."""
        return self.first(self.weights.num_units)

    def first(self, width: int) -> tuple[int, ...]:
        """Return the units that the method picks for a width, asked as `cut_` asks."""
        seed = self.request.seed + self.number
        return select(self.weights, self.visit.site, self.visit, width, self.request.method, seed).keep

    def nested(self) -> bool:
        """Return whether the units picked for half the width are the first ones of the full order."""
        half = max(1, len(self.order) // 2)
        return set(self.first(half)) == set(self.order[:half])

    def curve(self, judge: Callable[[KeepUnits], float]) -> Values:
        """Return the final features' error at widths 1..H, interpolated from a few widths by the MLP's own error."""
        repair, order = self.request.repair, torch.tensor(self.order)
        own_H = self._own_errors(order, repaired=repair is not None).cpu().numpy()
        widths = sorted({max(1, round(share * len(order))) for share in PROBED}, reverse=True)
        final = [judge(self._edit(self.order[:width], repair)) for width in widths]
        return through(own_H, own_H[np.array(widths) - 1], np.array(final))

    def _own_errors(self, order: Tensor, *, repaired: bool) -> Tensor:
        """Return the share of the MLP's output (weighed) that is missing with the first 1..H units."""
        stats, weight_DH = self.visit.stats, self.weights.output_DH.to(self.visit.stats.cross_HD)
        scale_D, metric_DD = self.visit.scale_D, self.visit.metric_DD
        if repaired:
            gram_HH, cross_HD = moments(stats, centred=self.weights.output_bias_D is not None)
            explained_H = explained_energy(gram_HH, weighed(cross_HD, scale_D, metric_DD), order)
            missing_H = explained_H[-1] - explained_H
        else:
            weight_HD = weighed(weight_DH.T, scale_D, metric_DD)
            missing_H = dropped_energy(stats.hidden_HH, weight_HD.T, order)
        return missing_H / missing_H[0].clamp(min=torch.finfo(missing_H.dtype).tiny)

    def _edit(self, keep: tuple[int, ...], repair: RepairOptions | None) -> KeepUnits:
        """Return the cut to these units alone, with the repair that follows it."""
        edit, weights = KeepUnits(site=self.visit.site, keep=keep), self.weights
        if repair is None:
            return edit
        index = torch.tensor(keep)
        start_DK = weights.output_DH[:, index.to(weights.output_DH.device)]
        stats, where = self.visit.stats, self.visit.site.path
        ridge = ridge_for(stats.num_tokens, len(keep), repair.ridge)
        weight_DK, bias_D = fit_output(stats, index, start_DK, weights.output_bias_D, ridge=ridge, where=where)
        return edit.with_output(weight_DK, bias_D)


def through(own_H: Values, own_P: Values, final_P: Values) -> Values:
    """Interpolate final errors at all widths: piecewise linear in the MLP's own error, through zero and the measured.

    Args:
        own_H: the MLP's error at widths 1..H.
        own_P: the MLP's error at the widths where the final error was measured.
        final_P: the final error there; where it falls although the MLP's own error rises, it is held constant.
    """
    rising = np.argsort(own_P, kind="stable")
    x = np.concatenate([[0.0], np.maximum(own_P[rising], TINY)])
    y = np.concatenate([[0.0], np.maximum.accumulate(final_P[rising])])
    return np.where(own_H > x[-1], own_H * (y[-1] / x[-1]), np.interp(own_H, x, y))


def _shape(site: MlpSite, found: _Measured) -> str:
    """Return a key of all that determines an MLP's time, so that MLPs of one shape are timed once."""
    return f"{site.label}, {site.d_model}, {site.d_hidden}, {_timed_tokens(site, found)} tokens"


def _timed_tokens(site: MlpSite, found: _Measured) -> int:
    return max(1, round(TIMED_IMAGES * found.tokens[site.path]))


def _time_(found: _Measured, teacher: nn.Module, site: MlpSite, widths: Sequence[int]) -> None:
    """Time an MLP at widths not yet timed, in alternating rounds, so that a slow moment affects all alike.

    Raises:
        RecipeError: the MLP can't be run by itself.
    """
    known, make_timer = found.times.setdefault(_shape(site, found), {}), import_timer()
    device, timers = device_of(teacher), {}
    tokens = torch.randn(1, _timed_tokens(site, found), site.d_model, generator=torch.Generator().manual_seed(0))
    inner = site.within(site.path)
    for width in [width for width in widths if str(width) not in known]:
        holder = nn.Sequential(copy.deepcopy(submodule(teacher, site.path)))
        apply_(holder, [KeepUnits.first(inner.below("0"), width)])
        names = {"run": run_mlp, "mlp": holder[0], "site": inner, "tokens": tokens.to(device)}
        timers[width] = make_timer("run(mlp, site, tokens)", globals=names, num_threads=torch.get_num_threads())
    seen: dict[int, list[float]] = {width: [] for width in timers}
    with evaluating(teacher):
        for _ in range(TIMED_ROUNDS + 1):  # the first is a warm-up
            for width, timer in timers.items():
                try:
                    seen[width].append(timer.timeit(1).mean)
                except Exception as error:  # a foreign module that needs more inputs than tokens may raise anything
                    reason = f"{type(error).__name__}: {error}"
                    raise RecipeError(
                        f"allocate.cost: {site.path} can't be timed by itself ({reason:.100}); use macs."
                    ) from error
    known |= {str(width): round(1e9 * median(times[1:])) for width, times in seen.items()}
