"""Folding of hidden units: groups of units with similar input weights, and what is left of a sum of all units.

Shapes: H hidden units, K groups (or kept units), D width of a row.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from vitrim.errors import BudgetError
from vitrim.ops.least_squares import cholesky_of

NUM_ITERATIONS = 50  # of k-means; it stops when nothing changes


def kmeans(rows_HD: Tensor, num_groups: int, generator: Generator) -> Tensor:
    """Divide rows into groups by k-means, seeded by k-means++ (a centre is drawn by its squared distance to others).

    Args:
        rows_HD: the rows to divide, (H, D).
        num_groups: K, 1..H.
        generator: draws the first centres, on the CPU.

    Returns:
        Group of each row, int64 (H,), on the CPU; no group is empty.

    Raises:
        BudgetError: K is outside 1..H.
    """
    if not 1 <= num_groups <= len(rows_HD):
        raise BudgetError(f"{num_groups} groups of {len(rows_HD)} rows: use 1..{len(rows_HD)}.")
    centres_KD = rows_HD[_seeds(rows_HD, num_groups, generator).to(rows_HD.device)]
    labels_H = torch.full((len(rows_HD),), -1)
    for _ in range(NUM_ITERATIONS):
        squares_HK = torch.cdist(rows_HD, centres_KD).square().cpu()
        found_H = _none_empty(squares_HK, squares_HK.argmin(1))
        if torch.equal(found_H, labels_H):
            break
        labels_H = found_H
        centres_KD = averaging(labels_H, num_groups).to(rows_HD) @ rows_HD
    return labels_H


def averaging(labels_H: Tensor, num_groups: int) -> Tensor:
    """Return the matrix (K, H), float64, that takes the mean over each group's units."""
    member_KH = torch.nn.functional.one_hot(labels_H, num_groups).T.double()
    return member_KH / member_KH.sum(1, keepdim=True)


def choosing(keep_K: Tensor, num_units: int) -> Tensor:
    """Return the matrix (K, H), float64, that takes the kept units out of all."""
    return torch.nn.functional.one_hot(keep_K.cpu(), num_units).double()


def nearest_to_means(rows_HD: Tensor, labels_H: Tensor, num_groups: int) -> Tensor:
    """Return the unit of each group whose row is nearest to the group's mean, (K,); a tie goes to the lowest index."""
    means_KD = averaging(labels_H, num_groups).to(rows_HD) @ rows_HD
    squares_H = (rows_HD - means_KD[labels_H.to(rows_HD.device)]).square().sum(1).cpu()
    members = [(labels_H == group).nonzero().flatten() for group in range(num_groups)]
    return torch.stack([units[squares_H[units].argmin()] for units in members])


def reconstruction(gram_HH: Tensor, merge_KH: Tensor, *, ridge: float, where: str = "folding") -> Tensor:
    """Return the matrix (H, K) that best gives back all units from the merged ones, by ridge regression.

    With G the second moments of the units and R the merging it is G R' (R G R' + r I)^-1, where r is the ridge times
    the mean diagonal of R G R'. With G = I it gives back each unit as its group's, up to the ridge.

    Args:
        gram_HH: sums of products of the units, not centred.
        merge_KH: how the K units are made of the H.
        ridge: penalty relative to the mean energy of a merged unit.
        where: path of the MLP, for messages.

    Raises:
        ModelError: the moments are too ill-conditioned for the ridge.
    """
    merge_KH = merge_KH.to(gram_HH)
    cross_KH = merge_KH @ gram_HH
    gram_KK = cross_KH @ merge_KH.T
    penalty = ridge * gram_KK.diagonal().mean().clamp(min=torch.finfo(gram_KK.dtype).tiny)
    ridged_KK = gram_KK + penalty * torch.eye(len(gram_KK)).to(gram_KK)
    factor_KK = cholesky_of(ridged_KK, f"{where}: the sums of its {len(gram_KK)} merged units", ridge)
    return torch.cholesky_solve(cross_KH, factor_KK).T


def _seeds(rows_HD: Tensor, num_groups: int, generator: Generator) -> Tensor:
    """Draw different rows as the first centres, each by its squared distance to the nearest of those before."""
    picked = [int(torch.randint(len(rows_HD), (1,), generator=generator))]
    nearest_H = torch.full((len(rows_HD),), torch.inf, dtype=torch.float64)
    free_H = torch.ones(len(rows_HD), dtype=torch.float64)
    while len(picked) < num_groups:
        squares_H = (rows_HD - rows_HD[picked[-1]]).square().sum(1).double().cpu()
        nearest_H, free_H[picked[-1]] = torch.minimum(nearest_H, squares_H), 0
        chance_H = nearest_H * free_H
        chance_H = free_H if float(chance_H.sum()) == 0 else chance_H  # all that are left are copies
        picked.append(int(torch.multinomial(chance_H, 1, generator=generator)))
    return torch.tensor(picked)


def _none_empty(squares_HK: Tensor, labels_H: Tensor) -> Tensor:
    """Give each empty group the row that is farthest from its own centre, out of groups of more than one row."""
    counts_K = labels_H.bincount(minlength=squares_HK.shape[1])
    for group in (counts_K == 0).nonzero().flatten().tolist():
        own_H = squares_HK.gather(1, labels_H[:, None])[:, 0]
        row = int(torch.where(counts_K[labels_H] > 1, own_H, -1.0).argmax())
        counts_K[labels_H[row]] -= 1
        counts_K[group], labels_H[row] = 1, group
    return labels_H
