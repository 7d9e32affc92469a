"""VBP (arXiv 2507.12988): drops the units whose activations vary least, and puts their means into the output bias.

One pass over the images through the uncut model gives each hidden unit's mean and variance behind the activation.
Units of all MLPs are ranked together by their variance, so widths differ from MLP to MLP. A unit that always puts out
its mean can be dropped without a trace, since the next layer's bias takes up its mean times its column; of others the
variance is what is lost. How much a unit's column makes of it plays no part. Fine-tuning is left to `recover`.

Shapes: N tokens, H hidden units, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vitrim.methods.registry import ModelMethod, register
from vitrim.ops.gram_schmidt import working_dtype
from vitrim.surgery import KeepUnits
from vitrim.types import MlpSite, ModelView


@register
class Vbp(ModelMethod):
    """VBP: drops the hidden units with the least variance in the whole model, their means into the output bias."""

    name = "vbp"
    paper = "Variance-Based Pruning for Accelerating and Compressing Trained Networks"
    arxiv = "2507.12988"
    summary = "units with the most variance in the whole model, the means of the others into the bias"
    needs = "images"
    repairs = False
    takes = "widths"
    folds = True

    def propose(self, view: ModelView) -> Iterator[KeepUnits]:
        """Yield one cut per MLP; of all MLPs together as many units stay as the budget says, at least one of each."""
        spreads = {site.output: Spread() for site in view.sites}
        view.observe(list(spreads), lambda path, hidden, output: spreads[path].add(hidden))
        kept = _kept({site.path: spreads[site.output].variance_H for site in view.sites}, sum(view.widths.values()))
        without = [site.path for site in view.sites if view.weights(site).output_bias_D is None]
        if without and not view.repaired:
            view.note(f"{without[0]}: has no output bias, so the means of dropped units are lost.")
        for site in view.sites:
            yield _cut(view, site, kept[site.path], spreads[site.output].mean_H)


class Spread:
    """Mean and variance of hidden units over all tokens, merged from batch to batch (Chan's update)."""

    def __init__(self) -> None:
        self.count, self.mean_H, self.square_H = 0, torch.zeros(()), torch.zeros(())

    def add(self, hidden: Tensor) -> None:
        """Add a batch of activations with the units last."""
        hidden_NH = hidden.flatten(0, -2).to(working_dtype(hidden.device))
        mean_H, count = hidden_NH.mean(0), len(hidden_NH)
        square_H = (hidden_NH - mean_H).square().sum(0).cpu()
        shift_H, total = mean_H.cpu() - self.mean_H, self.count + count
        self.square_H = self.square_H + square_H + shift_H.square() * (self.count * count / total)
        self.mean_H = self.mean_H + shift_H * (count / total)
        self.count = total

    @property
    def variance_H(self) -> Tensor:
        """The variance of each unit."""
        return self.square_H / max(1, self.count - 1)


def _kept(variances: dict[str, Tensor], total: int) -> dict[str, tuple[int, ...]]:
    """Return the units of each MLP that are among the `total` of most variance; each keeps its first in any case."""
    firsts = {path: int(variance_H.argmax()) for path, variance_H in variances.items()}
    scored = [
        (unit != firsts[path], -value, order, unit, path)
        for order, (path, variance_H) in enumerate(variances.items())
        for unit, value in enumerate(variance_H.tolist())
    ]
    best = sorted(scored)[:total]
    return {path: tuple(sorted(unit for *_, unit, own in best if own == path)) for path in variances}


def _cut(view: ModelView, site: MlpSite, keep: tuple[int, ...], mean_H: Tensor) -> KeepUnits:
    """Return the cut of one MLP, with the means of what is dropped in its output bias."""
    edit, weights = KeepUnits(site=site, keep=keep), view.weights(site)
    if view.repaired or weights.output_bias_D is None or edit.width == site.d_hidden:
        return edit
    dropped = torch.ones(site.d_hidden, dtype=torch.bool)
    dropped[list(keep)] = False
    bias_D = weights.output_bias_D.cpu().to(mean_H) + weights.output_DH.cpu().to(mean_H)[:, dropped] @ mean_H[dropped]
    return edit.with_output(weights.output_DH[:, list(keep)], bias_D)
