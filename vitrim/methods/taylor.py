"""Taylor: keeps the units whose removal, one at a time, would move the features most, to first order.

The published criterion expands a loss against labels, which are not available here; and the distance to the dense
features, the natural loss, has no gradient at the dense model. So the features themselves are expanded. Removing a unit
moves them by the Jacobian times its activations. The squared length of that is the mean, over random signs v, of the
square of the sum over tokens of a times g, where g is the gradient of v times the features (Hutchinson's estimate).

Shapes: B images, D feature width, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from vitrim.methods.registry import ModelMethod, register
from vitrim.ops.output_metric import signs_like
from vitrim.surgery import KeepUnits
from vitrim.tokens import Features
from vitrim.types import ModelView


@register
class Taylor(ModelMethod):
    """Taylor: keeps units by the squared first-order change of the features."""

    name = "taylor"
    paper = "Importance Estimation for Neural Network Pruning (its squared gates, on features in place of a loss)"
    arxiv = "1906.10771"
    summary = "units by the squared first-order change of the features"
    needs = "images"
    repairs = False
    takes = "widths"

    draws: int = Field(default=1, ge=1)
    """How many random projections are drawn per image; more give a steadier score, each costs a backward pass."""

    def propose(self, view: ModelView) -> Iterator[KeepUnits]:
        """Yield one cut per MLP that keeps its highest scores, to the recipe's width; ties go to the lowest index."""
        scores = {site.output: torch.zeros(site.d_hidden, dtype=torch.float64) for site in view.sites}

        def random_sum(found: Features) -> Tensor:
            return torch.stack([(part * signs_like(part, view.generator)).sum() for part in found.tensors]).sum()

        def see(path: str, hidden: Tensor, gradient: Tensor) -> None:
            effects_BH = (hidden * gradient).reshape(len(hidden), -1, hidden.shape[-1]).sum(1)
            scores[path] += effects_BH.double().square().sum(0).cpu()

        for _ in range(self.draws):
            view.differentiate(random_sum, list(scores), see)
        for site in view.sites:
            order_H = scores[site.output].sort(descending=True, stable=True).indices
            yield KeepUnits(site=site, keep=tuple(order_H[: view.widths[site.path]].tolist()))
