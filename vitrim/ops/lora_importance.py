"""Importance of groups of rows or columns of weights that LoRA adapts, from its factors and their gradients alone.

A frozen weight has no gradient. Its change by one step of gradient descent on the factors is known without one: with
G_A and G_B the factors' gradients, (B - G_B)(A - G_A) - B A = -(G_B A + B G_A - G_B G_A), and what stands in brackets
is read as the gradient of the sum (LoRAPrune, arXiv 2305.18403). The product with the weight says to first order what
its entries are worth.

Shapes: weight (M, N), rank R, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A frozen weight W, the factors of `scale` * B A that is added to it, and the factors' gradients."""

    weight_MN: Tensor
    a_RN: Tensor
    b_MR: Tensor
    grad_a_RN: Tensor
    grad_b_MR: Tensor
    scale: float

    @property
    def adapted_MN(self) -> Tensor:
        """The weight that the layer has."""
        return self.weight_MN + self.scale * (self.b_MR @ self.a_RN)

    @property
    def estimated_gradient_MN(self) -> Tensor:
        """The estimate of the adapted weight's gradient."""
        return self.grad_b_MR @ self.a_RN + (self.b_MR - self.grad_b_MR) @ self.grad_a_RN


def group_scores(factors: Factors, num_groups: int, *, columns: bool = False, num_parts: int = 1) -> Tensor:
    """Return a score (G,) for each group of neighbouring rows of a layer, or of columns.

    Args:
        factors: of one layer; the matrix of its size that this makes is freed at once.
        num_groups: G: hidden units, or heads.
        columns: groups are of columns.
        num_parts: how many projections lie in one matrix, one after the other, such as query, key and value; each has
            groups of its own and counts as a layer of its own.

    Returns:
        Sums of |estimated gradient * weight|, of length 1 over the groups of each part, added over the parts.
    """
    saliency_MN = (factors.estimated_gradient_MN * factors.adapted_MN).abs_()
    sums_PG = saliency_MN.sum(0 if columns else 1).view(num_parts, num_groups, -1).sum(2)
    return (sums_PG / sums_PG.norm(dim=1, keepdim=True).clamp_min(torch.finfo(sums_PG.dtype).tiny)).sum(0)


def cubic_share(step: int, num_steps: int, *, ends: float) -> float:
    """Return the share of the target that is reached at a step, counted from 1: a cubic, level at first and at the end.

    Args:
        step: after how many of the steps.
        num_steps: how many there are; the last one always has the whole target.
        ends: share of the steps in which nothing changes, at the start and again at the end.
    """
    progress = (step - ends * num_steps) / ((1 - 2 * ends) * num_steps)
    return 1 - (1 - min(1.0, max(0.0, progress))) ** 3
