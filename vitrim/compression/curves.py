"""What is measured for an allocation: each MLP's error at all widths, what `head_curves` finds of attentions, times.

One calibration pass on the uncut model gives each MLP's error at all widths at once. How such an error affects the
final features is measured by cutting only that MLP, at a few widths. All measurements are kept in a file, so another
budget needs no forward pass.

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

import numpy as np
import torch
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, num_held_out, walk
from vitrim.calibrate.runs import with_edits
from vitrim.compression.asking import metrics_for, select
from vitrim.compression.head_curves import HeadCurves
from vitrim.compression.heads import HeadsCut
from vitrim.config.options import RepairOptions
from vitrim.errors import CheckpointError
from vitrim.methods import SiteMethod
from vitrim.metrics.judging import features_on_cpu, relative_error
from vitrim.models.features import device_of
from vitrim.ops.allocation import Values, dropped_energy, explained_energy, through
from vitrim.ops.least_squares import fit_output, moments, ridge_for
from vitrim.ops.output_metric import weighed
from vitrim.output.provenance import versions
from vitrim.progress import progress
from vitrim.storage.hashes import tensor_sha256
from vitrim.storage.sealed import read_sealed, write_sealed
from vitrim.surgery import Edit, KeepUnits, read_weights
from vitrim.types import MlpSite, MlpWeights

PROBED = (0.5, 0.25, 0.125)  # shares of an MLP's units at which its effect on the final features is measured
NUM_PROBE_IMAGES = 32
WORST = 1e6  # replaces a relative error that is infinite or not a number

log = logging.getLogger("vitrim")


@dataclass(kw_only=True)
class Measured:
    """Measurements: by site, final error at sizes 1 to the whole and tokens per image; by shape and width, times in ns.

    `costs` are those of attentions, as parameters and MACs of the whole model at the same sizes.
    `trials` are errors behind whole cuts, by a digest of what was cut to. All is kept in a file, unless `path` is None.
    """

    path: Path | None
    errors: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    times: dict[str, dict[str, int]] = field(default_factory=dict)
    trials: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def kept_at(cls, path: Path | None) -> Measured:
        """Return the measurements of an earlier run, or an empty record if there are none or the file is damaged."""
        if path is None or not path.exists():
            return cls(path=path)
        try:
            names = ("errors", "costs", "tokens", "times", "trials")
            return cls(path=path, **read_sealed(path, {**dict.fromkeys(names, dict), "notes": list}))
        except CheckpointError as error:
            log.warning("%s The errors are measured again.", error)
            return cls(path=path)

    def save(self) -> None:
        """Write the measurements to the file, for use with another budget."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(self.path, {name: value for name, value in self.__dict__.items() if name != "path"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """How units are picked: the method, the repair that follows (or None), and the seed."""

    method: SiteMethod
    repair: RepairOptions | None
    seed: int


def key_of(request: Request, teacher: nn.Module, sites: Sequence[MlpSite], batches: Sequence[Tensor]) -> str:
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


def measure_(
    found: Measured,
    request: Request,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor],
    quiet: bool,
) -> None:
    """Measure all places in one pass over the calibration images; each sees an uncut model."""
    images, num_judging = batches[-1][:NUM_PROBE_IMAGES], num_held_out(batches)
    num_images = sum(map(len, batches[: len(batches) - num_judging]))
    judged = [(images, features_on_cpu(teacher, images, "final"))]

    def judge(edit: Edit) -> float:
        """Return the error of the final features if this is the only cut."""
        return min(WORST, relative_error(with_edits(teacher, [edit]), judged, "final"))

    method, student = request.method, copy.deepcopy(teacher)
    metrics: dict[str, Tensor] = {}
    heads = heads_to_measure(request, student, teacher, sites, batches, metrics, judge)
    places = [*sites, *(heads.cut.sites if heads else ())]
    metrics |= metrics_for(method, teacher, places, batches)
    visits = walk(
        teacher,
        student,
        sites,
        batches,
        feedback=0.0,
        num_held_out=num_judging,
        max_tokens=0,
        skip=[site.path for site in sites] if method.cuts() == "attention" else (),
        entered=None if heads is None else heads.enter_,
    )
    with progress("allocate", len(sites), quiet=quiet) as bar:
        for visit in visits:
            weighing = replace(visit, metric_DD=metrics.get(visit.site.output))
            picks = _Picks(request=request, visit=weighing, weights=read_weights(teacher, visit.site), number=bar.done)
            found.errors[visit.site.path] = picks.curve(judge).tolist()
            found.tokens[visit.site.path] = visit.stats.num_tokens / num_images
            if bar.done == 0 and not picks.nested():
                found.notes.append(
                    f"allocate: {method.name} picks units in another order at each width; the curves are rough."
                )
            bar.advance(1, visit.site.path)
    for path, curve in heads.curves.items() if heads else ():
        found.errors[path], found.costs[path] = curve.errors, {"params": curve.params, "macs": curve.macs}
    found.save()


def heads_to_measure(
    request: Request,
    student: nn.Module,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor],
    metrics: Mapping[str, Tensor],
    judge: Callable[[Edit], float],
) -> HeadCurves | None:
    """Return what measures attentions on the way, None if the method cuts none; arguments as for `HeadCurves`."""
    if request.method.cuts() == "mlp":
        return None
    cut = HeadsCut.of(student, sites, batches, request.method, request.repair, metrics)
    cut = replace(cut, feedback=0.0)
    return HeadCurves(cut=cut, teacher=teacher, judge=judge, probed=PROBED, image=batches[0][:1], curves={})


@dataclass(frozen=True, kw_only=True)
class _Picks:
    """One MLP, the `number`th in forward order, and which of its units a method picks."""

    request: Request
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
