"""Random units: the baseline below which no method should fall. Drawn without replacement."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.methods.registry import SiteMethod, register
from vitrim.types import SiteView


@register
class Random(SiteMethod):
    """Random units: the floor for the others."""

    name = "random"
    paper = "Pruning Convolutional Neural Networks for Resource Efficient Inference (its random baseline)"
    arxiv = "1611.06440"
    summary = "units drawn at random, under the seed"
    needs = "weights"
    repairs = False

    def select(self, view: SiteView) -> Tensor:
        """A seeded random subset, without replacement."""
        return torch.randperm(view.weights.num_units, generator=view.generator)[: view.num_keep]
