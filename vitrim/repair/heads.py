"""Cuts the heads of one attention in closed form: the logits first, then values under the probabilities that are left.

Shapes: G heads, F dimensions of a head, K kept, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from vitrim.calibrate import HeadVisit
from vitrim.methods import SiteMethod
from vitrim.ops.head_factors import ValueSums, mixed
from vitrim.ops.least_squares import fit_output, ridge_for, squared_error
from vitrim.surgery import KeepHeadDims, apply_, submodule
from vitrim.surgery.edits import replace_
from vitrim.types import AttentionSite


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
    values = _cut_values(student, visit, edit.after, method, num_keep, ridge)
    replace_(student, site.path, whole)
    tensors |= _mixed_rows(whole, site, "v", values.mixture_GKF)
    tensors[f"{site.path}.proj.weight"] = values.weight_DP
    if values.bias_D is not None:
        tensors[f"{site.path}.proj.bias"] = values.bias_D
    edit = replace(edit, keep_v=(first,) * site.num_heads, tensors=tensors)
    apply_(student, [edit])
    return edit, values.errors


@dataclass(frozen=True, kw_only=True)
class _Values:
    """The mixtures of values that stay, the output projection behind them, and its errors."""

    mixture_GKF: Tensor
    weight_DP: Tensor
    bias_D: Tensor | None
    errors: dict[str, float]


def _cut_values(
    student: nn.Module, visit: HeadVisit, site: AttentionSite, method: SiteMethod, num_keep: int, ridge: float | None
) -> _Values:
    """Choose mixtures of values, now at `site`, and fit the output projection to them."""
    stats = visit.values(site)
    output = cast(nn.Linear, submodule(student, site.output))
    weight_DA, bias_D = output.weight.detach(), None if output.bias is None else output.bias.detach()
    sums = ValueSums(
        stats=stats, output_DA=weight_DA, output_bias_D=bias_D, num_heads=site.num_heads, scale_D=visit.scale_D
    )
    mixture_GKF = method.mix_values(sums, num_keep)
    small, weight_DP = mixed(stats, weight_DA, mixture_GKF)
    every = torch.arange(weight_DP.shape[1])
    errors = {"unrepaired": squared_error(small, every, weight_DP, bias_D)}
    if ridge is not None:
        strength = ridge_for(stats.num_tokens, len(every), ridge)
        weight_DP, bias_D = fit_output(small, every, weight_DP, bias_D, ridge=strength, where=site.path)
        errors["repaired"] = squared_error(small, every, weight_DP, bias_D)
    return _Values(mixture_GKF=mixture_GKF, weight_DP=weight_DP, bias_D=bias_D, errors=errors)


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
