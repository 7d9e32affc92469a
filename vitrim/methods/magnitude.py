"""Magnitude pruning of hidden units: the plainest baseline, and what most libraries do by default."""

from __future__ import annotations

from torch import Tensor

from vitrim.methods.registry import SiteMethod, register
from vitrim.types import SiteView


@register
class Magnitude(SiteMethod):
    """Keep the units whose input and output weights are the largest."""

    name = "magnitude"
    paper = "Learning both Weights and Connections for Efficient Neural Networks (grouped by unit)"
    arxiv = "1506.02626"
    summary = "units with the largest input times output weight norms"
    needs = "weights"

    def select(self, view: SiteView) -> Tensor:
        """Units by the product of their input and output weight norms, largest first; a tie goes to the lowest index.

        Args:
            view: the MLP's weights, and how many units stay.

        Returns:
            Their indices.
        """
        scores_H = view.weights.input_rows.float().norm(dim=1) * view.weights.output_DH.float().norm(dim=0)
        return scores_H.sort(descending=True, stable=True).indices[: view.num_keep].cpu()
