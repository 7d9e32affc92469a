"""Random units: the baseline below which no method should fall."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.methods.registry import SiteMethod, register
from vitrim.types import SiteView


@register
class Random(SiteMethod):
    """Keep units drawn at random, without replacement."""

    name = "random"
    paper = "Pruning Convolutional Neural Networks for Resource Efficient Inference (its random baseline)"
    arxiv = "1611.06440"
    summary = "units drawn at random, under the seed"
    needs = "weights"

    def select(self, view: SiteView) -> Tensor:
        """A random subset of the units.

        Args:
            view: how many units there are, how many stay, and the seeded source of chance.

        Returns:
            Their indices.
        """
        return torch.randperm(view.weights.num_units, generator=view.generator)[: view.num_keep]
