"""What the library torch-pruning would keep: its own importance, on its own dependency group, as a baseline.

The library traces a module and scores the layers that must be cut together. It is given the site's linear layers, wired
as in the MLP. The activation is left out, and a norm over hidden units with it, because neither changes which layers
form the group nor what their weights weigh. Its importances that need a loss with labels are not offered; `taylor` is
what can be had without.

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
    """torch-pruning: units by that library's own importance."""

    name = "torch-pruning"
    paper = "DepGraph: Towards Any Structural Pruning (its library's importances)"
    arxiv = "2301.12900"
    summary = "units by the importance that the library torch-pruning gives them"
    needs = "weights"
    repairs = False

    importance: Literal["magnitude", "fpgm"] = "magnitude"
    """The library's group magnitude, or distance to the geometric median."""
    p: int = Field(default=2, ge=1)
    """Power of a weight."""
    reduction: Literal["mean", "max", "prod", "first"] = "mean"
    """How the scores of a group's layers are joined."""

    def select(self, view: SiteView) -> Tensor:
        """Units by the library's score, largest first; a tie goes to the lowest index.

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
