"""Several matrices as one dense basis times sparse coefficients: the rank that a budget pays, the start, the masks.

The matrices stand side by side, each turned so that its columns are in the space of the model width. Coefficients hold
zeros where their mask is False. Nothing here knows a layer, and nothing is trained.

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
    """The largest rank at which basis and coefficients have no more numbers than a share of the matrices.

    Args:
        num_rows: D.
        num_cols: C, by the matrices' own widths.
        keep: the share, 0..1.
        sparsity: share of the coefficients that is zero, and not stored.
        masks: count the masks' bits, too; the paper does not.

    Returns:
        R, 0 where even a basis of one column is too much.

    Paper: FiPS, arXiv 2411.09816, where D = d and C = 4 d k G.
    """
    per_rank = num_rows + num_cols * (1 - sparsity + (MASK_BITS if masks else 0))
    return math.floor(keep * num_rows * num_cols / per_rank)


def num_coefficients(num_rows: int, num_cols: int, rank: int, *, keep: float, masks: bool = False) -> int:
    """How many coefficients the same budget pays for beside a basis of a given rank, at most all there are."""
    left = keep * num_rows * num_cols - rank * (num_rows + (num_cols * MASK_BITS if masks else 0))
    return min(rank * num_cols, math.floor(left))


def leading_basis(joined_DC: Tensor, rank: int, *, damping: float = 32.0) -> tuple[Tensor, Tensor]:
    """The left singular vectors and what they are multiplied by: all singular values are in the coefficients.

    Past the D directions there are, the basis is padded with zero columns, which leaves the product as it is, and the
    coefficients with their leading rows, damped: a gradient reaches the new columns through them.

    Args:
        joined_DC: the matrices side by side, any float dtype.
        rank: R.
        damping: the paper's tau.

    Returns:
        Basis (D, R) and coefficients (R, C), float32, on the CPU; from the second moment in float64, O(C D^2).
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
    """A mask of exactly `count` entries: those of the largest scores anywhere in a tensor."""
    flat = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    flat[scores.flatten().topk(count, sorted=False).indices] = True
    return flat.view_as(scores)


def cubic_sparsity(progress: float, final: float) -> float:
    """Gradual magnitude pruning: the share of zeros on the way, steep at first, level at the end (progress 0..1)."""
    first = min(FIRST_SPARSITY, final)
    return final + (first - final) * (1 - progress) ** 3


def exchanged_share(progress: float) -> float:
    """RigL: the share of the coefficients that stay which is exchanged on the way, a cosine to zero."""
    return DROP_SHARE / 2 * (1 + math.cos(math.pi * progress))


def exchange(mask: Tensor, coeff: Tensor, gradient: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """RigL: the smallest coefficients give their places to those whose gradients are largest.

    Args:
        mask: where coefficients are stored.
        coeff: their values, zero elsewhere.
        gradient: of the loss by all coefficients, also those that are zero.
        count: how many are exchanged; one that is dropped may come back, as zero.

    Returns:
        The mask after, with as many entries, and the one of those that stayed: what came in starts from zero.
    """
    num_stored = int(mask.sum())
    count = min(count, num_stored, mask.numel() - num_stored)
    stays = largest(coeff.abs().masked_fill(~mask, -1), num_stored - count)
    comes = largest(gradient.abs().masked_fill(stays, -1), count)
    return stays | comes, stays
