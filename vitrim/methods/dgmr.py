"""DGMR, diversity-guided MLP reduction (arXiv 2506.08591), as published and as we carry it further.

As published, the units kept are those whose input weights span the most (greedy Gram-Schmidt); biases and output
weights play no part. Ours looks at what the units do: forward selection by orthogonal least squares on the output that
the block should have. The kept weights are not repaired here; repair is the same for every method.

In attention nothing forces a choice between dimensions: any mixtures of a head's dimensions may stay. Ours are the best
of their number for the logits and, with least squares into the output projection, for the attention's output.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vitrim.errors import RecipeError
from vitrim.methods.registry import Parts, SiteMethod, register
from vitrim.ops.forward_selection import select_on_moments
from vitrim.ops.gram_schmidt import select_units
from vitrim.ops.head_factors import LogitSums, ValueSums, factor_logits, factor_values, select_heads
from vitrim.ops.least_squares import moments
from vitrim.ops.output_metric import weighed
from vitrim.surgery import KeepHeadDims, KeepHeads, KeepPaddedDims, KeepUnits
from vitrim.types import MlpWeights, SiteView, Stats

SelectOn = Literal["weights", "activations", "outputs", "features"]
MIX_RIDGE = 1e-4  # relative to the mean energy of a head's dimensions


@register
class Dgmr(SiteMethod):
    """DGMR with our extension: adds units one by one, each time the one that improves the fit of the output most."""

    name = "dgmr"
    paper = "Diversity-Guided MLP Reduction for Efficient Large Vision Transformers"
    arxiv = "2506.08591"
    summary = "forward selection on the block's output, closed-form repair with feedback, local refit"
    needs = "images"
    repairs = True
    edits = (KeepUnits, KeepHeadDims, KeepHeads, KeepPaddedDims)

    select_on: SelectOn | None = None
    """What to compare units by: weights, activations, the block's outputs, or outputs by how far an error in them
    moves the final features. None uses outputs if there are images, and weights otherwise."""
    parts: Parts = "mlp"
    """Which part of each block is cut."""
    heads: Literal["dims", "whole"] = "dims"
    """Cut dimensions of every head of an attention, or whole heads."""

    def cuts(self) -> Parts:
        """Return what is cut of each block."""
        return self.parts

    def select(self, view: SiteView) -> Tensor:
        """Return the indices of the units to keep, in pick order.

        Args:
            view: the site's weights, for all but `weights` its calibration sums, and for `features` their metric.

        Raises:
            RecipeError: something other than `weights` was asked for without images.
        """
        select_on = self.select_on or ("weights" if view.stats is None else "outputs")
        if select_on == "weights":
            return select_units(view.weights.input_rows, view.num_keep)
        if view.stats is None:
            raise RecipeError(f"options.select_on={select_on!r} needs images; pass data, or use select_on='weights'.")
        if select_on == "activations":
            return _by_activations(view.stats, view.weights, view.num_keep)
        return _by_outputs(view.stats, view.weights, view.num_keep, view.scale_D, view.metric_DD)

    def weighs_by_features(self) -> bool:
        """Return whether outputs count by how much the final features feel their errors."""
        return self.select_on == "features"

    def whole_heads(self) -> bool:
        """Return whether heads are kept or dropped as a whole."""
        return self.heads == "whole"

    def pick_heads(self, sums: ValueSums, num_keep: int) -> Tensor:
        """Return heads by forward selection of groups on the attention's output."""
        return select_heads(sums, num_keep, ridge=MIX_RIDGE)

    def mix_logits(self, sums: LogitSums, num_keep: int) -> tuple[Tensor, Tensor]:
        """Return the mixtures of queries and keys whose logits come closest to those wanted."""
        return factor_logits(sums, num_keep, ridge=MIX_RIDGE)

    def mix_values(self, sums: ValueSums, num_keep: int) -> Tensor:
        """Return the mixtures of values from which the attention's output can be predicted best."""
        return factor_values(sums, num_keep, ridge=MIX_RIDGE)


@register
class DgmrPaper(Dgmr):
    """DGMR as published: Gram-Schmidt on the input weights alone, and no repair."""

    name = "dgmr-paper"
    summary = "Gram-Schmidt on input weights, kept weights unchanged"
    needs = "weights"
    repairs = False
    edits = (KeepUnits,)

    select_on: Literal["weights"] = "weights"
    """Compare units by input weights alone, as published."""
    parts: Literal["mlp"] = "mlp"
    """MLPs alone are cut, as published."""


def _by_activations(stats: Stats, weights: MlpWeights, num_keep: int) -> Tensor:
    """Select by pivoted Cholesky of the hidden second moment, each unit scaled by the norm of its output column."""
    gram_HH, _ = moments(stats, centred=weights.output_bias_D is not None)
    scale_H = weights.output_DH.norm(dim=0).to(gram_HH)
    return select_on_moments(gram_HH * scale_H * scale_H[:, None], num_keep, rounding=stats.rounding)


def _by_outputs(
    stats: Stats, weights: MlpWeights, num_keep: int, scale_D: Tensor | None, metric_DD: Tensor | None
) -> Tensor:
    """Select forward on the target output, weighed by its metric or, without one, each channel by its layer scale."""
    gram_HH, cross_HD = moments(stats, centred=weights.output_bias_D is not None)
    cross_HD = weighed(cross_HD, scale_D, metric_DD)
    return select_on_moments(gram_HH, num_keep, cross_HD=cross_HD, rounding=stats.rounding)
