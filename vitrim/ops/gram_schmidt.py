"""Greedy Gram-Schmidt selection of rows: the rows that span the most.

One round picks, again and again, the row with the largest part outside the span of the rows picked so far. That is
column-pivoted QR of the transposed matrix, so LAPACK's `geqp3` is the test's oracle. The published loop rewrites the
whole matrix at each pick; here the matrix is only read: an orthonormal basis is kept, only the picked row is deflated
(twice, for orthogonality to working precision) and squared norms are downdated with one product a pick.

Shapes: H rows (hidden units), D columns (model width), K picks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitrim.errors import BudgetError

# A downdated squared norm carries an absolute error of about eps times the norm it started from. Once the largest
# has fallen by this factor, all are computed afresh from the raw rows, which keeps at least 13 of float64's 16 digits.
REFRESH_BELOW = 1e-3


def select_units(rows_HD: Tensor, num_keep: int) -> Tensor:
    """Pick the rows that span the most, by pivoted Gram-Schmidt.

    Args:
        rows_HD: one row per hidden unit, any float dtype, (H, D); computed in float64 where the device has it.
        num_keep: K in 1..H; past the rank, a new round restarts from the raw rows not yet taken.

    Returns:
        int64 indices (K,), in pick order, no repeats; a tie goes to the lowest index.

    Raises:
        BudgetError: num_keep is outside 1..H.

    Paper: DGMR, arXiv 2506.08591, section 3. O(K H D) time, O(K D) extra memory.
    """
    check_num_keep(num_keep, rows_HD.shape[0])
    rows_HD = rows_HD.detach().to(working_dtype(rows_HD.device))
    floor = max(rows_HD.shape) * torch.finfo(rows_HD.dtype).eps * float(rows_HD.norm(dim=1).max())
    left = torch.arange(rows_HD.shape[0], device=rows_HD.device)
    return pick_in_rounds(left, num_keep, lambda left, missing: _one_round(rows_HD[left], missing, floor))


def residual_curve(rows_HD: Tensor, order: Tensor) -> Tensor:
    """Share of the matrix left outside the span of the first k rows of `order`, for k = 0..K.

    Args:
        rows_HD: one row per hidden unit, (H, D).
        order: indices of rows, (K,).

    Returns:
        (K + 1,) float64, from 1 down: squared Frobenius norm of what is left over that of the whole.
    """
    rows_HD = rows_HD.detach().double().cpu()
    order = order.cpu()[: rows_HD.shape[1]]  # the basis is full after D rows
    basis_DK, triangle_KK = torch.linalg.qr(rows_HD[order].T)
    # A row that depends on earlier ones yields an arbitrary basis vector: it explains nothing new.
    new_K = triangle_KK.diagonal().abs() > 1e-10 * triangle_KK.diagonal().abs().max()
    explained_K = (rows_HD @ basis_DK).square().sum(0) * new_K
    left_K = 1 - explained_K.cumsum(0) / rows_HD.square().sum()
    return torch.cat([torch.ones(1, dtype=torch.float64), left_K]).clamp(min=0)


def pick_in_rounds(left: Tensor, num_keep: int, one_round: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Pick units round after round until there are enough.

    Args:
        left: indices of all units.
        num_keep: how many to pick.
        one_round: given the units still there and how many are missing, picks among them by position, as many as it
            can tell apart.

    Returns:
        int64 indices in pick order, on the CPU. Units that no round can tell apart come last, lowest index first.
    """
    picked: list[Tensor] = []
    while (missing := num_keep - sum(len(part) for part in picked)) > 0:
        order = one_round(left, missing)
        if len(order) == 0:  # only zero rows or constant units are left
            order = torch.arange(missing, device=left.device)
        picked.append(left[order])
        mask = torch.ones(len(left), dtype=torch.bool, device=left.device)
        mask[order] = False
        left = left[mask]
    return torch.cat(picked).cpu()


def check_num_keep(num_keep: int, num_units: int) -> None:
    """Refuse a count outside 1..H."""
    if not 1 <= num_keep <= num_units:
        raise BudgetError(f"asked to keep {num_keep} of {num_units} units; use 1..{num_units}.")


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _one_round(rows_RD: Tensor, limit: int, floor: float) -> Tensor:
    """Pivoted Gram-Schmidt until `limit` picks, or until no row has more than `floor` outside the span."""
    limit = min(limit, *rows_RD.shape)
    basis_KD = rows_RD.new_zeros(limit, rows_RD.shape[1])
    taken = torch.zeros(rows_RD.shape[0], dtype=torch.bool, device=rows_RD.device)
    norms_R = rows_RD.square().sum(1)
    refreshed_at = float(norms_R.max())
    picks: list[int] = []
    while len(picks) < limit:
        if float(norms_R.max()) < REFRESH_BELOW * refreshed_at:
            norms_R = _squared_residuals(rows_RD, basis_KD[: len(picks)]).masked_fill(taken, -1.0)
            refreshed_at = float(norms_R.max())
        if refreshed_at <= floor**2:
            break
        pick = int(norms_R.argmax())
        basis_ND = basis_KD[: len(picks)]
        row_D = rows_RD[pick]
        for _ in range(2):
            row_D = row_D - (basis_ND @ row_D) @ basis_ND
        direction_D = row_D / row_D.norm()
        basis_KD[len(picks)] = direction_D
        picks.append(pick)
        taken[pick] = True
        norms_R = (norms_R - (rows_RD @ direction_D).square()).clamp(min=0).masked_fill(taken, -1.0)
    return torch.tensor(picks, dtype=torch.int64, device=rows_RD.device)


def _squared_residuals(rows_RD: Tensor, basis_KD: Tensor) -> Tensor:
    """Squared norm of each row's part outside an orthonormal basis."""
    left_RD = rows_RD - (rows_RD @ basis_KD.T) @ basis_KD
    return (left_RD - (left_RD @ basis_KD.T) @ basis_KD).square().sum(1)
