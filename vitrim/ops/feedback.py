"""How much feedback in the targets of a fit is worth having, and which ridge, judged on tokens that were not fitted.

Feedback asks an output to make up for what earlier blocks got wrong. What of that the output can know, it learns from
any tokens; what it can't, it learns by heart, and more so the fewer tokens there are. Least squares is linear in its
targets, so one factorisation gives the fit without feedback and what feedback adds to it, and the error on other tokens
is a parabola in the share of the latter. No grid is needed, and no scale is left in the share. Of the given
ridge and stronger ones the best is taken on the same tokens.

Shapes: N tokens, H hidden units, K kept units, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitrim.ops.least_squares import fit_output
from vitrim.share import ALONE, Share
from vitrim.types import Stats

STRONGER = (1, 10, 100, 1000)  # the ridges that are tried, beside the given one
PAYS = 1e-3  # least share of the error on other tokens that a stronger one has to save

Fit = tuple[Tensor, Tensor | None, dict[str, float]]


def fit_judged(
    stats: Stats,
    keep: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    held_out: tuple[Tensor, Tensor],
    scale_D: Tensor | None,
    *,
    ridge: float,
    where: str,
    stronger: Sequence[float] = STRONGER,
    share: Share = ALONE,
) -> Fit:
    """Fit the output projection of the kept units as `fit_output` does, with what ridge and as much feedback as pay.

    Args:
        stats: sums over calibration tokens, with `fed` if there is feedback in the targets.
        keep: indices of the kept units, int64 (K,).
        weight_DK: the present columns of the kept units, (D, K).
        bias_D: the present bias (D,), or None: then no bias is fitted either.
        held_out: hidden activations (N, H) and targets (N, D) of tokens that are not in the sums.
        scale_D: layer scale behind the output, by which channels count; None if there is none.
        ridge: the least that is tried, as for `fit_output`.
        where: path of the layer, for messages.
        stronger: the ridges that are tried, as multiples of the least.
        share: of the held-out tokens, where each process has some.

    Returns:
        Weight (D, K), bias (D,) or None, and what was chosen: `ridge`, and where there is any, the share of
        `feedback` that was taken, 0..1.
    """
    whole, start_DK = stats, weight_DK
    if stats.fed is not None:
        whole = _apart(stats, *stats.fed)
        start_DK = torch.cat([weight_DK, torch.zeros_like(weight_DK)])  # the ridge pulls feedback alone to nothing
    judged = held_out[0][:, keep.to(held_out[0].device)], held_out[1], 1.0 if scale_D is None else scale_D
    best: tuple[float, Fit] | None = None
    for number in stronger if share.total(len(held_out[0])) else stronger[:1]:
        fitted = fit_output(whole, keep, start_DK, bias_D, ridge=ridge * number, where=where)
        error, (weight, bias, chosen) = _judge(*fitted, *judged, fed=stats.fed is not None, share=share)
        if best is None or error < (1 - PAYS) * best[0]:
            best = error, (weight, bias, {"ridge": ridge * number, **chosen})
    assert best is not None
    return best[1]


def _apart(stats: Stats, fed_D: Tensor, fed_HD: Tensor) -> Stats:
    """Return the sums for targets without their feedback, and beside them those for the feedback alone."""
    return replace(
        stats,
        target_D=torch.cat([stats.target_D - fed_D, fed_D]),
        cross_HD=torch.cat([stats.cross_HD - fed_HD, fed_HD], dim=1),
        fed=None,
    )


def _judge(
    weight: Tensor,
    bias: Tensor | None,
    hidden_NK: Tensor,
    target_ND: Tensor,
    scale: Tensor | float,
    *,
    fed: bool,
    share: Share,
) -> tuple[float, Fit]:
    """Return the squared error of a fit on other tokens, and the fit, with the share of feedback that pays there."""
    outputs = hidden_NK.to(weight) @ weight.T + (0.0 if bias is None else bias)
    plain_ND, *added = outputs.chunk(1 + fed, dim=1)
    missing_ND, pays = (target_ND.to(plain_ND) - plain_ND) * scale, 0.0
    if added:
        pays = paying_share(missing_ND, added[0] * scale, share)
        missing_ND = missing_ND - pays * scale * added[0]
    error = share.total(float(missing_ND.square().sum()))
    bias = None if bias is None else _blended(bias.chunk(1 + fed), pays)
    return error, (_blended(weight.chunk(1 + fed), pays), bias, {"feedback": pays} if fed else {})


def _blended(parts: Sequence[Tensor], pays: float) -> Tensor:
    """Return what is plain, and a share of what is added to it if anything is."""
    return parts[0] if len(parts) == 1 else parts[0] + pays * parts[1]


def paying_share(missing_ND: Tensor, added_ND: Tensor, share: Share = ALONE) -> float:
    """Return the share, 0..1, of what is added that leaves the least of what is missing, over all processes' tokens."""
    size, common = (share.total(float((each * added_ND).sum())) for each in (added_ND, missing_ND))
    return min(1.0, max(0.0, common / size)) if size > 0 else 1.0


def aimed(stats: Stats, share: float) -> Stats:
    """Return the sums for targets that have this share of their feedback; nobody has summed up their squares."""
    if stats.fed is None or share == 1:
        return stats
    fed_D, fed_HD = stats.fed
    return replace(
        stats,
        target_D=stats.target_D - (1 - share) * fed_D,
        cross_HD=stats.cross_HD - (1 - share) * fed_HD,
        target_square=float("nan"),
        fed=None,
    )
