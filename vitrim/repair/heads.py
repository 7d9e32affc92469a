"""Cuts the heads of one attention in closed form: the logits first, then values under the probabilities that are left.

Shapes: G heads, F dimensions of a head, K kept, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from vitrim.calibrate import HeadVisit
from vitrim.methods import SiteMethod
from vitrim.ops.head_factors import ValueSums, mixed
from vitrim.ops.least_squares import fit_output, ridge_for, squared_error
from vitrim.surgery import KeepHeadDims, KeepHeads, apply_, submodule
from vitrim.surgery.edits import replace_
from vitrim.types import AttentionSite, Stats


def pick_heads_(
    student: nn.Module, visit: HeadVisit, method: SiteMethod, num_keep: int, ridge: float | None
) -> tuple[KeepHeads, dict[str, float]]:
    """Drop whole heads of one attention in place; arguments and result as for `cut_heads_`."""
    site, sums = visit.site, _value_sums(student, visit, visit.site)
    heads = tuple(sorted(int(head) for head in method.pick_heads(sums, num_keep)))
    keep = torch.tensor([head * site.head_dim + dim for head in heads for dim in range(site.head_dim)])
    start_DP = sums.output_DA[:, keep.to(sums.output_DA.device)]
    weight_DP, bias_D, errors = _fitted(sums.stats, keep, start_DP, sums.output_bias_D, ridge, site.path)
    edit = KeepHeads(site=site, keep=heads, tensors=_projection(site, weight_DP, bias_D))
    apply_(student, [edit])
    return edit, errors


def cut_heads_(
    student: nn.Module, visit: HeadVisit, method: SiteMethod, num_keep: int, ridge: float | None
) -> tuple[KeepHeadDims, dict[str, float]]:
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
    site, whole = visit.site, submodule(student, visit.site.path)
    every, first = tuple(range(visit.site.head_dim)), tuple(range(num_keep))
    left_GKF, right_GKF = method.mix_logits(visit.logits(), num_keep)
    tensors = {
        name: tensor
        for role, mixture in (("q", left_GKF), ("k", right_GKF))
        for name, tensor in _mixed_rows(whole, site, role, mixture).items()
    }
    edit = KeepHeadDims(site=site, keep_qk=(first,) * site.num_heads, keep_v=(every,) * site.num_heads, tensors=tensors)
    apply_(student, [edit])  # for the probabilities that are left
    sums = _value_sums(student, visit, edit.after)
    replace_(student, site.path, whole)
    mixture_GKF = method.mix_values(sums, num_keep)
    small, start_DP = mixed(sums.stats, sums.output_DA, mixture_GKF)
    keep = torch.arange(start_DP.shape[1])
    weight_DP, bias_D, errors = _fitted(small, keep, start_DP, sums.output_bias_D, ridge, site.path)
    tensors |= _mixed_rows(whole, site, "v", mixture_GKF) | _projection(site, weight_DP, bias_D)
    edit = replace(edit, keep_v=(first,) * site.num_heads, tensors=tensors)
    apply_(student, [edit])
    return edit, errors


def _value_sums(student: nn.Module, visit: HeadVisit, site: AttentionSite) -> ValueSums:
    """Return the sums of the student's mixed values, which are now at `site`, with its output projection."""
    output = cast(nn.Linear, submodule(student, site.output))
    return ValueSums(
        stats=visit.values(site),
        output_DA=output.weight.detach(),
        output_bias_D=None if output.bias is None else output.bias.detach(),
        num_heads=site.num_heads,
        scale_D=visit.scale_D,
    )


def _fitted(
    stats: Stats, keep: Tensor, weight_DP: Tensor, bias_D: Tensor | None, ridge: float | None, where: str
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Fit the output projection to the kept dimensions unless `ridge` is None; return it with its errors per token."""
    errors = {"unrepaired": squared_error(stats, keep, weight_DP, bias_D)}
    if ridge is not None:
        strength = ridge_for(stats.num_tokens, len(keep), ridge)
        weight_DP, bias_D = fit_output(stats, keep, weight_DP, bias_D, ridge=strength, where=where)
        errors["repaired"] = squared_error(stats, keep, weight_DP, bias_D)
    return weight_DP, bias_D, errors


def _projection(site: AttentionSite, weight_DP: Tensor, bias_D: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of the new output projection by name."""
    named = {"weight": weight_DP, "bias": bias_D}
    return {f"{site.path}.proj.{name}": tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def _mixed_rows(attention: nn.Module, site: AttentionSite, role: str, mixture_GKF: Tensor) -> dict[str, Tensor]:
    """Return weight and bias, under their new names, of a projection whose heads' rows are mixed."""
    path = {"q": site.query, "k": site.key, "v": site.value}[role]
    layer = submodule(attention, path.removeprefix(f"{site.path}."))
    found = {}
    for name, tensor in layer.named_parameters(recurse=False):
        rows = tensor.detach().to(mixture_GKF)
        rows = rows.chunk(3)["qkv".index(role)] if site.fused else rows
        heads = rows.unflatten(0, (site.num_heads, site.head_dim))
        found[f"{site.path}.{role}.{name}"] = torch.einsum("gkf,gf...->gk...", mixture_GKF, heads).flatten(0, 1)
    return found
