"""Ridge least squares from summed moments: the output projection that makes the most of the kept units.

The ridge pulls towards the present weights, not towards zero, so a huge ridge changes nothing and the fit on the
calibration data is never worse than leaving the weights alone. It counts what changes relative to the size of each
unit's own weights and of what all put out in a channel, so that a unit that is scaled in front and scaled back behind
ends with the same output, and so does a channel that is scaled here and not by a layer scale behind.

Shapes: H hidden units, K kept units, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitrim.errors import ModelError
from vitrim.types import Stats

# The least ridge of a fit with fewer tokens than units. Measured on the digits model at 40% of the units, error on
# others, with random units and one image (17 tokens for 205 units): 0.36 without repair, 0.093 at 1e-4, 0.063 at 1e-2,
# 0.10 at 1; with one blank image: 0.34, 0.28, 0.16.
WIDE_RIDGE = 1e-2


def centred_moments(stats: Stats) -> tuple[Tensor, Tensor]:
    """Return the centred Gram matrix of the hidden activations (H, H) and centred cross moments (H, D), as sums."""
    mean_H = (stats.hidden_H / stats.num_tokens).to(stats.hidden_HH.dtype)
    gram_HH = torch.addr(stats.hidden_HH, mean_H, stats.hidden_H.to(mean_H.dtype), alpha=-1)
    cross_HD = torch.addr(stats.cross_HD, stats.hidden_H, stats.target_D, alpha=-1 / stats.num_tokens)
    return gram_HH, cross_HD


def of_units(stats: Stats, keep: Tensor) -> Stats:
    """Return the sums restricted to some hidden units, int64 indices (K,), in the precision of the cross moments."""
    keep = keep.to(stats.hidden_HH.device)
    return replace(
        stats,
        hidden_H=stats.hidden_H[keep],
        hidden_HH=stats.hidden_HH[keep[:, None], keep].to(stats.cross_HD.dtype),
        cross_HD=stats.cross_HD[keep],
        fed=None if stats.fed is None else (stats.fed[0], stats.fed[1][keep]),
    )


def moments(stats: Stats, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix (H, H) and the cross moments (H, D), centred if a bias will take up the means."""
    return centred_moments(stats) if centred else (stats.hidden_HH, stats.cross_HD)


def fit_output(
    stats: Stats, keep: Tensor, weight_DK: Tensor, bias_D: Tensor | None, *, ridge: float, where: str = "least squares"
) -> tuple[Tensor, Tensor | None]:
    """Fit the output projection of the kept units to the target.

    Args:
        stats: sums over calibration tokens.
        keep: indices of the kept units, int64 (K,).
        weight_DK: the present columns of the kept units, (D, K); the ridge pulls towards them.
        bias_D: the present bias (D,), or None: then no bias is fitted either.
        ridge: penalty on the relative change of each kept unit's weights, as a share of the mean energy of what a kept
            unit puts out.
        where: path of the MLP, for messages.

    Returns:
        Weight (D, K) and bias (D,) or None, in the dtype of the sums.

    Raises:
        ModelError: the sums are too ill-conditioned for the ridge.

    Example:
        The target is the sum of two units that are always equal, so the one that is kept counts double.

        >>> import torch
        >>> from vitrim.types import Stats
        >>> hidden = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
        >>> target = hidden.sum(1, keepdim=True)
        >>> stats = Stats(
        ...     num_tokens=2,
        ...     hidden_H=hidden.sum(0),
        ...     hidden_HH=hidden.T @ hidden,
        ...     target_D=target.sum(0),
        ...     cross_HD=hidden.T @ target,
        ...     target_square=float(target.square().sum()),
        ... )
        >>> weight_DK, _ = fit_output(stats, torch.tensor([0]), torch.ones(1, 1), None, ridge=1e-9)
        >>> round(float(weight_DK), 6)
        2.0

    Paper: ridge compensation for ViTs is in CORP, arXiv 2602.05243; least-squares recovery in arXiv 2405.17506.
    O(K^3 + K^2 D).
    """
    rounding = len(keep) * torch.finfo(stats.hidden_HH.dtype).eps
    stats = of_units(stats, keep)  # first, so that no second copy of the full moments is made
    gram_KK, cross_KD = moments(stats, centred=bias_D is not None)
    start_KD = weight_DK.to(gram_KK).T
    energy_K = stats.hidden_HH.diagonal()
    # Products are rounded as deviations from a mean; a random matrix is as large as the root of its width.
    spread_K = (energy_K - stats.hidden_H.square() / stats.num_tokens).clamp(min=0)
    noise_K = rounding * energy_K + len(keep) ** 0.5 * stats.rounding * spread_K
    penalty_K = _penalty(energy_K, start_KD, ridge, noise_K)
    factor = cholesky_of(gram_KK + torch.diag(penalty_K), f"{where}: the sums of its {len(keep)} kept units", ridge)
    weight_KD = start_KD + torch.cholesky_solve(cross_KD - gram_KK @ start_KD, factor)
    if bias_D is None:
        return weight_KD.T, None
    bias = (stats.target_D - stats.hidden_H @ weight_KD) / stats.num_tokens
    return weight_KD.T, bias


def cholesky_of(matrix_KK: Tensor, what: str, ridge: float) -> Tensor:
    """Return the Cholesky factor of moments that a ridge has been added to.

    Raises:
        ModelError: they are too ill-conditioned for that ridge.
    """
    factor_KK, failed = torch.linalg.cholesky_ex(matrix_KK)
    if int(failed):
        raise ModelError(f"{what} are not positive definite at a ridge of {ridge:g}; raise the ridge.")
    return factor_KK


def _penalty(energy_K: Tensor, start_KD: Tensor, ridge: float, noise_K: Tensor) -> Tensor:
    """Return each unit's ridge, above the rounding of its moments: they are centred, and a constant unit's vanish.

    Args:
        energy_K: energy of each unit, not centred: one that hardly moves on these images may on others.
        start_KD: their weights, of which each channel counts relative to what all units together put out there.
        ridge: relative, as for `fit_output`.
        noise_K: rounding of the moments.
    """
    square_KD = start_KD.square()
    channel_D = energy_K @ square_KD
    square_K = (square_KD / torch.where(channel_D > 0, channel_D, 1)).sum(1)
    mean = (energy_K * square_K).mean()
    penalty_K = torch.where(square_K > 0, mean / square_K, energy_K)  # without weights there is no relative change
    penalty_K = ridge * penalty_K + noise_K
    return torch.where(penalty_K > 0, penalty_K, 1)  # only where all units are always zero


def ridge_for(num_tokens: int, num_keep: int, ridge: float) -> float:
    """Return the ridge of a fit: as given, or wider where the tokens are too few to determine it."""
    return max(ridge, WIDE_RIDGE) if num_tokens <= num_keep else ridge


def squared_error(stats: Stats, keep: Tensor, weight_DK: Tensor, bias_D: Tensor | None) -> float:
    """Return the mean squared error per token of a linear prediction of the target, from the moments alone.

    Args:
        stats: sums over calibration tokens.
        keep: indices of the units that predict, int64 (K,).
        weight_DK: their weights, (D, K).
        bias_D: the bias (D,), or None for no bias.
    """
    weight_KD, stats = weight_DK.to(stats.cross_HD).T, of_units(stats, keep)
    hidden_K, gram_KK, cross_KD = stats.hidden_H, stats.hidden_HH, stats.cross_HD
    error = stats.target_square - 2 * (weight_KD * cross_KD).sum() + (weight_KD * (gram_KK @ weight_KD)).sum()
    if bias_D is not None:
        bias_D = bias_D.to(stats.target_D)
        prediction_D = hidden_K @ weight_KD
        error = error + 2 * bias_D @ (prediction_D - stats.target_D) + stats.num_tokens * bias_D @ bias_D
    return float(error) / stats.num_tokens
