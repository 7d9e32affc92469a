"""Output weights for each width of an elastic student but the largest: least squares before and after training.

In between they train with the rest.

Shapes: D model width, K units of a width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, walk
from vitrim.config.options import RepairOptions
from vitrim.metrics.judging import Judged, features_on_cpu, relative_error
from vitrim.ops.least_squares import fit_output, ridge_for
from vitrim.recover.elastic import Slice, Widths
from vitrim.surgery import KeepUnits, apply_, read_weights, submodule
from vitrim.types import FeaturesAt, MlpSite


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Data and options with which output weights are fitted and judged.

    Attributes:
        teacher: the original model.
        batches: calibration images; all of them enter the sums.
        held_out: images that judge.
        options: ridge and feedback of the least squares; None fits nothing.
        at: where features are read.
    """

    teacher: nn.Module
    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    options: RepairOptions | None
    at: FeaturesAt = "final"

    @cached_property
    def judged(self) -> Judged:
        """Held-out images with the teacher's features."""
        return [(batch, features_on_cpu(self.teacher, batch, self.at)) for batch in self.held_out]


@contextmanager
def serving(student: nn.Module, widths: Widths | None, fitting: Fitting) -> Iterator[dict[float, Slice]]:
    """Let a student serve its widths while it is trained in this context.

    Args:
        student: at its largest width; afterwards it has its own parameters alone.
        widths: the widths it serves; None leaves it as it is.
        fitting: how output weights are fitted.

    Yields:
        A slice for each width, by ratio; filled when the context ends.
    """
    found: dict[float, Slice] = {}
    if widths is None:
        yield found
        return
    start = {ratio: each.tensors for ratio, each in fit_widths(student, widths, fitting).items()}
    with widths.with_own_outputs(student, start):
        yield found
        trained = widths.own_outputs(student)
    found.update(fit_widths(student, widths, fitting, start=trained))


def fit_widths(
    student: nn.Module,
    widths: Widths,
    fitting: Fitting,
    *,
    start: Mapping[float, Mapping[str, Tensor]] | None = None,
) -> dict[float, Slice]:
    """Fit output weights for each width but the largest, site after site as the cut does.

    A site's fit is taken only where it lowers the error on held-out images. So no width ends worse than the student's
    first units alone, or than it starts.

    Args:
        student: at its largest width; not changed.
        widths: the widths it serves.
        fitting: the teacher, the images and the options.
        start: by ratio, output tensors to start from where they are better than the student's own columns.

    Returns:
        A slice for each ratio, the smallest first. The largest has no tensors: the student itself is that width.
    """
    found: dict[float, Slice] = {}
    for ratio, units in widths.units.items():
        sliced = copy.deepcopy(student)
        apply_(sliced, widths.edits(ratio))
        errors = {"sliced": relative_error(sliced, fitting.judged, fitting.at)}
        if ratio != widths.largest:
            sites = [replace(site, d_hidden=units[site.path]) for site in widths.sites]
            best = _trained_(sliced, sites, (start or {}).get(ratio, {}), fitting, errors)
            errors["repaired"] = _fit_(sliced, sites, fitting, best)
            tensors = {name: t for site in sites for name, t in _output_tensors(sliced, site).items()}
            found[ratio] = Slice(units=units, tensors=tensors, errors=errors)
        else:
            found[ratio] = Slice(units=units, errors={**errors, "repaired": errors["sliced"]})
    return found


def _trained_(
    sliced: nn.Module, sites: Sequence[MlpSite], own: Mapping[str, Tensor], fitting: Fitting, errors: dict[str, float]
) -> float:
    """Give a slice the output weights that were trained for it, unless it is better without; returns its error."""
    if not own:
        return errors["sliced"]
    before = {site.path: _output_tensors(sliced, site) for site in sites}
    for site in sites:
        _put_(sliced, site, {name: own[name] for name in before[site.path]})
    errors["trained"] = relative_error(sliced, fitting.judged, fitting.at)
    if errors["trained"] > errors["sliced"]:
        for site in sites:
            _put_(sliced, site, before[site.path])
    return min(errors["trained"], errors["sliced"])


def _fit_(sliced: nn.Module, sites: Sequence[MlpSite], fitting: Fitting, best: float) -> float:
    """Fit the output weights of one MLP after the other by least squares; returns the error that is left."""
    if fitting.options is None:
        return best
    feedback, ridge = fitting.options.feedback, fitting.options.ridge
    for visit in walk(fitting.teacher, sliced, sites, fitting.batches, feedback=feedback, num_held_out=0, max_tokens=0):
        before = _output_tensors(sliced, visit.site)
        _put_(sliced, visit.site, _fitted(sliced, visit, ridge))
        error = relative_error(sliced, fitting.judged, fitting.at)
        if error < best:
            best = error
        else:
            _put_(sliced, visit.site, before)
    return best


def _output_tensors(model: nn.Module, site: MlpSite) -> dict[str, Tensor]:
    """Return copies of the output projection's tensors, by full name."""
    layer = submodule(model, site.output)
    return {f"{site.output}.{name}": p.detach().clone() for name, p in layer.named_parameters(recurse=False)}


def _fitted(model: nn.Module, visit: SiteVisit, ridge: float) -> dict[str, Tensor]:
    """Fit the output projection's tensors by least squares on the sums of a calibration visit, by full name."""
    own = _output_tensors(model, visit.site)
    weights, site = read_weights(model, visit.site), visit.site
    all_units = torch.arange(site.d_hidden)
    ridge = ridge_for(visit.stats.num_tokens, site.d_hidden, ridge)
    weight_DK, bias_D = fit_output(
        visit.stats, all_units, weights.output_DH, weights.output_bias_D, ridge=ridge, where=site.path
    )
    fitted = {f"{site.output}.weight": weight_DK, f"{site.output}.bias": bias_D}
    return {name: tensor.to(own[name]).view_as(own[name]) for name, tensor in fitted.items() if tensor is not None}


def _put_(model: nn.Module, site: MlpSite, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a site's layers, by full name."""
    apply_(model, [replace(KeepUnits.first(site, site.d_hidden), tensors=tensors)])
