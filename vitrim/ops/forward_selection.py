"""Select hidden units from second moments alone, without the activations themselves.

Without a target, `select_on_moments` is pivoted Cholesky of the Gram matrix: it picks what pivoted Gram-Schmidt of the
activations would pick. With a target it is forward selection by orthogonal least squares: each pick is
the unit that lowers the squared error of the best linear prediction of the target the most.

Shapes: H hidden units, D model width, K picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.ops.gram_schmidt import check_num_keep, pick_in_rounds, working_dtype

# Picks between two rewritings of the cross moments: norms are downdated in between, which costs digits slowly.
REFRESH = 64


def select_on_moments(
    gram_HH: Tensor, num_keep: int, *, cross_HD: Tensor | None = None, rounding: float = 0.0
) -> Tensor:
    """Pick hidden units one by one, each the one that adds most to the span or to a linear prediction of the target.

    Args:
        gram_HH: H'H of the hidden activations (centred where the output projection has a bias), (H, H).
        num_keep: K in 1..H; once the picks span everything, a new round starts among the units not yet taken.
        cross_HD: H'T with the targets, (H, D); None selects by the span alone.
        rounding: relative rounding of the products in the sums, where that is more than their dtype's.

    Returns:
        int64 indices (K,), in pick order, no repeats; a tie goes to the lowest index.

    Raises:
        BudgetError: num_keep is outside 1..H.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 2.0]])
        >>> select_on_moments(hidden.T @ hidden, 2)
        tensor([2, 1])

    Paper: orthogonal least squares (Chen, Cowan and Grant, 1991); Gram-Schmidt on activations is also in Subspace
    Node Pruning, arXiv 2405.17506. O(K H (K + D)) time.
    """
    check_num_keep(num_keep, gram_HH.shape[0])
    dtype = working_dtype(gram_HH.device)
    cross_HD = None if cross_HD is None else cross_HD.to(dtype)

    def one_round(left: Tensor, missing: int) -> Tensor:
        # The first round has all units: at 15,360 of them a copy of the moments would be 1.9 GB.
        gram_RR = gram_HH if len(left) == len(gram_HH) else gram_HH[left][:, left]
        return _one_round(gram_RR, None if cross_HD is None else cross_HD[left], missing, dtype, rounding)

    return pick_in_rounds(torch.arange(gram_HH.shape[0], device=gram_HH.device), num_keep, one_round)


def _one_round(gram_RR: Tensor, cross_RD: Tensor | None, limit: int, dtype: torch.dtype, rounding: float) -> Tensor:
    """Pick greedily until `limit`, or until all remaining units lie in the span of the picks."""
    num_units = gram_RR.shape[0]
    # Rows of the Cholesky factor, picked so far.
    factor_KR = torch.zeros(min(limit, num_units), num_units, dtype=dtype, device=gram_RR.device)
    diagonal_R = gram_RR.diagonal().to(dtype, copy=True)
    # Below this share of its own energy a unit's remainder is rounding noise of the products, moments or downdates.
    floor_R = diagonal_R * max(num_units * torch.finfo(gram_RR.dtype).eps, num_units**0.5 * rounding)
    taken = torch.zeros(num_units, dtype=torch.bool, device=gram_RR.device)
    residual = None if cross_RD is None else _Residual(cross_RD, factor_KR)
    picks: list[int] = []
    while len(picks) < len(factor_KR):
        usable = (diagonal_R > floor_R) & ~taken
        if not bool(usable.any()):
            break
        scores_R = diagonal_R if residual is None else residual.squares_R / diagonal_R
        pick = int(scores_R.masked_fill(~usable, -1.0).argmax())
        done = factor_KR[: len(picks)]
        pivot = diagonal_R[pick].sqrt()
        column_R = (gram_RR[pick].to(dtype) - done[:, pick] @ done) / pivot
        factor_KR[len(picks)] = column_R
        if residual is not None:
            residual.downdate(len(picks), residual.row(pick, len(picks)) / pivot)
        diagonal_R = diagonal_R - column_R.square()
        taken[pick] = True
        picks.append(pick)
    return torch.tensor(picks, dtype=torch.int64, device=gram_RR.device)


class _Residual:
    """Cross moments of the units with the part of the target that the picks do not explain yet.

    The (H, D) matrix is rewritten once every REFRESH picks, as one matrix product. In between it is only read, once a
    pick, to update the squared norms of its rows.
    """

    def __init__(self, cross_RD: Tensor, factor_KR: Tensor) -> None:
        self.rows_RD, self.factor_KR = cross_RD.clone(), factor_KR
        self.directions_KD = cross_RD.new_zeros(REFRESH, cross_RD.shape[1])
        self.start = 0
        self.squares_R = self._squares()

    def row(self, unit: int, num_picks: int) -> Tensor:
        """Return one unit's cross moments (D,) after the first `num_picks` picks."""
        since = num_picks - self.start
        return self.rows_RD[unit] - self.factor_KR[self.start : num_picks, unit] @ self.directions_KD[:since]

    def downdate(self, index: int, direction_D: Tensor) -> None:
        """Subtract pick `index` from the rows and their squared norms; its row of the factor must be set already."""
        since, column_R = index - self.start, self.factor_KR[index]
        taken_R = (self.directions_KD[:since] @ direction_D) @ self.factor_KR[self.start : index]
        along_R = self.rows_RD @ direction_D - taken_R
        self.squares_R += column_R * (column_R * direction_D.square().sum() - 2 * along_R)
        self.squares_R.clamp_(min=0)
        self.directions_KD[since] = direction_D
        if since + 1 == REFRESH:
            self.rows_RD.addmm_(self.factor_KR[self.start : index + 1].T, self.directions_KD, alpha=-1)
            self.start = index + 1
            self.squares_R = self._squares()

    def _squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.rows_RD, dim=1).square()
