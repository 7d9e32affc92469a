"""Factors of a matrix: W (M, N) as the product of `up` (M, R) and `down` (R, N), by four solvers.

The best factors for the weight, and the best for what the weight puts out, are one thing: a projection of W on R
orthonormal directions of its output space. For the weight alone they are its left singular vectors; for the outputs
they are the principal directions of W x over the inputs seen. Nothing here knows a layer.

Shapes: M outputs, N inputs, K = min(M, N), R rank. All that solves runs in float64.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Generator, Tensor

# How much a direction counts in which no input was seen, relative to the mean over all directions of the weight.
RIDGE = 1e-6


def weight_basis(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of the output space by how much of the weight is in them: left singular vectors.

    Args:
        weight_MN: any float dtype.

    Returns:
        Orthonormal columns (M, K), and the squared singular values (K,), falling. Exact, not randomised.
    """
    basis_MK, sigma_K, _ = torch.linalg.svd(weight_MN.double(), full_matrices=False)
    return basis_MK, sigma_K.square()


def output_basis(
    weight_MN: Tensor, *, inputs_NN: Tensor | None = None, outputs_MM: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Directions of the output space by how much of the outputs W x is in them.

    Projecting W on the first R of them is, of all matrices of rank R, the one with the least mean square of
    (W - W') x: W' x is then the best approximation of rank R of the outputs seen. No inverse of a covariance is needed.

    Args:
        weight_MN: any float dtype.
        inputs_NN: second moment of the inputs, or their covariance where a bias takes their mean.
        outputs_MM: the same of the outputs; one of the two is enough, the smaller is cheaper.

    Returns:
        Orthonormal columns (M, K), and the energy of the outputs in each (K,), falling.

    Paper: whitening by the second moment of the inputs before an SVD gives the same W', as in SVD-LLM,
    arXiv 2403.07378. O(M N K).
    """
    weight_MN = weight_MN.double()
    num_rows, num_cols = weight_MN.shape
    frame_MK = torch.eye(num_rows).to(weight_MN) if num_rows <= num_cols else torch.linalg.qr(weight_MN).Q
    inner_KN = frame_MK.T @ weight_MN
    if inputs_NN is not None:
        moment_KK = inner_KN @ inputs_NN.to(inner_KN) @ inner_KN.T
    else:
        assert outputs_MM is not None
        moment_KK = frame_MK.T @ outputs_MM.to(inner_KN) @ frame_MK
    own_KK = inner_KN @ inner_KN.T
    ridge = RIDGE * moment_KK.trace() / own_KK.trace().clamp(min=torch.finfo(own_KK.dtype).tiny)
    energy_K, turn_KK = torch.linalg.eigh(moment_KK + ridge * own_KK)
    return frame_MK @ turn_KK.flip(1), energy_K.flip(0).clamp(min=0)


def rank_for_energy(energies_GK: Tensor, share: float) -> int:
    """The smallest rank at which the first directions of all groups together hold this share of the energy."""
    held_K = energies_GK.sum(0).cumsum(0)
    return 1 + int((held_K < share * held_K[-1]).sum().clamp(max=len(held_K) - 1))


def project(weight_MN: Tensor, basis_MR: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a weight projected on orthonormal directions of its output space."""
    return balance(basis_MR, basis_MR.T @ weight_MN.to(basis_MR))


def truncate(weight_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of rank R nearest to a weight (Eckart and Young), `up` (M, R) and `down` (R, N)."""
    return project(weight_MN, weight_basis(weight_MN)[0][:, :rank])


def balance(up_MR: Tensor, down_RN: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, each column of `up` as long as its row of `down`, so that both train at one rate."""
    tiny = torch.finfo(up_MR.dtype).tiny
    scale_R = (down_RN.norm(dim=1).clamp(min=tiny) / up_MR.norm(dim=0).clamp(min=tiny)).sqrt()
    scale_R = torch.where((up_MR.norm(dim=0) > 0) & (down_RN.norm(dim=1) > 0), scale_R, 1)
    return up_MR * scale_R, down_RN / scale_R[:, None]


def nmf(weight_MN: Tensor, rank: int, *, num_iter: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Factors without negative values, of a weight without any: scikit-learn's coordinate descent.

    Args:
        weight_MN: no value below 0.
        rank: R, at most min(M, N).
        num_iter: rounds over both factors.
        generator: seeds the start.

    Returns:
        `up` (M, R) and `down` (R, N), float64, balanced.
    """
    from sklearn.decomposition import NMF

    seed = int(torch.randint(2**31, (), generator=generator))
    # tol=0: all rounds are made, and none is reported as missing
    solver: Any = NMF(n_components=cast(Any, rank), init="nndsvda", max_iter=num_iter, tol=0, random_state=seed)
    up_MR = torch.from_numpy(solver.fit_transform(weight_MN.detach().double().cpu().numpy()))
    return balance(up_MR.double(), torch.from_numpy(solver.components_).double())


def semi_nmf(weight_MN: Tensor, rank: int, *, num_iter: int) -> tuple[Tensor, Tensor]:
    """Factors of which `down` has no negative value, by alternating least squares; the error never rises.

    `up` is solved exactly; `down` row by row, each exactly while the others stand. It starts from the positive parts of
    the right singular vectors, each turned so that they are the larger part.

    Paper: semi-NMF is Ding, Li and Jordan, 2010; updates row by row are those of HALS (Cichocki and Phan, 2009), which
    need far fewer rounds than the paper's multiplicative ones. O(num_iter M N R).
    """
    weight_MN = weight_MN.double()
    right_RN = torch.linalg.svd(weight_MN, full_matrices=False)[2][:rank]
    positive_R1, negative_R1 = (part.clamp(min=0).norm(dim=1, keepdim=True) for part in (right_RN, -right_RN))
    down_RN = torch.where(positive_R1 >= negative_R1, right_RN, -right_RN).clamp(min=0)
    up_MR = _solve_up(weight_MN, down_RN)
    for _ in range(num_iter):
        cross_RN, gram_RR = up_MR.T @ weight_MN, up_MR.T @ up_MR
        for row in range(rank):
            square = gram_RR[row, row]
            if square > 0:
                step_N = (cross_RN[row] - gram_RR[row] @ down_RN) / square
                down_RN[row] = (down_RN[row] + step_N).clamp(min=0)
        up_MR = _solve_up(weight_MN, down_RN)
    return balance(up_MR, down_RN)


def random_factors(weight_MN: Tensor, rank: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Factors as torch starts two linear layers: for a model that is trained anew, since only the shape is used."""

    def start(height: int, width: int) -> Tensor:
        return (2 * torch.rand(height, width, generator=generator, dtype=torch.float64) - 1) / width**0.5

    return start(weight_MN.shape[0], rank), start(rank, weight_MN.shape[1])


def _solve_up(weight_MN: Tensor, down_RN: Tensor) -> Tensor:
    """The best `up` for a `down`, of least norm where several are."""
    return weight_MN @ torch.linalg.pinv(down_RN)
