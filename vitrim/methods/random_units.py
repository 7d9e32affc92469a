"""Random units, drawn without replacement: the baseline that every method should beat."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.methods.registry import SiteMethod, register
from vitrim.types import SiteView


@register
class Random(SiteMethod):
    """Random units: the baseline that every other method should beat."""

    name = "random"
    paper = "Pruning Convolutional Neural Networks for Resource Efficient Inference (its random baseline)"
    arxiv = "1611.06440"
    summary = "units drawn at random, under the seed"
    needs = "weights"
    repairs = False

    def select(self, view: SiteView) -> Tensor:
        """Return a seeded random subset of the units, drawn without replacement."""
        return torch.randperm(view.weights.num_units, generator=view.generator)[: view.num_keep]
