"""DGMR, diversity-guided MLP reduction (arXiv 2506.08591): as published, `DgmrPaper`, and carried further, `Dgmr`.

As published, the units kept are those whose input weights span the most (greedy Gram-Schmidt); biases and output
weights play no part. Carried further, a unit is judged by what it does: forward selection by orthogonal least squares
picks, one after the other, the unit with which the kept ones can put out the most of what the MLP should. Repair of the
kept weights is not done here; it is the same for every method.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vitrim.errors import RecipeError
from vitrim.methods.registry import SiteMethod, register
from vitrim.ops.forward_selection import select_on_moments
from vitrim.ops.gram_schmidt import select_units
from vitrim.ops.least_squares import moments
from vitrim.types import MlpWeights, SiteView, Stats

SelectOn = Literal["weights", "activations", "outputs"]


@register
class Dgmr(SiteMethod):
    """Keep a diverse set of units: each adds the most to what those picked before it can do."""

    name = "dgmr"
    paper = "Diversity-Guided MLP Reduction for Efficient Large Vision Transformers"
    arxiv = "2506.08591"
    summary = "forward selection on the block's output, closed-form repair with feedback, local refit"
    needs = "images"
    repairs = True

    select_on: SelectOn | None = None
    """What the units are told apart by; None takes outputs where there are images, else weights."""

    def select(self, view: SiteView) -> Tensor:
        """Units in the order in which they are picked.

        Args:
            view: the MLP's weights and, for `activations` and `outputs`, its calibration sums.

        Returns:
            Their indices.

        Raises:
            RecipeError: `activations` or `outputs` was asked for without images.
        """
        select_on = self.select_on or ("weights" if view.stats is None else "outputs")
        if select_on == "weights":
            return select_units(view.weights.input_rows, view.num_keep)
        if view.stats is None:
            raise RecipeError(f"options.select_on={select_on!r} needs images; pass data, or use select_on='weights'.")
        if select_on == "activations":
            return _by_activations(view.stats, view.weights, view.num_keep)
        return _by_outputs(view.stats, view.weights, view.num_keep, view.scale_D)


@register
class DgmrPaper(Dgmr):
    """DGMR as published: units by input weights alone, and no repair."""

    name = "dgmr-paper"
    summary = "Gram-Schmidt on input weights, kept weights unchanged"
    needs = "weights"
    repairs = False

    select_on: Literal["weights"] = "weights"
    """The published criterion, the only one that there is here."""


def _by_activations(stats: Stats, weights: MlpWeights, num_keep: int) -> Tensor:
    """Pivoted Cholesky of the hidden second moment, each unit scaled by the norm of its output column."""
    gram_HH, _ = moments(stats, centred=weights.output_bias_D is not None)
    scale_H = weights.output_DH.norm(dim=0).to(gram_HH)
    return select_on_moments(gram_HH * scale_H * scale_H[:, None], num_keep)


def _by_outputs(stats: Stats, weights: MlpWeights, num_keep: int, scale_D: Tensor | None) -> Tensor:
    """Forward selection on the target; output channels count as much as the layer scale lets through."""
    gram_HH, cross_HD = moments(stats, centred=weights.output_bias_D is not None)
    if scale_D is not None:
        cross_HD = cross_HD * scale_D.to(cross_HD)
    return select_on_moments(gram_HH, num_keep, cross_HD=cross_HD)
