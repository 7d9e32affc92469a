"""Closed forms for attention heads that lose dimensions: what the kept dimensions can predict is folded into them.

Everything is for one head and plain second moments; nothing here knows a model.

Shapes: F dimensions of a head, K kept ones, P dropped ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_logits(gram_q_FF: Tensor, gram_k_FF: Tensor, keep: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Return transforms of the kept query and key dimensions so that their logits approximate those of all dimensions.

    The kept dimensions' logits become q_K' (I + M) k_K, where M minimises the squared error against what the dropped
    dimensions contributed to the logits, plus a ridge on M. I + M is split over both sides by its singular values.

    Args:
        gram_q_FF: mean of q q' over tokens, (F, F).
        gram_k_FF: mean of k k' over tokens, (F, F).
        keep: indices of the kept dimensions, int64 (K,).
        ridge: penalty on M, relative to the product of both sides' mean energies.

    Returns:
        Left and right transform, each (K, K): q' = left q_K and k' = right k_K.

    Paper: CORP, arXiv 2602.05243; solved by two eigendecompositions in place of its Kronecker system. O(K^3).
    """
    dropped = _others(keep, len(gram_q_FF))
    gram_q_KK, gram_k_KK = (gram[keep][:, keep] for gram in (gram_q_FF, gram_k_FF))
    wanted_KK = gram_q_FF[keep][:, dropped] @ gram_k_FF[dropped][:, keep]
    values_q_K, vectors_q_KK = torch.linalg.eigh(gram_q_KK)
    values_k_K, vectors_k_KK = torch.linalg.eigh(gram_k_KK)
    penalty = ridge * gram_q_KK.diagonal().mean() * gram_k_KK.diagonal().mean()
    spread_KK = values_q_K[:, None] * values_k_K + penalty.clamp(min=torch.finfo(gram_q_FF.dtype).tiny)
    m_KK = vectors_q_KK @ ((vectors_q_KK.T @ wanted_KK @ vectors_k_KK) / spread_KK) @ vectors_k_KK.T
    left_KK, singular_K, right_KK = torch.linalg.svd(torch.eye(len(keep)).to(m_KK) + m_KK)
    root_K = singular_K.sqrt()
    return (left_KK * root_K).T, root_K[:, None] * right_KK


def fold_values(
    sum_F: Tensor, gram_FF: Tensor, count: int, keep: Tensor, *, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict the dropped value dimensions from the kept ones: v_P = B v_K + c, by ridge on centred moments.

    Args:
        sum_F: sum of v over tokens, (F,).
        gram_FF: sum of v v' over tokens, (F, F).
        count: number of tokens.
        keep: indices of the kept dimensions, int64 (K,).
        ridge: penalty on B, relative to the mean variance of a kept dimension.

    Returns:
        B (P, K), c (P,) and the indices of the dropped dimensions (P,). Attention rows sum to one, so a constant passes
        through attention unchanged and c may be folded into the output bias.
    """
    dropped, mean_F = _others(keep, len(gram_FF)), sum_F / count
    covariance_FF = gram_FF / count - torch.outer(mean_F, mean_F)
    kept_KK = covariance_FF[keep][:, keep]
    penalty = ridge * kept_KK.diagonal().mean().clamp(min=torch.finfo(gram_FF.dtype).tiny)
    factor = torch.linalg.cholesky(kept_KK + penalty * torch.eye(len(keep)).to(kept_KK))
    b_PK = torch.cholesky_solve(covariance_FF[keep][:, dropped], factor).T
    return b_PK, mean_F[dropped] - b_PK @ mean_F[keep], dropped


def oas_shrinkage(covariance_KK: Tensor, count: int) -> float:
    """Return by how much to shrink a sample covariance towards a multiple of the identity, 0..1.

    Args:
        covariance_KK: covariance estimated from samples, (K, K).
        count: number of samples.

    Paper: Oracle Approximating Shrinkage, Chen, Wiesel, Eldar and Hero, 2010.
    """
    size = len(covariance_KK)
    trace, squares = float(covariance_KK.trace()), float(covariance_KK.square().sum())
    spread = (count + 1 - 2 / size) * (squares - trace**2 / size)
    return 1.0 if spread <= 0 else min(1.0, ((1 - 2 / size) * squares + trace**2) / spread)


def _others(keep: Tensor, total: int) -> Tensor:
    """Return the indices in 0..total-1 that are not kept, in order."""
    mask = torch.ones(total, dtype=torch.bool, device=keep.device)
    mask[keep] = False
    return mask.nonzero().flatten()
