"""LORTSAR (arXiv 2407.14655): truncated SVD of a transformer on skeletons, whose layers are 1x1 convolutions mostly.

A kernel is flattened to a matrix of outputs by inputs times positions, group by group, and its best factors of a rank
(Eckart and Young) are a convolution with the same kernel and then a 1x1 one with the bias. How the paper picks ranks
could not be read. Here all layers share one budget of values: of all choices of ranks the one with the least sum of
relative errors is taken, exactly. With data these are errors of what layers put out and the factors are fitted to them;
without, or with `whiten: false`, they are errors of the weights. Training with labels follows: `recover.loss: labels`.

Shapes: K directions of a group's outputs, J choices of one layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from vitrim.errors import BudgetError
from vitrim.methods.low_rank import LowRank, bases
from vitrim.methods.registry import register
from vitrim.ops.allocation import best_choices
from vitrim.surgery import ToLowRank
from vitrim.types import LayerSite, LayerSums, ModelView

NUMBERED = re.compile(r"(^|\.)\d+(\.|$)")  # an element of a list of modules, or in one


@register
class Lortsar(LowRank):
    """LORTSAR: low-rank factors of linear and convolution layers, whose ranks share one budget."""

    name = "lortsar"
    paper = "LORTSAR: Low-Rank Transformer for Skeleton-based Action Recognition"
    arxiv = "2407.14655"
    summary = "linear and convolution layers as two of low rank each, with ranks under one budget"
    needs = "weights"
    edits = (ToLowRank,)

    solver: Literal["svd"] = "svd"
    """Use a truncated SVD, as in the paper."""
    only: tuple[str, ...] | None = None
    """Patterns of layer names. None takes linear and convolution layers of all blocks: the first layer and the head
    hold little, and what is lost there can't be made up for."""
    allocate: bool = True
    """Choose the ranks of all layers together. Otherwise the budget is the share of each layer's values that stays."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if "allocate" in self.model_fields_set and self.allocate and not (self.rank is None and self.energy is None):
            raise ValueError("allocate chooses the ranks; leave rank and energy out, or give allocate=false")
        return self

    def usual(self, view: ModelView, everything: Sequence[LayerSite]) -> list[LayerSite]:
        """Return the linear and convolution layers within lists of modules."""
        return [layer for layer in everything if NUMBERED.search(layer.path)]

    def ranks(self, view: ModelView, layers: Sequence[LayerSite], *, whiten: bool) -> dict[str, int | None]:
        """Return the rank of each layer by path; None where `energy` sets it.

        Raises:
            BudgetError: even rank 1 everywhere is more than the budget.
        """
        if self.rank is not None or self.energy is not None or not self.allocate:
            return super().ranks(view, layers, whiten=whiten)
        errors: dict[str, NDArray[np.float64]] = {}
        for group, sums in view.layer_sums(layers) if whiten else [(layers, {})]:
            for layer in group:
                weight_GMN = layer.matrices(view.tensor(f"{layer.path}.weight"))
                errors[layer.path] = _errors(layer, weight_GMN, sums.get(layer.path))
        costs = {layer.path: _costs(layer) for layer in layers}
        budget = int(view.keep_ratio * sum(int(cost_J[-1]) for cost_J in costs.values()))
        least = sum(int(cost_J[0]) for cost_J in costs.values())
        if least > budget:
            whole = sum(int(cost_J[-1]) for cost_J in costs.values())
            raise BudgetError(f"lortsar: rank 1 in all layers keeps {least / whole:.3g} of their values; ask for more.")
        chosen = best_choices(list(errors.values()), [costs[path] for path in errors], budget)
        return {path: choice + 1 for path, choice in zip(errors, chosen, strict=True)}


def _costs(layer: LayerSite) -> NDArray[np.int64]:
    """Return the values of a layer at ranks 1, 2 and so on, as long as that is fewer than it has, and of it whole."""
    whole = layer.groups * layer.num_rows * layer.num_cols
    each = layer.groups * (layer.num_rows + layer.num_cols)
    return np.array([*(each * rank for rank in range(1, layer.break_even) if each * rank < whole), whole])


def _errors(layer: LayerSite, weight_GMN: Tensor, sums: LayerSums | None) -> NDArray[np.float64]:
    """Return the share of a layer's energy that is lost at each of these choices."""
    energy_K = torch.stack([energy_K for _, energy_K in bases(weight_GMN, sums)]).sum(0)
    lost_K = 1 - energy_K.cumsum(0) / energy_K.sum().clamp(min=torch.finfo(energy_K.dtype).tiny)
    num_ranks = len(_costs(layer)) - 1
    return np.array([*lost_K[:num_ranks].clamp(min=0).tolist(), 0.0])
