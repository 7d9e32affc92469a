"""Units that the library torch-pruning would keep, by its own importance; a baseline with an optional dependency.

The library traces a module and scores the layers that must be cut together. It is given the site's linear layers, wired
as in the MLP. The activation is left out, and a norm over hidden units with it, because neither changes which layers
form the group nor the importance of their weights. Its importances that need a loss with labels are not offered;
`taylor` is the alternative without labels.

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
    """torch-pruning: keeps units by that library's own importance."""

    name = "torch-pruning"
    paper = "DepGraph: Towards Any Structural Pruning (its library's importances)"
    arxiv = "2301.12900"
    summary = "units by the importance that the library torch-pruning gives them"
    needs = "weights"
    repairs = False

    importance: Literal["magnitude", "fpgm"] = "magnitude"
    """Score of the library: weight magnitude over the group, or distance to the geometric median (fpgm)."""
    p: int = Field(default=2, ge=1)
    """Power to which weights are raised, as in an Lp norm."""
    reduction: Literal["mean", "max", "prod", "first"] = "mean"
    """How the scores of the layers that are cut together are combined."""

    def select(self, view: SiteView) -> Tensor:
        """Return units by the library's score, largest first; ties go to the lowest index.

        Raises:
            MissingExtraError: torch-pruning is not installed.
        """
        scores_H = library_scores(view.weights, self)
        return scores_H.sort(descending=True, stable=True).indices[: view.num_keep].cpu()


def library_scores(weights: MlpWeights, options: TorchPruning) -> Tensor:
    """Return the library's importance of each hidden unit, (H,)."""
    try:
        import torch_pruning
    except ImportError:
        raise MissingExtraError("torch-pruning is not installed; pip install 'vitrim[bench]'.") from None
    from torch_pruning.pruner.importance import FPGMImportance, GroupMagnitudeImportance

    kind = {"magnitude": GroupMagnitudeImportance, "fpgm": FPGMImportance}[options.importance]
    mlp = _Layers(weights)
    with torch.enable_grad():  # the library traces gradient functions
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
        """Return the output projection of gate times value, or of value alone."""
        hidden = self.value(tokens)
        return self.output(hidden if self.gate is None else self.gate(tokens) * hidden)


def _linear(weight: Tensor) -> nn.Linear:
    """Return a layer without bias that holds a copy of these weights, on the CPU."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().float().cpu().clone())
    return layer
