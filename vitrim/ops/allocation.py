"""Widths under a common budget: how much of an MLP's output its first units carry, and the best widths of all MLPs.

Both are exact: one factorisation gives the least-squares fit of every width at once, and the choice of widths is solved
to the optimum, not rounded from a relaxed one. Nothing here knows what an error or a cost stands for.

Shapes: H hidden units, D model width, J choices of one MLP, S states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrim.errors import BudgetError

Values = NDArray[np.float64]
TINY = 1e-9  # share of an MLP's energy below which an error is rounding error
BISECTIONS = 100  # halvings of the price of a unit of cost: to the last bit of a float64


def explained_energy(gram_HH: Tensor, cross_HD: Tensor, order_H: Tensor) -> Tensor:
    """Return how much of a target's energy a least-squares fit on the first 1..H units explains.

    The leading K rows of the Gram matrix's Cholesky factor L are the factor of the first K units, so each row of
    L^-1 C adds what its unit explains beyond those before it. A ridge of the square root of the working precision,
    relative to the mean energy, keeps the factor where units are linearly dependent; where sums are rounded more
    coarsely than that, it grows tenfold until there is a factor, up to a thousandth.

    Args:
        gram_HH: second moments of the units, centred if a bias takes the mean, (H, H).
        cross_HD: cross moments of the units with the target, centred alike, (H, D).
        order_H: the units in the order in which they are kept, int64 (H,).

    Returns:
        Explained energy of the first 1..H units (H,), never falling. O(H^3 + H^2 D).
    """
    order_H = order_H.to(gram_HH.device)
    gram_HH, cross_HD = gram_HH[order_H][:, order_H].to(cross_HD.dtype), cross_HD[order_H]
    energy = gram_HH.diagonal().mean().clamp(min=torch.finfo(gram_HH.dtype).tiny)
    ridge = torch.finfo(gram_HH.dtype).eps ** 0.5
    gram_HH.diagonal().add_(ridge * energy)
    factor_HH, failed = torch.linalg.cholesky_ex(gram_HH)
    while failed:
        gram_HH.diagonal().add_(9 * ridge * energy)
        ridge *= 10
        factor_HH, failed = torch.linalg.cholesky_ex(gram_HH, check_errors=10 * ridge > 1e-3)
    rows_HD = torch.linalg.solve_triangular(factor_HH, cross_HD, upper=False)
    return rows_HD.square().sum(1).cumsum(0)


def dropped_energy(gram_HH: Tensor, weight_DH: Tensor, order_H: Tensor) -> Tensor:
    """Return the output energy that is lost if the first 1..H units stay as they are and the others are removed.

    Args:
        gram_HH: second moments of the units, (H, H).
        weight_DH: the output projection, (D, H).
        order_H: the units in the order in which they are kept, int64 (H,).

    Returns:
        Lost energy for 1..H kept units (H,); the last entry is zero. O(H^2 D).
    """
    order_H = order_H.to(gram_HH.device)
    weight_DH = weight_DH.to(gram_HH)[:, order_H]
    pairs_HH = gram_HH[order_H][:, order_H] * (weight_DH.T @ weight_DH)
    last_H = pairs_HH.flip(0, 1).cumsum(0).cumsum(1).diagonal()  # of the last 1..H units together
    return torch.cat([last_H.flip(0)[1:], last_H.new_zeros(1)])


def through(own_H: Values, own_P: Values, final_P: Values) -> Values:
    """Interpolate final errors at all widths: piecewise linear in the MLP's own error, through zero and the measured.

    Args:
        own_H: the MLP's error at widths 1..H.
        own_P: the MLP's error at the widths where the final error was measured.
        final_P: the final error there; where it falls although the MLP's own error rises, it is held constant.
    """
    rising = np.argsort(own_P, kind="stable")
    x = np.concatenate([[0.0], np.maximum(own_P[rising], TINY)])
    y = np.concatenate([[0.0], np.maximum.accumulate(final_P[rising])])
    return np.where(own_H > x[-1], own_H * (y[-1] / x[-1]), np.interp(own_H, x, y))


@dataclass(frozen=True, kw_only=True)
class _Relaxed:
    """A price per unit of cost, and the choices that are best at it and fit the budget.

    `excess` holds, for each choice of each MLP, how much worse it is than the best one at that price.
    """

    price: float
    choices: list[int]
    excess: list[Values]


def best_choices(errors: Sequence[Values], costs: Sequence[NDArray[np.int64]], budget: int) -> list[int]:
    """Pick one choice for each MLP so that the sum of errors is the smallest that the budget allows.

    A multiple-choice knapsack, solved to the optimum: partial sums that another one beats in both cost and error are
    dropped, and so are those that a Lagrangian bound shows to end above a known solution.

    Args:
        errors: for each MLP the error of each of its choices, (J,).
        costs: for each MLP the cost of each of its choices, whole numbers (J,).
        budget: upper bound on the sum of costs.

    Returns:
        Index of each MLP's choice; of equal solutions the cheapest.

    Raises:
        BudgetError: even the cheapest choices cost more than the budget.

    Example:
        Two MLPs with two widths each; the second loses more when it is narrow, so it gets the wide one.

        >>> import numpy as np
        >>> errors = [np.array([1.0, 0.5]), np.array([3.0, 0.5])]
        >>> best_choices(errors, [np.array([1, 2]), np.array([1, 2])], budget=3)
        [0, 1]
    """
    least = [int(cost_J.min()) for cost_J in costs]
    if sum(least) > budget:
        raise BudgetError(f"budget: {budget:,} is below the {sum(least):,} that the smallest widths cost.")
    relaxed = _relax(errors, costs, budget)
    found = sum(float(error_J[j]) for error_J, j in zip(errors, relaxed.choices, strict=True))
    spent = sum(int(cost_J[j]) for cost_J, j in zip(costs, relaxed.choices, strict=True))
    # What the bound leaves open; a choice or a sum whose excess is larger ends above what was found.
    gap = relaxed.price * (budget - spent) + 1e-12 * (found + sum(float(error_J.max()) for error_J in errors))
    cost_S, error_S, excess_S = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # of each MLP: the state before, and the choice
    for number, (error_J, cost_J) in enumerate(zip(errors, costs, strict=True)):
        total_SJ = cost_S[:, None] + cost_J
        excess_SJ = excess_S[:, None] + relaxed.excess[number]
        open_SJ = (excess_SJ <= gap) & (total_SJ <= budget - sum(least[number + 1 :]))
        before, choice = np.nonzero(open_SJ)
        cost, error = total_SJ[before, choice], error_S[before] + error_J[choice]
        kept = _undominated(cost, error)
        steps.append((before[kept], choice[kept]))
        cost_S, error_S, excess_S = cost[kept], error[kept], excess_SJ[before, choice][kept]
    state, picked = len(cost_S) - 1, []  # errors fall as costs rise: the last state is the best
    for before, choice in reversed(steps):
        picked.append(int(choice[state]))
        state = before[state]
    return picked[::-1]


def _undominated(cost: NDArray[np.int64], error: Values) -> NDArray[np.int64]:
    """Return the indices, by rising cost, of the entries that no other entry beats in both cost and error."""
    order = np.lexsort((error, cost))
    lowest_before = np.minimum.accumulate(np.concatenate([[np.inf], error[order][:-1]]))
    return order[error[order] < lowest_before]


def _relax(errors: Sequence[Values], costs: Sequence[NDArray[np.int64]], budget: int) -> _Relaxed:
    """Find the lowest price at which the choices that minimise error + price * cost fit the budget."""

    def at(price: float) -> tuple[list[int], list[Values]]:
        sums = [error_J + price * cost_J for error_J, cost_J in zip(errors, costs, strict=True)]
        # Of equal sums the cheapest.
        best = [int(np.lexsort((cost_J, sum_J))[0]) for sum_J, cost_J in zip(sums, costs, strict=True)]
        return best, [sum_J - sum_J.min() for sum_J in sums]

    def fits(choices: list[int]) -> bool:
        return sum(int(cost_J[j]) for cost_J, j in zip(costs, choices, strict=True)) <= budget

    low, high = 0.0, sum(float(np.ptp(error_J)) for error_J in errors) + 1.0  # costs are whole: the cheapest win there
    if fits(at(low)[0]):
        high = low
    for _ in range(BISECTIONS if high else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)[0]) else (middle, high)
    choices, excess = at(high)
    return _Relaxed(price=high, choices=choices, excess=excess)
