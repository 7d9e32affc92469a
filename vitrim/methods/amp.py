"""AMP, adaptive MLP pruning (arXiv 2603.08100): scores units without labels and gives each layer an entropy budget.

A softmax over how similar the images of a batch are has an entropy E. A unit's score is how much removing it would
change E, to first order. From the last layer to the first, a binary search finds the fewest units with which E rises
by at most delta, so widths differ from layer to layer. Only units are chosen here; the paper recovers by distillation.

Two things are ours. E measures concentration, not fidelity, and a fall in E passes any budget, so a guard also bounds
how far features drift from the dense model's. And where only a width was asked for, delta is found by bisection. The
search reads calibration images, in their fixed batches, never validation images.

Shapes: B images, D feature width, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vitrim.errors import RecipeError
from vitrim.methods.registry import BudgetUse, ModelMethod, register
from vitrim.surgery import KeepUnits
from vitrim.tokens import Features
from vitrim.types import ModelView

DELTAS = (1e-5, 1.0)  # in nats; the paper's lie between 2e-4 and 1e-1


@register
class Amp(ModelMethod):
    """AMP: keeps the units that affect the entropy of a batch most, as many per layer as an entropy budget asks for."""

    name = "amp"
    paper = "Adaptive MLP Pruning for Large Vision Transformers"
    arxiv = "2603.08100"
    summary = "units by what they change of the entropy of a batch's similarities; widths by an entropy budget a layer"
    needs = "images"
    repairs = False
    takes = "widths"

    delta: float | None = None
    """By how many nats each layer may raise the entropy; it then sets the widths. None searches for the value that
    meets the budget."""
    tau: float = Field(default=15.0, gt=0)
    """Sharpness of the softmax over image similarities; higher is sharper."""
    trials: int = Field(default=6, ge=1)
    """Steps of each layer's binary search over widths; 6 resolve 1/64 of the full width."""
    guard: float | None = Field(default=1.0, gt=0)
    """How far a layer may move features from the dense model's, as mean cosine distance in multiples of delta. None
    sets no limit, as in the paper."""
    rounds: int = Field(default=4, ge=1)
    """How many values of delta are tried when a budget is given instead of delta."""
    num_images: int = Field(default=256, ge=2)
    """How many calibration images the search uses."""

    def goes_by(self) -> BudgetUse:
        """Return which part of the budget the method uses: none if `delta` is given."""
        return "nothing" if self.delta is not None else self.takes

    def propose(self, view: ModelView) -> Iterator[KeepUnits]:
        """Yield one cut per MLP that keeps its best units, as many as the search found."""
        search = _Search(view, self)
        kept = search.widths(self.delta) if self.delta is not None else search.widths_at_budget()
        for site in view.sites:
            yield KeepUnits(site=site, keep=tuple(search.orders[site.path][: kept[site.path]].tolist()))


def entropies(features_BD: Tensor, tau: float) -> Tensor:
    """Return each image's entropy in nats, from 0 to log B, of the softmax of tau times its cosines to its batch.

    The batch includes the image itself.
    """
    unit_BD = normalize(features_BD.to(torch.promote_types(features_BD.dtype, torch.float32)), dim=1)
    log_BB = (tau * unit_BD @ unit_BD.T).log_softmax(dim=1)
    return -(log_BB.exp() * log_BB).sum(1)


class _Search:
    """Units in the order of their scores, and the search for how many of each MLP an entropy budget leaves."""

    def __init__(self, view: ModelView, options: Amp) -> None:
        self.view, self.options = view, options
        self.dense = self._pooled({})
        if max(len(features_BD) for features_BD in self.dense) < 2:
            raise RecipeError("calibrate: amp compares the images of a batch; use a batch_size and num_images above 1.")
        self.orders = self._orders()
        self.measured: dict[tuple[int, ...], tuple[float, float]] = {}

    def _orders(self) -> dict[str, Tensor]:
        """Rank the units of each MLP, largest change of the entropy first; scored on the dense model."""
        sums = {site.output: torch.zeros(site.d_hidden, dtype=torch.float64) for site in self.view.sites}

        def total_entropy(found: Features) -> Tensor:  # a sum, so that an image of a smaller batch counts as much
            return entropies(found.pooled_BD, self.options.tau).sum()

        def see(path: str, hidden: Tensor, gradient: Tensor) -> None:
            effects_BH = (hidden * gradient).reshape(len(hidden), -1, hidden.shape[-1]).sum(1)
            sums[path] += effects_BH.abs().sum(0).double().cpu()

        self.view.differentiate(total_entropy, list(sums), see)
        return {site.path: sums[site.output].sort(descending=True, stable=True).indices for site in self.view.sites}

    def _pooled(self, silenced: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the features of the images that the search uses, with some units silenced."""
        return self.view.pooled(silenced, num_images=self.options.num_images)

    def measure(self, kept: Mapping[str, int]) -> tuple[float, float]:
        """Return the mean entropy and mean cosine distance from the dense features, with only the best units kept.

        Args:
            kept: how many of the best units stay, for each MLP by path.
        """
        key = tuple(kept.values())
        if key not in self.measured:
            silenced = {
                site.output: self.orders[site.path][kept[site.path] :]
                for site in self.view.sites
                if kept[site.path] < site.d_hidden
            }
            entropy, drift, count = 0.0, 0.0, 0
            for dense_BD, features_BD in zip(self.dense, self._pooled(silenced), strict=True):
                entropy += float(entropies(features_BD, self.options.tau).double().sum())
                drift += float((1 - cosine_similarity(features_BD.float(), dense_BD.float())).double().sum())
                count += len(features_BD)
            self.measured[key] = entropy / count, drift / count
        return self.measured[key]

    def widths(self, delta: float) -> dict[str, int]:
        """Return how many units of each MLP stay if a layer may cost `delta`: the paper's search, last layer first."""
        kept = {site.path: site.d_hidden for site in self.view.sites}
        before = self.measure(kept)
        limits = delta, math.inf if self.options.guard is None else self.options.guard * delta
        for site in reversed(self.view.sites):
            low, high, best = 0, site.d_hidden, before
            for _ in range(self.options.trials):
                middle = (low + high) // 2
                if middle == low:  # no width left between the refused and the accepted one
                    break
                found = self.measure({**kept, site.path: middle})
                if all(new - old <= limit for new, old, limit in zip(found, before, limits, strict=True)):
                    high, best = middle, found
                else:
                    low = middle
            kept[site.path], before = high, best
        return kept

    def widths_at_budget(self) -> dict[str, int]:
        """Return widths that keep as many units in total as the recipe asks for, mixed from the two nearest deltas."""
        budget = sum(self.view.widths.values())
        many = {site.path: site.d_hidden for site in self.view.sites}
        few = dict.fromkeys(many, 1)
        low, high = DELTAS
        for _ in self.view.track(range(self.options.rounds), "searching for delta"):
            if budget in (sum(many.values()), sum(few.values())):
                break
            delta = math.sqrt(low * high)
            kept = self.widths(delta)
            if sum(kept.values()) >= budget:
                many, low = kept, delta
            else:
                few, high = kept, delta
        self.view.note(f"amp: these widths lie at a delta of {low:.2g} to {high:.2g} nats a block.")
        return _between(few, many, budget)


def _between(few: Mapping[str, int], many: Mapping[str, int], total: int) -> dict[str, int]:
    """Interpolate linearly between two sets of widths to reach a given total; largest remainders are rounded up."""
    gap = sum(many.values()) - sum(few.values())
    if gap == 0:
        return dict(few)
    share = total - sum(few.values())
    parts = {path: divmod(few[path] * gap + share * (many[path] - few[path]), gap) for path in few}
    missing = total - sum(whole for whole, _ in parts.values())
    ahead = sorted(parts, key=lambda path: -parts[path][1])[:missing]
    return {path: whole + (path in ahead) for path, (whole, _) in parts.items()}
