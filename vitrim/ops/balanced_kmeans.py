"""k-means with clusters of equal size.

Exactly optimal balanced assignment costs the cube of the number of rows. Here the rows that would lose the most by
not getting their first choice choose first, and at the end pairs of rows change places as long as that helps. Sizes are
exact, the optimum is only near.

Shapes: H rows, D their width, E clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.errors import BudgetError


def balanced_kmeans(rows_HD: Tensor, num_clusters: int, *, num_iterations: int = 50, seed: int = 0) -> Tensor:
    """Divide rows into clusters of equal size by k-means.

    Args:
        rows_HD: the rows to divide, (H, D).
        num_clusters: E, a divisor of H.
        num_iterations: upper bound; it stops early when nothing changes, and keeps the best assignment seen.
        seed: seed for the choice of the first centres.

    Returns:
        Cluster of each row, int64 (H,); each cluster appears H / E times.

    Raises:
        BudgetError: E does not divide H.
    """
    num_rows = len(rows_HD)
    if num_clusters < 1 or num_rows % num_clusters:
        raise BudgetError(f"{num_clusters} clusters of equal size of {num_rows} rows: use a divisor of {num_rows}.")
    rows_HD = rows_HD.double()
    generator = torch.Generator().manual_seed(seed)
    centres_ED = rows_HD[torch.randperm(num_rows, generator=generator)[:num_clusters].to(rows_HD.device)]
    best, lowest = torch.zeros(num_rows, dtype=torch.int64), float("inf")
    for _ in range(num_iterations):
        squares_HE = torch.cdist(rows_HD, centres_ED).square()
        labels = assign_equally(squares_HE)
        inertia = float(squares_HE.cpu().gather(1, labels[:, None]).sum())
        if not inertia < lowest * (1 - 1e-12):
            break
        best, lowest = labels, inertia
        centres_ED = means_of(rows_HD, labels, num_clusters)
    return exchange(torch.cdist(rows_HD, means_of(rows_HD, best, num_clusters)).square(), best)


def assign_equally(costs_HE: Tensor) -> Tensor:
    """Assign each row to a cluster, each cluster equally often.

    Rows choose in rounds; those whose second choice costs the most more than their first choose first.

    Args:
        costs_HE: cost of each row in each cluster, (H, E).

    Returns:
        Cluster of each row, int64 (H,).
    """
    costs_HE = costs_HE.cpu().double().clone()
    num_rows, num_clusters = costs_HE.shape
    room = torch.full((num_clusters,), num_rows // num_clusters)
    labels = torch.full((num_rows,), -1)
    left = torch.arange(num_rows)
    while len(left):
        two = costs_HE[left].topk(min(2, num_clusters), dim=1, largest=False)
        regret = two.values[:, -1] - two.values[:, 0]
        regret[~regret.isfinite()] = float("inf")
        for position in regret.argsort(descending=True, stable=True).tolist():
            wanted = int(two.indices[position, 0])
            if room[wanted]:
                labels[left[position]] = wanted
                room[wanted] -= 1
        costs_HE[:, room == 0] = float("inf")  # who found his full chooses again
        left = left[labels[left] < 0]
    return labels


def exchange(costs_HE: Tensor, labels: Tensor) -> Tensor:
    """Improve an assignment and keep cluster sizes, by swapping the pair of rows that gains most until none gains.

    Args:
        costs_HE: cost of each row in each cluster, (H, E).
        labels: cluster of each row, int64 (H,).

    Returns:
        The improved labels (H,), a new tensor.
    """
    costs_HE, labels = costs_HE.cpu().double(), labels.clone()
    num_rows, num_clusters = costs_HE.shape
    for _ in range(num_rows):
        moves_HE = costs_HE - costs_HE.gather(1, labels[:, None])
        best_EE = torch.full((num_clusters, num_clusters), float("inf"), dtype=torch.float64)
        best_EE = best_EE.scatter_reduce(0, labels[:, None].expand_as(moves_HE), moves_HE, "amin")
        both_EE = best_EE + best_EE.T
        first, second = divmod(int(both_EE.argmin()), num_clusters)
        if not float(both_EE[first, second]) < -1e-12:
            break
        there = int((moves_HE[:, second] + torch.where(labels == first, 0.0, float("inf"))).argmin())
        back = int((moves_HE[:, first] + torch.where(labels == second, 0.0, float("inf"))).argmin())
        labels[there], labels[back] = second, first
    return labels


def means_of(rows_HD: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    """Return the mean row of each cluster (E, D)."""
    sums_ED = rows_HD.new_zeros(num_clusters, rows_HD.shape[1]).index_add_(0, labels.to(rows_HD.device), rows_HD)
    return sums_ED / (len(rows_HD) // num_clusters)
