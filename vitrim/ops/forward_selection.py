"""Selection of hidden units from second moments alone; the activations are never needed again.

`select_on_moments` without a target is pivoted Cholesky of the Gram matrix: it picks what pivoted Gram-Schmidt of the
(never stored) activations would pick. With a target it is forward selection by orthogonal least squares: each pick is
the unit that lowers the squared error of the best linear prediction of the target the most.

Shapes: H hidden units, D model width, K picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.ops.gram_schmidt import check_num_keep, pick_in_rounds, working_dtype


def select_on_moments(gram_HH: Tensor, num_keep: int, *, cross_HD: Tensor | None = None) -> Tensor:
    """Pick hidden units greedily by what they add to a span or to a linear prediction.

    Args:
        gram_HH: H'H of the hidden activations (centred where the output projection has a bias), (H, H).
        num_keep: K in 1..H; past the rank, a new round restarts from the units not yet taken.
        cross_HD: H'T with the targets, (H, D); None selects on the activations alone.

    Returns:
        int64 indices (K,), in pick order, no repeats; a tie goes to the lowest index.

    Raises:
        BudgetError: num_keep is outside 1..H.

    Paper: orthogonal least squares (Chen, Cowan and Grant, 1991); Gram-Schmidt on activations is also in Subspace
    Node Pruning, arXiv 2405.17506. O(K H (K + D)) time.
    """
    check_num_keep(num_keep, gram_HH.shape[0])
    dtype = working_dtype(gram_HH.device)
    cross_HD = None if cross_HD is None else cross_HD.to(dtype)

    def one_round(left: Tensor, missing: int) -> Tensor:
        # The first round has all units: at 15,360 of them a copy of the moments would be 1.9 GB.
        gram_RR = gram_HH if len(left) == len(gram_HH) else gram_HH[left][:, left]
        return _one_round(gram_RR, None if cross_HD is None else cross_HD[left], missing, dtype)

    return pick_in_rounds(torch.arange(gram_HH.shape[0], device=gram_HH.device), num_keep, one_round)


def _one_round(gram_RR: Tensor, cross_RD: Tensor | None, limit: int, dtype: torch.dtype) -> Tensor:
    """Greedy picks until `limit`, or until no unit has anything left outside the span of the picked ones."""
    num_units = gram_RR.shape[0]
    # Rows of the Cholesky factor, picked so far.
    factor_KR = torch.zeros(min(limit, num_units), num_units, dtype=dtype, device=gram_RR.device)
    diagonal_R = gram_RR.diagonal().to(dtype, copy=True)
    # Below this share of its own energy a unit's remainder is rounding noise of the moments or the downdates.
    floor_R = diagonal_R * num_units * torch.finfo(gram_RR.dtype).eps
    taken = torch.zeros(num_units, dtype=torch.bool, device=gram_RR.device)
    residual_RD = None if cross_RD is None else cross_RD.clone()
    picks: list[int] = []
    while len(picks) < len(factor_KR):
        usable = (diagonal_R > floor_R) & ~taken
        if not bool(usable.any()):
            break
        scores_R = diagonal_R if residual_RD is None else residual_RD.square().sum(1) / diagonal_R
        pick = int(scores_R.masked_fill(~usable, -1.0).argmax())
        done = factor_KR[: len(picks)]
        pivot = diagonal_R[pick].sqrt()
        column_R = (gram_RR[pick].to(dtype) - done[:, pick] @ done) / pivot
        factor_KR[len(picks)] = column_R
        if residual_RD is not None:
            residual_RD = residual_RD - torch.outer(column_R, residual_RD[pick] / pivot)
        diagonal_R = diagonal_R - column_R.square()
        taken[pick] = True
        picks.append(pick)
    return torch.tensor(picks, dtype=torch.int64, device=gram_RR.device)
