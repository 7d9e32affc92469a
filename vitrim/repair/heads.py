"""Cuts the heads of one attention in closed form: the logits first, then values under the probabilities that are left.

Shapes: G heads, F dimensions of a head, K kept, D model width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from vitrim.calibrate import HeadVisit
from vitrim.methods import SiteMethod
from vitrim.ops.feedback import aimed, fit_judged
from vitrim.ops.head_factors import ValueSums, mixed
from vitrim.ops.least_squares import ridge_for
from vitrim.repair.closed_form import fitted
from vitrim.surgery import KeepHeadDims, KeepHeads, KeepPaddedDims, apply_, mix_heads, submodule
from vitrim.surgery.edits import replace_
from vitrim.types import AttentionSite, Stats


def pick_heads_(
    student: nn.Module, visit: HeadVisit, method: SiteMethod, num_keep: int, ridge: float | None
) -> tuple[KeepHeads, dict[str, float]]:
    """Drop whole heads of one attention in place; arguments and result as for `cut_heads_`."""
    site, sums, held_out = visit.site, value_sums(student, visit, visit.site), visit.held_out(visit.site)
    aims = _aimed(sums, held_out, ridge, visit)
    heads = visit.share.on_main(lambda: tuple(sorted(int(head) for head in method.pick_heads(aims, num_keep))))
    keep = torch.tensor([head * site.head_dim + dim for head in heads for dim in range(site.head_dim)])
    start_DP = sums.output_DA[:, keep.to(sums.output_DA.device)]
    output, errors = _fitted(sums, sums.stats, keep, start_DP, ridge, visit, held_out)
    tensors = {f"{site.path}.proj.{name}": tensor.contiguous() for name, tensor in output.items()}
    edit = KeepHeads(site=site, keep=heads, tensors=tensors)
    apply_(student, [edit])
    visit.share.give_(submodule(student, site.path).parameters())
    return edit, errors


def cut_heads_(
    student: nn.Module, visit: HeadVisit, method: SiteMethod, num_keep: int, ridge: float | None
) -> tuple[KeepHeadDims | KeepPaddedDims, dict[str, float]]:
    """Cut the heads of one attention in place.

    Args:
        student: the model whose blocks before this one are finished.
        visit: the attention, with both models at its block.
        method: decides which mixtures of queries, keys and values stay.
        num_keep: dimensions that each head keeps, for queries and keys, and for values.
        ridge: of the fit of the output projection; None fits nothing.

    Returns:
        The edit with all tensors of the new attention, and mean squared errors per token.
    """
    site, share, whole = visit.site, visit.share, copy.deepcopy(submodule(student, visit.site.path))
    mixtures: dict[str, Tensor] = {}
    if site.mixes != "values":
        logits = visit.logits()
        mixtures["q"], mixtures["k"] = share.on_main(lambda: method.mix_logits(logits, num_keep))
    edit = mix_heads(whole, site, mixtures, {})
    apply_(student, [edit])  # for the probabilities that are left
    sums, held_out = value_sums(student, visit, edit.after), visit.held_out(edit.after)
    replace_(student, site.path, whole)
    aims = _aimed(sums, held_out, ridge, visit)
    mixtures["v"] = share.on_main(lambda: method.mix_values(aims, num_keep))
    small, start_DP = mixed(sums.stats, sums.output_DA, mixtures["v"])
    keep = torch.arange(start_DP.shape[1])
    if held_out is not None:
        whole_PA = torch.block_diag(*mixtures["v"])
        held_out = held_out[0].to(whole_PA) @ whole_PA.T, held_out[1]
    output, errors = _fitted(sums, small, keep, start_DP, ridge, visit, held_out)
    edit = mix_heads(whole, site, mixtures, output)
    apply_(student, [edit])
    share.give_(submodule(student, site.path).parameters())
    return edit, errors


def value_sums(student: nn.Module, visit: HeadVisit, site: AttentionSite) -> ValueSums:
    """Return the sums of the student's mixed values, which are now at `site`, with its output projection."""
    output = cast(nn.Linear, submodule(student, site.output))
    return ValueSums(
        stats=visit.values(site),
        output_DA=output.weight.detach(),
        output_bias_D=None if output.bias is None else output.bias.detach(),
        num_heads=site.num_heads,
        scale_D=visit.scale_D,
        metric_DD=visit.metric_DD,
    )


def _aimed(sums: ValueSums, held_out: tuple[Tensor, Tensor] | None, ridge: float | None, visit: HeadVisit) -> ValueSums:
    """Return the sums for targets with as much feedback as pays for the whole attention: by them it is decided.

    Else what stays is what learns feedback by heart best, and no weight behind it makes up for that. The ridge is the
    given one: under a stronger one little is learnt by heart, and a share that pays there is too large for the picks.
    """
    if held_out is None or sums.stats.fed is None or ridge is None:
        return sums
    every = torch.arange(sums.output_DA.shape[1])
    strength = ridge_for(sums.stats.num_tokens, len(every), ridge)
    start = (sums.output_DA, sums.output_bias_D)
    given = {"ridge": strength, "stronger": (1,), "where": visit.site.path, "share": visit.share}
    _, _, chosen = fit_judged(sums.stats, every, *start, held_out, sums.scale_D, **given)
    return replace(sums, stats=aimed(sums.stats, chosen["feedback"]))


def _fitted(
    sums: ValueSums,
    stats: Stats,
    keep: Tensor,
    weight_DP: Tensor,
    ridge: float | None,
    visit: HeadVisit,
    held_out: tuple[Tensor, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the output projection of the kept dimensions by name, fitted unless `ridge` is None, and its errors."""
    start, given = (weight_DP, sums.output_bias_D), {"held_out": held_out, "scale_D": sums.scale_D}
    weight_DP, bias_D, errors = fitted(stats, keep, *start, ridge, visit.site.path, **given, share=visit.share)
    return {"weight": weight_DP} | ({} if bias_D is None else {"bias": bias_D}), errors
