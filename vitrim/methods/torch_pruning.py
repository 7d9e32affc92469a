"""What the library torch-pruning would keep: its own importance, on its own dependency group, as a baseline.

The library traces a module and scores together the layers that must be cut together, a group. It is given the linear
layers of one MLP, wired as in the MLP. The activation and a norm over hidden units are left out, because neither
changes which layers form the group, nor their weights. Importances of the library that need a loss with labels are not
offered; `taylor` is what can be had without labels.

Shapes: H hidden units, D model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitrim.errors import MissingExtraError
from vitrim.methods.registry import SiteMethod, register
from vitrim.types import MlpWeights, SiteView


@register
class TorchPruning(SiteMethod):
    """Keep the units that the library torch-pruning finds important."""

    name = "torch-pruning"
    paper = "DepGraph: Towards Any Structural Pruning (its library's importances)"
    arxiv = "2301.12900"
    summary = "units by the importance that the library torch-pruning gives them"
    needs = "weights"

    importance: Literal["magnitude", "fpgm"] = "magnitude"
    """The library's group magnitude, or `fpgm`: the distance to the geometric median of all units."""
    p: int = Field(default=2, ge=1)
    """The power that each weight is raised to."""
    reduction: Literal["mean", "max", "prod", "first"] = "mean"
    """How the library joins the scores of the layers of a group."""

    def select(self, view: SiteView) -> Tensor:
        """Units by the library's score, largest first; a tie goes to the lowest index.

        Args:
            view: the MLP's weights, and how many units stay.

        Returns:
            Their indices.

        Raises:
            MissingExtraError: torch-pruning is not installed.
        """
        scores_H = library_scores(view.weights, self)
        return scores_H.sort(descending=True, stable=True).indices[: view.num_keep].cpu()


def library_scores(weights: MlpWeights, options: TorchPruning) -> Tensor:
    """The library's importance of each hidden unit, (H,)."""
    try:
        import torch_pruning
    except ImportError:
        raise MissingExtraError("torch-pruning is not installed; pip install 'vitrim[bench]'.") from None
    from torch_pruning.pruner.importance import FPGMImportance, GroupMagnitudeImportance

    kind = {"magnitude": GroupMagnitudeImportance, "fpgm": FPGMImportance}[options.importance]
    mlp = _Layers(weights)
    with torch.enable_grad():  # it traces by gradient functions
        graph = torch_pruning.DependencyGraph().build_dependency(
            mlp, example_inputs=torch.zeros(1, mlp.value.in_features)
        )
    group = graph.get_pruning_group(
        mlp.value, torch_pruning.prune_linear_out_channels, idxs=list(range(weights.num_units))
    )
    return kind(p=options.p, group_reduction=options.reduction)(group)


class _Layers(nn.Module):
    """A site's linear layers, wired as in the MLP."""

    def __init__(self, weights: MlpWeights) -> None:
        super().__init__()
        self.value, self.output = _linear(weights.value_HD), _linear(weights.output_DH)
        self.gate = None if weights.gate_HD is None else _linear(weights.gate_HD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Gate times value, or value alone, through the output projection."""
        hidden = self.value(tokens)
        return self.output(hidden if self.gate is None else self.gate(tokens) * hidden)


def _linear(weight: Tensor) -> nn.Linear:
    """A layer without bias that has a copy of these weights, on the CPU."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().float().cpu().clone())
    return layer
