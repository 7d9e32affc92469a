"""The best heads of fewer dimensions: any mixtures of a head's dimensions may stay, not only some of the dimensions.

Without norms or positions between a projection and the dot product, a head's logits are a bilinear form of rank F in
its queries and keys, and its output is a linear map of rank F of its mixed values. Both are approximated by rank K from
second moments alone; nothing here knows a model.

Shapes: G heads, F dimensions of a head, K kept, A = G F dimensions of all heads, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrim.ops.least_squares import moments
from vitrim.ops.output_metric import weighed
from vitrim.types import Stats

MAX_SWEEPS, ENOUGH = 30, 1e-4  # rounds over all heads; a relative gain at which they end


@dataclass(frozen=True, kw_only=True)
class LogitSums:
    """Second moments of one attention's queries and keys, in float64: G heads, F dimensions of a head.

    `query` and `key` are what the model that is cut has, `cross` is with what the original has for the same tokens.
    Keys are centred in each image: what all keys of an image share changes no softmax.
    """

    query_GFF: Tensor
    key_GFF: Tensor
    query_cross_GFF: Tensor
    key_cross_GFF: Tensor


@dataclass(frozen=True, kw_only=True)
class ValueSums:
    """Sums of one attention's mixed values, and its output projection: D model width, A dimensions of all heads.

    `stats` has the mixed values of all heads, side by side, as its hidden units. `scale_D` is the layer scale behind
    the attention, or None; `metric_DD` is the metric on the attention's outputs, or None.
    """

    stats: Stats
    output_DA: Tensor
    output_bias_D: Tensor | None
    num_heads: int
    scale_D: Tensor | None = None
    metric_DD: Tensor | None = None


def factor_logits(sums: LogitSums, num_keep: int, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the mixtures of query and of key dimensions whose dot products come closest to the wanted logits.

    Queries are mixed to q' = left q and keys to k' = right k. With independent tokens, left' right is the matrix of
    rank K that minimises the squared error of the logits: least squares for each side, then a singular value
    decomposition in the metric of both sides' second moments. What is the same for all keys of an image does not change
    a softmax, so keys are centred in each image.

    Args:
        sums: second moments of queries and keys, and with those that they should be.
        num_keep: K in 1..F.
        ridge: penalty towards leaving a side as it is, relative to its mean energy.

    Returns:
        Left and right mixtures, each (G, K, F); the singular values are shared equally between the sides.

    O(G F^3).
    """
    wanted_q, root_q = _regressed(sums.query_GFF, sums.query_cross_GFF, ridge)
    wanted_k, root_k = _regressed(sums.key_GFF, sums.key_cross_GFF, ridge)
    left, singular, right = torch.linalg.svd(root_q @ wanted_q @ wanted_k.mT @ root_k)
    scale_GK = singular[:, :num_keep].sqrt()[:, :, None]
    both = (left.mT[:, :num_keep] * scale_GK, right[:, :num_keep] * scale_GK)
    return torch.linalg.solve(root_q, both[0].mT).mT, torch.linalg.solve(root_k, both[1].mT).mT


def lost_logits(sums: LogitSums, left_GKF: Tensor, right_GKF: Tensor) -> float:
    """Return the share of the logits' energy that is missing where mixtures take the place of queries and keys.

    Args:
        sums: second moments of queries and keys; what they are is what they should be.
        left_GKF: mixtures of queries.
        right_GKF: mixtures of keys.
    """
    query_GFF, key_GFF = sums.query_GFF, sums.key_GFF
    lost_GFF = torch.eye(query_GFF.shape[-1]).to(query_GFF) - (left_GKF.mT @ right_GKF).to(query_GFF)
    lost = ((lost_GFF @ key_GFF) * (query_GFF @ lost_GFF)).sum()
    return float(lost / (query_GFF * key_GFF).sum().clamp(min=torch.finfo(query_GFF.dtype).tiny))


def _regressed(gram_GFF: Tensor, cross_GFF: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the map to the wanted vectors by ridge regression, and the square root of the regularised moments."""
    penalty_G = ridge * gram_GFF.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(gram_GFF.dtype).tiny)
    more_GFF = penalty_G[:, None, None] * torch.eye(gram_GFF.shape[-1]).to(gram_GFF)
    values_GF, vectors_GFF = torch.linalg.eigh(gram_GFF + more_GFF)
    root_GFF = (vectors_GFF * values_GF.clamp(min=penalty_G[:, None]).sqrt()[:, None]) @ vectors_GFF.mT
    return torch.linalg.solve(gram_GFF + more_GFF, cross_GFF + more_GFF), root_GFF


def factor_values(sums: ValueSums, num_keep: int, *, ridge: float) -> Tensor:
    """Return the mixtures of each head's value dimensions from which the target can be predicted best.

    The mixtures of one head are reduced-rank regression of what the other heads leave of the target, in closed form;
    that is repeated head by head until the error stops falling.

    Args:
        sums: of the mixed values of all heads and of the wanted outputs; a bias of the projection takes up the means.
        num_keep: K in 1..F.
        ridge: penalty towards the present output projection, relative to the mean energy of a dimension.

    Returns:
        Mixtures (G, K, F): v' = mixture v.

    O(G^2 F^2 D) a round.
    """
    gram_AA, cross_AD = _regularised(sums, ridge)
    map_AD = torch.cholesky_solve(cross_AD, torch.linalg.cholesky(gram_AA))
    heads = torch.arange(len(gram_AA), device=gram_AA.device).chunk(sums.num_heads)
    gained, mixtures = 0.0, [torch.empty(())] * sums.num_heads
    for _ in range(MAX_SWEEPS):
        for head, own in enumerate(heads):
            block_FF = gram_AA[own][:, own]
            left_FD = cross_AD[own] - gram_AA[own] @ map_AD + block_FF @ map_AD[own]
            mixtures[head], map_AD[own] = _reduced(block_FF, left_FD, num_keep)
        gain = float((map_AD * (2 * cross_AD - gram_AA @ map_AD)).sum())
        if gain - gained <= ENOUGH * abs(gain):
            break
        gained = gain
    return torch.stack(mixtures)


def _reduced(gram_FF: Tensor, cross_FD: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """Return the mixtures (K, F) and the map (F, D) of rank K of a reduced-rank regression."""
    factor_FF = torch.linalg.cholesky(gram_FF)
    scores_FD = torch.linalg.solve_triangular(factor_FF, cross_FD, upper=False)
    best_FK = torch.linalg.eigh(scores_FD @ scores_FD.T).eigenvectors.flip(1)[:, :num_keep]
    mixture_FK = torch.linalg.solve_triangular(factor_FF.T, best_FK, upper=True)
    return mixture_FK.T, mixture_FK @ (best_FK.T @ scores_FD)


def select_heads(sums: ValueSums, num_keep: int, *, ridge: float) -> Tensor:
    """Pick whole heads one by one, each the one that lowers the error of the best linear prediction the most.

    Args:
        sums: of the mixed values of all heads and of the wanted outputs; a bias of the projection takes up the means.
        num_keep: how many heads stay, 1..G.
        ridge: penalty towards the present output projection, relative to the mean energy of a dimension.

    Returns:
        int64 indices, in pick order; a tie goes to the lowest index.

    O(G^2 (G F)^2 D): heads are few.
    """
    gram_AA, cross_AD = _regularised(sums, ridge)
    heads = list(torch.arange(len(gram_AA)).chunk(sums.num_heads))
    picks: list[int] = []
    for _ in range(num_keep):
        gains = [
            -1.0 if head in picks else _explained(gram_AA, cross_AD, heads, [*picks, head])
            for head in range(len(heads))
        ]
        picks.append(gains.index(max(gains)))
    return torch.tensor(picks)


def _explained(gram_AA: Tensor, cross_AD: Tensor, heads: Sequence[Tensor], chosen: Sequence[int]) -> float:
    """Return the energy of the target that some heads predict together."""
    own = torch.cat([heads[head] for head in chosen])
    factor = torch.linalg.cholesky(gram_AA[own][:, own])
    return float(torch.linalg.solve_triangular(factor, cross_AD[own], upper=False).square().sum())


def _regularised(sums: ValueSums, ridge: float) -> tuple[Tensor, Tensor]:
    """Return Gram matrix and cross moments with the ridge in them, outputs weighed."""
    gram_AA, cross_AD = moments(sums.stats, centred=sums.output_bias_D is not None)
    gram_AA = gram_AA.to(cross_AD.dtype, copy=True)
    penalty = ridge * gram_AA.diagonal().mean().clamp(min=torch.finfo(gram_AA.dtype).tiny)
    cross_AD = cross_AD + penalty * sums.output_DA.T.to(cross_AD)
    gram_AA.diagonal().add_(penalty)
    return gram_AA, weighed(cross_AD, sums.scale_D, sums.metric_DD)


def mixed(stats: Stats, weight_DA: Tensor, mixture_GKF: Tensor) -> tuple[Stats, Tensor]:
    """Return the sums of mixed values after a mixture, and the weights (D, G K) that change the outputs the least.

    Args:
        stats: sums of the mixed values of all heads, side by side.
        weight_DA: the output projection before.
        mixture_GKF: the mixture of each head.
    """
    whole_PA = torch.block_diag(*mixture_GKF)
    gram_AA = stats.hidden_HH.to(whole_PA)
    new = replace(
        stats,
        hidden_H=whole_PA @ stats.hidden_H.to(whole_PA),
        hidden_HH=whole_PA @ gram_AA @ whole_PA.T,
        cross_HD=whole_PA @ stats.cross_HD.to(whole_PA),
        fed=None if stats.fed is None else (stats.fed[0], whole_PA @ stats.fed[1].to(whole_PA)),
    )
    num_heads, _, dims = mixture_GKF.shape
    blocks_GFF = torch.stack([gram_AA[own][:, own] for own in torch.arange(num_heads * dims).chunk(num_heads)])
    half_GKF = mixture_GKF @ blocks_GFF
    small_GKK = half_GKF @ mixture_GKF.mT
    tiny = torch.finfo(small_GKK.dtype).eps * small_GKK.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    back_GKF = torch.linalg.solve(small_GKK + tiny * torch.eye(small_GKK.shape[-1]).to(small_GKK), half_GKF)
    weight_GDF = weight_DA.to(whole_PA).unflatten(1, (num_heads, dims)).transpose(0, 1)
    return new, (weight_GDF @ back_GKF.mT).transpose(0, 1).flatten(1)
