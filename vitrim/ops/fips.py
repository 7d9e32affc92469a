"""Several matrices as one dense basis times sparse coefficients: rank for a budget, starting values and mask updates.

The matrices stand side by side, each turned so that its columns are vectors of the model width. Coefficients are zero
wherever their mask is False. Nothing here knows a layer, and nothing is trained.

Shapes: D model width, C columns of all matrices together, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIRST_SPARSITY = 0.05  # of the cubic schedule, the paper's
DROP_SHARE = 0.1  # of the coefficients that stay, exchanged at RigL's first update; the paper's
MASK_BITS = 1 / 32  # what a coefficient's bit in a mask costs, in numbers of 32 bits


def rank_for_budget(num_rows: int, num_cols: int, *, keep: float, sparsity: float, masks: bool = False) -> int:
    """Return the largest rank at which basis and coefficients store no more numbers than a share of the matrices.

    Args:
        num_rows: D.
        num_cols: C.
        keep: share of the matrices' numbers that may be stored, 0..1.
        sparsity: share of the coefficients that is zero and not stored, 0..1.
        masks: whether to count the masks' bits too; the paper does not.

    Returns:
        R, or 0 if even a basis of one column is too much.

    Paper: FiPS, arXiv 2411.09816, where D = d and C = 4 d k G.
    """
    per_rank = num_rows + num_cols * (1 - sparsity + (MASK_BITS if masks else 0))
    return math.floor(keep * num_rows * num_cols / per_rank)


def num_coefficients(num_rows: int, num_cols: int, rank: int, *, keep: float, masks: bool = False) -> int:
    """Return how many nonzero coefficients a budget allows beside a basis of a given rank, at most R * C.

    Args:
        num_rows: D.
        num_cols: C.
        rank: R.
        keep: share of the matrices' numbers that may be stored, 0..1.
        masks: whether to count the masks' bits too.
    """
    left = keep * num_rows * num_cols - rank * (num_rows + (num_cols * MASK_BITS if masks else 0))
    return min(rank * num_cols, math.floor(left))


def leading_basis(joined_DC: Tensor, rank: int, *, damping: float = 32.0) -> tuple[Tensor, Tensor]:
    """Factor matrices into their leading left singular vectors and coefficients that carry the singular values.

    Past the D directions that exist, the basis is padded with zero columns, which does not change the product, and the
    coefficients with a damped copy of their leading rows, so that the new columns still get a gradient.

    Args:
        joined_DC: the matrices side by side, any float dtype, (D, C).
        rank: R; may be larger than D.
        damping: divisor of the copied rows, the paper's tau.

    Returns:
        Basis (D, R) and coefficients (R, C), float32 on the CPU; computed from the second moment in float64, O(C D^2).
    """
    joined_DC = joined_DC.cpu().double()
    vectors_DD = torch.linalg.eigh(joined_DC @ joined_DC.T).eigenvectors.flip(1)
    rows = torch.arange(rank)
    basis_DR = vectors_DD[:, rows % len(vectors_DD)]
    coeff_RC = basis_DR.T @ joined_DC
    padded = rows >= len(vectors_DD)
    basis_DR[:, padded], coeff_RC[padded] = 0, coeff_RC[padded] / damping
    return basis_DR.float(), coeff_RC.float()


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` True entries, at the largest scores anywhere in a tensor."""
    flat = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    flat[scores.flatten().topk(count, sorted=False).indices] = True
    return flat.view_as(scores)


def cubic_sparsity(progress: float, final: float) -> float:
    """Return the share of zeros at a point of training (progress 0..1): fast at first, levelling off at `final`.

    Paper: gradual magnitude pruning, arXiv 1710.01878.
    """
    first = min(FIRST_SPARSITY, final)
    return final + (first - final) * (1 - progress) ** 3


def exchanged_share(progress: float) -> float:
    """Return the share of nonzero coefficients to exchange at a point of training (0..1): RigL's cosine to zero."""
    return DROP_SHARE / 2 * (1 + math.cos(math.pi * progress))


def exchange(mask: Tensor, coeff: Tensor, gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Drop the smallest coefficients and activate as many zero ones with the largest gradients (a RigL update).

    Args:
        mask: True where a coefficient is stored, (R, C).
        coeff: the coefficients, zero where not stored, (R, C).
        gradient: gradient of the loss for all coefficients, the zero ones included, (R, C).
        count: how many to exchange; a dropped one may be picked again, and then starts from zero.

    Returns:
        The new mask with as many True entries, and the mask of the coefficients that kept their value.
    """
    num_stored = int(mask.sum())
    count = min(count, num_stored, mask.numel() - num_stored)
    stays = largest(coeff.abs().masked_fill(~mask, -1), num_stored - count)
    comes = largest(gradient.abs().masked_fill(stays, -1), count)
    return stays | comes, stays
