"""What is measured of attentions for an allocation: the error at all sizes of each, and what sizes cost.

A size is the number of dimensions of each head, or of heads. An attention's own error at a size is what its logits and
its output lack, by the same sums as those by which it is cut. What that does to the final features is measured by
cutting that attention alone, at a few sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vitrim.calibrate import HeadVisit
from vitrim.calibrate.activations import Activations
from vitrim.calibrate.runs import with_edits
from vitrim.compression.heads import HeadsCut
from vitrim.cost.count import count_macs, num_parameters
from vitrim.ops.allocation import Values, explained_energy, through
from vitrim.ops.head_factors import ValueSums, lost_logits, mixed
from vitrim.ops.least_squares import moments
from vitrim.ops.output_metric import weighed
from vitrim.repair.heads import value_sums
from vitrim.surgery import Edit, submodule
from vitrim.surgery.edits import replace_
from vitrim.types import AttentionSite, Stats

STEPS = 8  # sizes of an attention at which its own error is computed, and from which an allocation chooses
TOKENS_PER_DIM = 20  # calibration tokens for each dimension of all heads: a fit to them is off by a twentieth


@dataclass(frozen=True, kw_only=True)
class HeadCurve:
    """Of one attention, at sizes 1 to the whole: errors of the final features, and costs of the whole model."""

    errors: list[float]
    params: list[int]
    macs: list[int]


@dataclass(frozen=True, kw_only=True)
class HeadCurves:
    """Measures attentions of a student that stays uncut; `curves` grows as blocks are entered.

    `judge` returns the error of the final features where an edit is the only one. `image` is one to count MACs on.
    """

    cut: HeadsCut
    teacher: nn.Module
    judge: Callable[[Edit], float]
    probed: Sequence[float]
    image: Tensor
    curves: dict[str, HeadCurve]

    def enter_(self, block: str, teacher: Activations, student: Activations) -> None:
        """Measure the attentions of a block that both models have come to; the student is put back as it was."""
        for site in [site for site in self.cut.sites if site.block == block]:
            cut = replace(self.cut, num_fit=self._enough(site, teacher))
            self.curves[site.path] = self._curve(cut, cut.visit(site, teacher, student))

    def _enough(self, site: AttentionSite, teacher: Activations) -> int:
        """Return how many batches hold the tokens that determine a fit to all heads, of those that there are."""
        per_batch = len(teacher.observe(site, 0)["hidden"])
        return min(self.cut.num_fit, -(-TOKENS_PER_DIM * site.num_heads * site.head_dim // per_batch))

    def _curve(self, cut: HeadsCut, visit: HeadVisit) -> HeadCurve:
        whole, own = cut.size_of(visit.site), _own_errors(cut, visit)
        probed = sorted({max(1, round(share * whole)) for share in self.probed}, reverse=True)
        final, counts = [], {whole: self._count(self.teacher)}
        for size in probed:
            edit = self._tried(cut, visit, size)
            final.append(self.judge(edit))
            counts[size] = self._count(with_edits(self.teacher, [edit]))
        errors = through(own, own[np.array(probed) - 1], np.array(final))
        params, macs = (at_all_sizes({size: both[which] for size, both in counts.items()}) for which in (0, 1))
        return HeadCurve(errors=errors.tolist(), params=params, macs=macs)

    def _tried(self, cut: HeadsCut, visit: HeadVisit, size: int) -> Edit:
        """Return the edit to a size; the student is put back as it was."""
        path = visit.site.path
        kept = copy.deepcopy(submodule(cut.student, path))
        try:
            return cut.cut_(visit, size)[0]
        finally:
            replace_(cut.student, path, kept)

    def _count(self, model: nn.Module) -> tuple[int, int]:
        return num_parameters(model), count_macs(model, self.image)


def at_all_sizes(counts: Mapping[int, int]) -> list[int]:
    """Return what sizes 1 to the whole cost, from the whole and one or two others: below it, costs lie on a line."""
    *cut, whole = sorted(counts)
    first, last = cut[0], cut[-1]
    slope = (counts[last] - counts[first]) // max(1, last - first)
    return [counts[first] + slope * (size - first) for size in range(1, whole)] + [counts[whole]]


def _own_errors(cut: HeadsCut, visit: HeadVisit) -> Values:
    """Return what an attention lacks at sizes 1 to the whole, as a share: of its output, and of its logits if cut."""
    site, method, whole = visit.site, cut.method, cut.size_of(visit.site)
    sums = value_sums(cut.student, visit, site)
    if method.whole_heads():
        order = [int(head) for head in method.pick_heads(sums, whole)]
        dims = torch.tensor([head * site.head_dim + dim for head in order for dim in range(site.head_dim)])
        explained = _explained(sums, sums.stats, dims)[site.head_dim - 1 :: site.head_dim]
        return (1 - explained / explained[-1]).cpu().numpy()
    all_dims, logits = torch.arange(site.num_heads * site.head_dim), None if site.mixes == "values" else visit.logits()
    full = float(_explained(sums, sums.stats, all_dims)[-1])
    sizes = sorted({1, *range(max(1, whole // STEPS), whole, max(1, whole // STEPS))})
    lacking = []
    for size in sizes:
        small, _ = mixed(sums.stats, sums.output_DA, method.mix_values(sums, size))
        lacks = 1 - float(_explained(sums, small, all_dims[: site.num_heads * size])[-1]) / full
        lacking.append(lacks + (0.0 if logits is None else lost_logits(logits, *method.mix_logits(logits, size))))
    return np.interp(np.arange(1, whole + 1), [*sizes, whole], [*lacking, 0.0])


def _explained(sums: ValueSums, stats: Stats, order: Tensor) -> Tensor:
    """Return the energy of the wanted output that the first of some dimensions explain, for each number of them."""
    gram_AA, cross_AD = moments(stats, centred=sums.output_bias_D is not None)
    return explained_energy(gram_AA, weighed(cross_AD, sums.scale_D, sums.metric_DD), order)
