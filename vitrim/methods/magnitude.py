"""Magnitude pruning of hidden units: the plainest baseline, and what most libraries do by default."""

from __future__ import annotations

from torch import Tensor

from vitrim.methods.registry import SiteMethod, register
from vitrim.types import SiteView


@register
class Magnitude(SiteMethod):
    """Magnitude: units with the largest product of input and output weight norms."""

    name = "magnitude"
    paper = "Learning both Weights and Connections for Efficient Neural Networks (grouped by unit)"
    arxiv = "1506.02626"
    summary = "units with the largest input times output weight norms"
    needs = "weights"
    repairs = False

    def select(self, view: SiteView) -> Tensor:
        """Return units by the product of their input and output weight norms, the lowest index first in a tie."""
        scores_H = view.weights.input_rows.float().norm(dim=1) * view.weights.output_DH.float().norm(dim=0)
        return scores_H.sort(descending=True, stable=True).indices[: view.num_keep].cpu()
