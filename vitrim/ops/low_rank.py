"""Factor a matrix W (M, N) into a product of `up` (M, R) and `down` (R, N), by four solvers.

The best factors for the weight, and the best for its outputs W x, both come from projecting W on R orthonormal
directions of the output space: for the weight alone, its left singular vectors; for the outputs, the principal
directions of W x over the inputs seen. Nothing here knows a layer.

Shapes: M outputs, N inputs, K = min(M, N), R rank. All solvers run in float64.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Generator, Tensor

# How much a direction counts in which no input was seen, relative to the mean over all directions of the weight.
RIDGE = 1e-6


def weight_basis(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight's left singular vectors: output directions, ordered by how much of the weight lies along them.

    Args:
        weight_MN: any float dtype, (M, N).

    Returns:
        Orthonormal columns (M, K), and the squared singular values (K,), falling. Exact, not randomised.
    """
    basis_MK, sigma_K, _ = torch.linalg.svd(weight_MN.double(), full_matrices=False)
    return basis_MK, sigma_K.square()


def output_basis(
    weight_MN: Tensor, *, inputs_NN: Tensor | None = None, outputs_MM: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return directions of the output space, ordered by how much of the outputs W x lies along them.

    Projecting W on the first R of them gives, of all matrices W' of rank R, the one with the least mean square of
    (W - W') x over the inputs seen. No inverse of a covariance is needed.

    Args:
        weight_MN: any float dtype, (M, N).
        inputs_NN: second moment of the inputs, or their covariance if a bias takes their mean, (N, N).
        outputs_MM: the same for the outputs, (M, M); one of the two is enough, the smaller is cheaper.

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
    """Return the smallest rank at which the leading directions of all groups together hold a share of the energy."""
    held_K = energies_GK.sum(0).cumsum(0)
    return 1 + int((held_K < share * held_K[-1]).sum().clamp(max=len(held_K) - 1))


def project(weight_MN: Tensor, basis_MR: Tensor) -> tuple[Tensor, Tensor]:
    """Project a weight on orthonormal directions of its output space: factors `up` (M, R) and `down` (R, N)."""
    return balance(basis_MR, basis_MR.T @ weight_MN.to(basis_MR))


def truncate(weight_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors `up` (M, R) and `down` (R, N) of rank R whose product is nearest to a weight.

    The truncated SVD (Eckart and Young).

    Example:
        >>> import torch
        >>> up_MR, down_RN = truncate(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> (up_MR @ down_RN).diagonal().round(decimals=4)
        tensor([3., 2., 0.], dtype=torch.float64)
    """
    return project(weight_MN, weight_basis(weight_MN)[0][:, :rank])


def balance(up_MR: Tensor, down_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale factors without changing their product: each column of `up` as long as its row of `down`.

    Both factors then train at one learning rate.
    """
    tiny = torch.finfo(up_MR.dtype).tiny
    scale_R = (down_RN.norm(dim=1).clamp(min=tiny) / up_MR.norm(dim=0).clamp(min=tiny)).sqrt()
    scale_R = torch.where((up_MR.norm(dim=0) > 0) & (down_RN.norm(dim=1) > 0), scale_R, 1)
    return up_MR * scale_R, down_RN / scale_R[:, None]


def nmf(weight_MN: Tensor, rank: int, *, num_iter: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Factor a nonnegative weight into nonnegative factors, by scikit-learn's coordinate descent.

    Args:
        weight_MN: no value below 0, (M, N).
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
    """Factor a weight so that `down` has no negative value, by alternating least squares; the error never rises.

    Each round solves `up` exactly, then each row of `down` exactly while the others are fixed. It starts from the
    positive parts of the right singular vectors, each with the sign that makes its positive part the larger one.

    Args:
        weight_MN: any float dtype, (M, N).
        rank: R.
        num_iter: rounds over both factors.

    Returns:
        `up` (M, R) and `down` (R, N), float64, balanced.

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
    """Return factors with torch's initial values of two linear layers, for a model that is trained from scratch.

    Only the shape of the weight is used.
    """

    def start(height: int, width: int) -> Tensor:
        return (2 * torch.rand(height, width, generator=generator, dtype=torch.float64) - 1) / width**0.5

    return start(weight_MN.shape[0], rank), start(rank, weight_MN.shape[1])


def _solve_up(weight_MN: Tensor, down_RN: Tensor) -> Tensor:
    """Return the least-squares `up` for a given `down`, the one of least norm if there are several."""
    return weight_MN @ torch.linalg.pinv(down_RN)
