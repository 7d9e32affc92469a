"""CORP (arXiv 2602.05243): drops MLP units and head dimensions, and folds what the rest can predict of them into it.

One shot, no labels, no gradients. Units rank by their energy times how often they are active; query and key dimensions
rank by the energy that they add to the logits. Statistics are taken anew after each layer has changed. Folding units is
the same ridge regression as this package's repair, so the code is shared; the ridge is relative, and set by oracle
approximating shrinkage unless it is given. The paper's code leaves values and outputs alone; they can be folded
exactly, because attention rows sum to one, so that is an option here.

Shapes: N tokens, H hidden units, F dimensions of a head, K kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from vitrim.errors import RecipeError
from vitrim.methods.registry import ATTENTION, BudgetUse, ModelMethod, Parts, optional_tensor, register
from vitrim.ops.gram_schmidt import working_dtype
from vitrim.ops.head_dims import fold_logits, fold_values, oas_shrinkage
from vitrim.ops.least_squares import fit_output, moments, of_units
from vitrim.surgery import Edit, KeepHeadDims, KeepUnits
from vitrim.types import AttentionSite, MlpSite, ModelView

ACTIVE = 0.01  # share of its own root mean square above which a unit counts as active
MIN_RIDGE = 1e-6


@register
class Corp(ModelMethod):
    """CORP: drops MLP units and head dimensions, and folds the dropped ones into the rest in closed form."""

    name = "corp"
    paper = "CORP: Closed-form One-shot Representation-preserving Pruning"
    arxiv = "2602.05243"
    summary = "MLP units by active energy and head dims by logit energy, the dropped ones folded into the rest"
    needs = "images"
    repairs = False
    takes = "widths"
    edits = (KeepUnits, KeepHeadDims)

    parts: Parts = "mlp"
    """Which part of each block is cut."""
    keep_dims: float | None = Field(default=None, gt=0, le=1)
    """Share of each head's query and key dimensions to keep; None uses the budget's share."""
    values: bool = False
    """Also drop value dimensions, as many as query and key dimensions."""
    ridge: float | None = Field(default=None, gt=0)
    """Strength of the regularization when dropped parts are folded into the rest; None estimates it from the data."""
    compensate: bool = True
    """Fold the dropped units into the rest; False leaves that out, to show how much folding helps."""

    def goes_by(self) -> BudgetUse:
        """Return what of a budget the method goes by: with attention, widths alone don't say what stays."""
        if self.parts == "attention" and self.keep_dims is not None:
            return "nothing"
        return self.takes if self.parts == "mlp" else "share"

    def propose(self, view: ModelView) -> Iterator[Edit]:
        """Yield one cut per attention and MLP, block by block, attention first."""
        attentions = [] if self.parts == "mlp" else list(view.attentions())
        if self.parts != "mlp" and not attentions:
            raise RecipeError(
                f"options.parts: this model has no plain attention to cut ({ATTENTION}); use parts='mlp'."
            )
        sites = [] if self.parts == "attention" else list(view.sites)
        order = sorted([*attentions, *sites], key=lambda site: _depth(view, site))
        for site in order:
            if isinstance(site, MlpSite):
                yield _cut_mlp(view, site, self)
            elif (num_keep := _num_dims(view, site, self)) < site.head_dim:
                yield _cut_attention(view, site, self, num_keep)


def _depth(view: ModelView, site: MlpSite | AttentionSite) -> tuple[int, int]:
    """Return a sort key for the order of data flow: the block's number among the MLPs, attention before MLP."""
    blocks = list(dict.fromkeys(each.block for each in view.sites))
    if isinstance(site, MlpSite):
        return blocks.index(site.block), 1
    return next((number for number, block in enumerate(blocks) if site.path.startswith(f"{block}.")), len(blocks)), 0


def _cut_mlp(view: ModelView, site: MlpSite, options: Corp) -> KeepUnits:
    """Keep units by active energy, and fold the others into the output weight and bias."""
    if view.widths[site.path] == site.d_hidden:
        return KeepUnits.first(site, site.d_hidden)
    weights = view.weights(site)
    stats = view.stats(site)
    energy_H = stats.hidden_HH.diagonal() / stats.num_tokens
    keep = (
        (energy_H * _active_rates(view, site, energy_H.sqrt()))
        .sort(descending=True, stable=True)
        .indices[: view.widths[site.path]]
    )
    weight_DK, bias_D = weights.output_DH[:, keep.to(weights.output_DH.device)], weights.output_bias_D
    if options.compensate:
        gram_KK, _ = moments(of_units(stats, keep), centred=bias_D is not None)
        ridge = options.ridge or max(MIN_RIDGE, oas_shrinkage(gram_KK / stats.num_tokens, stats.num_tokens))
        weight_DK, bias_D = fit_output(stats, keep, weight_DK, bias_D, ridge=ridge, where=site.path)
    return KeepUnits(site=site, keep=tuple(keep.tolist())).with_output(weight_DK, bias_D)


def _active_rates(view: ModelView, site: MlpSite, rms_H: Tensor) -> Tensor:
    """Return how often each unit exceeds a share (`ACTIVE`) of its own root mean square, (H,)."""
    counts, total = torch.zeros_like(rms_H), 0

    def see(_: str, hidden: Tensor, __: Tensor) -> None:
        nonlocal counts, total
        hidden_NH = hidden.flatten(0, -2)
        counts = counts + (hidden_NH.abs() > ACTIVE * rms_H.to(hidden_NH)).sum(0).cpu()
        total += len(hidden_NH)

    view.observe([site.output], see)
    return counts / max(1, total)


class _HeadSums:
    """Second moments of queries, keys and values of every head, and the energy of q times k at the same token."""

    def __init__(self, site: AttentionSite) -> None:
        self.site, self.count = site, 0
        self.energy, self.value_sum = torch.zeros(()), torch.zeros(())
        self.grams = {role: torch.zeros(()) for role in "qkv"}
        self.last: dict[str, Tensor] = {}

    def see(self, path: str, _: Tensor, output: Tensor) -> None:
        """Add the output of one projection; q is kept until k of the same tokens has arrived."""
        site = self.site
        roles = [role for role, own in zip("qkv", (site.query, site.key, site.value), strict=True) if own == path]
        parts = output.flatten(0, -2).to(working_dtype(output.device)).chunk(len(roles), dim=-1)
        for role, part in zip(roles, parts, strict=True):
            heads_HNF = part.unflatten(-1, (site.num_heads, site.head_dim)).transpose(0, 1).cpu()
            self.grams[role] = self.grams[role] + heads_HNF.mT @ heads_HNF
            self.last[role] = heads_HNF
            if role == "v":
                self.value_sum = self.value_sum + heads_HNF.sum(1)
                self.count += heads_HNF.shape[1]
        if "q" in self.last and "k" in self.last:
            self.energy = self.energy + (self.last.pop("q") * self.last.pop("k")).square().sum(1)


def _num_dims(view: ModelView, site: AttentionSite, options: Corp) -> int:
    """Return how many query and key dimensions each head keeps."""
    share = view.keep_ratio if options.keep_dims is None else options.keep_dims
    return max(1, round(share * site.head_dim))


def _cut_attention(view: ModelView, site: AttentionSite, options: Corp, num_keep: int) -> KeepHeadDims:
    """Keep dimensions by the energy of q times k, and fold the dropped ones' logits and values into the rest."""
    sums = _HeadSums(site)
    view.observe(list(dict.fromkeys((site.query, site.key, site.value))), sums.see)
    every = tuple(range(site.head_dim))
    qk = [_best(sums.energy[head], num_keep) for head in range(site.num_heads)]
    spread = sums.grams["v"].diagonal(dim1=-2, dim2=-1)
    v = [_best(spread[head], num_keep) if options.values else torch.tensor(every) for head in range(site.num_heads)]
    edit = KeepHeadDims(
        site=site, keep_qk=tuple(tuple(k.tolist()) for k in qk), keep_v=tuple(tuple(k.tolist()) for k in v)
    )
    return _folded(view, edit, sums, options) if options.compensate else edit


def _best(scores_F: Tensor, num_keep: int) -> Tensor:
    """Return the dimensions with the highest scores, in ascending order."""
    return scores_F.sort(descending=True, stable=True).indices[:num_keep].sort().values


def _folded(view: ModelView, edit: KeepHeadDims, sums: _HeadSums, options: Corp) -> KeepHeadDims:
    """Return the edit with new projection weights that make up for the dropped dimensions."""
    site, tensors = edit.site, {}
    rows = {role: _projection(view, site, role) for role in "qkv"}
    kept: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    output_DA = view.tensor(f"{site.output}.weight").double().cpu()
    output_bias = _bias(view, site.output)
    columns, shift_D = [], torch.zeros(len(output_DA), dtype=torch.float64)
    for head in range(site.num_heads):
        gram_q, gram_k = (sums.grams[role][head] / sums.count for role in "qk")
        keep = torch.tensor(edit.keep_qk[head])
        ridge = options.ridge or max(MIN_RIDGE, oas_shrinkage(gram_q[keep][:, keep], sums.count))
        left, right = fold_logits(gram_q, gram_k, keep, ridge=ridge)
        kept["q"].append(left @ rows["q"][head][keep])
        kept["k"].append(right @ rows["k"][head][keep])
        keep = torch.tensor(edit.keep_v[head])
        kept["v"].append(rows["v"][head][keep])
        own_DF = output_DA.unflatten(1, (site.num_heads, site.head_dim))[:, head]
        b_PK, c_P, dropped = fold_values(
            sums.value_sum[head], sums.grams["v"][head], sums.count, keep, ridge=options.ridge or MIN_RIDGE
        )
        fold = output_bias is not None and len(dropped) > 0
        columns.append(own_DF[:, keep] + own_DF[:, dropped] @ b_PK if fold else own_DF[:, keep])
        shift_D += own_DF[:, dropped] @ c_P if fold else 0
    for role, parts in kept.items():
        whole = torch.cat(parts)
        tensors[f"{site.path}.{role}.weight"] = whole[:, : site.d_model].contiguous()
        if whole.shape[1] > site.d_model:
            tensors[f"{site.path}.{role}.bias"] = whole[:, site.d_model].contiguous()
    tensors[f"{site.path}.proj.weight"] = torch.cat(columns, dim=1).contiguous()
    if output_bias is not None:
        tensors[f"{site.path}.proj.bias"] = output_bias + shift_D
    return replace(edit, tensors=tensors)


def _projection(view: ModelView, site: AttentionSite, role: str) -> Tensor:
    """Return one projection's rows by head, (heads, F, D), with the bias, if there is one, as a last column."""
    path = {"q": site.query, "k": site.key, "v": site.value}[role]
    weight, bias = view.tensor(f"{path}.weight").double().cpu(), _bias(view, path)
    rows = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    if site.fused:
        rows = rows.chunk(3)["qkv".index(role)]
    return rows.unflatten(0, (site.num_heads, site.head_dim))


def _bias(view: ModelView, path: str) -> Tensor | None:
    """Return a layer's bias, or None if it has none."""
    bias = optional_tensor(view, f"{path}.bias")
    return None if bias is None else bias.double().cpu()
