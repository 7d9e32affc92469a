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
        ridge: penalty on each entry of M, relative to the product of its two dimensions' energies.

    Returns:
        Left and right transform, each (K, K): q' = left q_K and k' = right k_K.

    Paper: CORP, arXiv 2602.05243; solved by two eigendecompositions in place of its Kronecker system. O(K^3).
    """
    dropped = _others(keep, len(gram_q_FF))
    # Solved for dimensions of unit energy.
    root_q_K, root_k_K = (gram.diagonal()[keep].sqrt() for gram in (gram_q_FF, gram_k_FF))
    root_q_K, root_k_K = torch.where(root_q_K > 0, root_q_K, 1), torch.where(root_k_K > 0, root_k_K, 1)
    outer_KK = torch.outer(root_q_K, root_k_K)
    wanted_KK = gram_q_FF[keep][:, dropped] @ gram_k_FF[dropped][:, keep] / outer_KK
    values_q_K, vectors_q_KK = torch.linalg.eigh(gram_q_FF[keep][:, keep] / torch.outer(root_q_K, root_q_K))
    values_k_K, vectors_k_KK = torch.linalg.eigh(gram_k_FF[keep][:, keep] / torch.outer(root_k_K, root_k_K))
    spread_KK = values_q_K[:, None] * values_k_K + ridge
    m_KK = vectors_q_KK @ ((vectors_q_KK.T @ wanted_KK @ vectors_k_KK) / spread_KK) @ vectors_k_KK.T / outer_KK
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
        ridge: penalty on each column of B, relative to the variance of its kept dimension.

    Returns:
        B (P, K), c (P,) and the indices of the dropped dimensions (P,). Attention rows sum to one, so a constant passes
        through attention unchanged and c may be folded into the output bias.
    """
    dropped, mean_F = _others(keep, len(gram_FF)), sum_F / count
    covariance_FF = gram_FF / count - torch.outer(mean_F, mean_F)
    kept_KK = covariance_FF[keep][:, keep]
    rounding_K = torch.finfo(gram_FF.dtype).eps * len(keep) * gram_FF.diagonal()[keep] / count
    penalty_K = ridge * kept_KK.diagonal() + rounding_K  # what is left of a constant dimension is rounding
    factor = torch.linalg.cholesky(kept_KK + torch.diag(torch.where(penalty_K > 0, penalty_K, 1)))
    b_PK = torch.cholesky_solve(covariance_FF[keep][:, dropped], factor).T
    return b_PK, mean_F[dropped] - b_PK @ mean_F[keep], dropped


def oas_shrinkage(covariance_KK: Tensor, count: int) -> float:
    """Return by how much to shrink a sample covariance towards its diagonal, 0..1.

    Args:
        covariance_KK: covariance estimated from samples, (K, K).
        count: number of samples.

    Paper: Oracle Approximating Shrinkage, Chen, Wiesel, Eldar and Hero, 2010, which shrinks towards a multiple of the
    identity; here of the correlations, so that the scale of no single dimension matters.
    """
    size, root_K = len(covariance_KK), covariance_KK.diagonal().sqrt()
    correlation_KK = covariance_KK / torch.where(root_K > 0, root_K, 1) / torch.where(root_K > 0, root_K, 1)[:, None]
    trace, squares = float(correlation_KK.trace()), float(correlation_KK.square().sum())
    spread = (count + 1 - 2 / size) * (squares - trace**2 / size)
    return 1.0 if spread <= 0 else min(1.0, ((1 - 2 / size) * squares + trace**2) / spread)


def _others(keep: Tensor, total: int) -> Tensor:
    """Return the indices in 0..total-1 that are not kept, in order."""
    mask = torch.ones(total, dtype=torch.bool, device=keep.device)
    mask[keep] = False
    return mask.nonzero().flatten()
