"""Magnitude pruning of hidden units: the simplest baseline, and the default of most libraries."""

from __future__ import annotations

from torch import Tensor

from vitrim.methods.registry import SiteMethod, register
from vitrim.types import SiteView


@register
class Magnitude(SiteMethod):
    """Magnitude: keeps units with the largest product of input and output weight norms."""

    name = "magnitude"
    paper = "Learning both Weights and Connections for Efficient Neural Networks (grouped by unit)"
    arxiv = "1506.02626"
    summary = "units with the largest input times output weight norms"
    needs = "weights"
    repairs = False

    def select(self, view: SiteView) -> Tensor:
        """Return the units to keep by product of input and output weight norms; ties go to the lowest index."""
        scores_H = view.weights.input_rows.float().norm(dim=1) * view.weights.output_DH.float().norm(dim=0)
        return scores_H.sort(descending=True, stable=True).indices[: view.num_keep].cpu()
