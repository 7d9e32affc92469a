"""How much feedback in the targets of a fit is worth having, and which ridge, judged on tokens that were not fitted.

Feedback asks an output to make up for what earlier blocks got wrong. What of that the output can know, it learns from
any tokens; what it can't, it learns by heart, and more so the fewer tokens there are. Least squares is linear in its
targets, so one factorisation gives the fit without feedback and what feedback adds to it, and the error on other tokens
is a parabola in the share of the latter. No grid is needed, and no scale is left in the share. Of the given
ridge and stronger ones the best is taken on the same tokens.

Shapes: N tokens, H hidden units, K kept units, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitrim.ops.least_squares import fit_output
from vitrim.share import ALONE, Share
from vitrim.types import Stats

STRONGER = (1, 10, 100, 1000)  # the ridges that are tried, beside the given one
PAYS = 1e-3  # least share of the error on other tokens that a stronger one has to save


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
    share: Share = ALONE,
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
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
        share: of the held-out tokens, where each process has some.

    Returns:
        Weight (D, K), bias (D,) or None, and what was chosen: `ridge`, and where there is any, the share of
        `feedback` that was taken, 0..1.
    """
    tried = [
        fit_fed(stats, keep, weight_DK, bias_D, held_out, scale_D, ridge=ridge * stronger, where=where, share=share)
        for stronger in (STRONGER if share.total(len(held_out[0])) else STRONGER[:1])
    ]
    best = 0
    for number, (error, _) in enumerate(tried):
        if error < (1 - PAYS) * tried[best][0]:
            best = number
    return tried[best][1]


def fit_fed(
    stats: Stats,
    keep: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    held_out: tuple[Tensor, Tensor],
    scale_D: Tensor | None,
    *,
    ridge: float,
    where: str,
    share: Share = ALONE,
) -> tuple[float, tuple[Tensor, Tensor | None, dict[str, float]]]:
    """Return the squared error on other tokens at one ridge, and the fit; arguments and result as for `fit_judged`."""
    hidden_NK, scale = held_out[0][:, keep.to(held_out[0].device)], 1.0 if scale_D is None else scale_D
    if stats.fed is None:
        weight_DK, bias_D = fit_output(stats, keep, weight_DK, bias_D, ridge=ridge, where=where)
        output_ND = hidden_NK.to(weight_DK) @ weight_DK.T + (0.0 if bias_D is None else bias_D)
        error = share.total(float(((held_out[1].to(output_ND) - output_ND) * scale).square().sum()))
        return error, (weight_DK, bias_D, {"ridge": ridge})
    fed_D, fed_HD = stats.fed
    apart = replace(
        stats,
        target_D=torch.cat([stats.target_D - fed_D, fed_D]),
        cross_HD=torch.cat([stats.cross_HD - fed_HD, fed_HD], dim=1),
        fed=None,
    )
    start_DK = torch.cat([weight_DK, torch.zeros_like(weight_DK)])  # the ridge pulls feedback alone towards nothing
    weight, bias = fit_output(apart, keep, start_DK, bias_D, ridge=ridge, where=where)
    (plain_DK, added_DK), biases = weight.chunk(2), None if bias is None else bias.chunk(2)
    plain_ND, added_ND = (
        hidden_NK.to(part) @ part.T + (0.0 if biases is None else biases[number])
        for number, part in enumerate((plain_DK, added_DK))
    )
    missing_ND = (held_out[1].to(plain_ND) - plain_ND) * scale
    pays = paying_share(missing_ND, added_ND * scale, share)
    error = share.total(float((missing_ND - pays * scale * added_ND).square().sum()))
    bias_D = None if biases is None else biases[0] + pays * biases[1]
    return error, (plain_DK + pays * added_DK, bias_D, {"ridge": ridge, "feedback": pays})


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
