"""The optimizers of a recovery: AdamW, SGD, and steps that are shares of each weight's norm, of no known rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config.options import AdapterOptions
from vitrim.distributed.processes import mean
from vitrim.errors import SiteNotFoundError
from vitrim.layers.recursive import RecursiveLinear
from vitrim.models.features import features
from vitrim.models.sites import find_mlps
from vitrim.recover.adapters import without_decay
from vitrim.repair.relative_steps import RelativeSteps, gated_weights
from vitrim.types import FeaturesAt


def adamw(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], adapter: AdapterOptions | None
) -> torch.optim.AdamW:
    """Build AdamW with the betas of the DGMR paper, and weight decay on matrices only."""
    return torch.optim.AdamW(_groups(model, parameters, adapter), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)


def sgd(model: nn.Module, parameters: Mapping[str, nn.Parameter], adapter: AdapterOptions | None) -> torch.optim.SGD:
    """Build SGD with Nesterov's momentum of 0.9, and weight decay on matrices only."""
    return torch.optim.SGD(_groups(model, parameters, adapter), lr=0.0, momentum=0.9, nesterov=True)


def _groups(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], adapter: AdapterOptions | None
) -> list[dict[str, Any]]:
    """Return matrices, which decay, and other parameters, which don't."""
    spared = without_decay(model, adapter)
    matrices = [p for p in parameters.values() if p.ndim > 1 and id(p) not in spared]
    others = [p for p in parameters.values() if p.ndim <= 1 or id(p) in spared]
    return [{"params": matrices, "decays": True}, {"params": others, "decays": False}]


def relative_steps(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], images_BCHW: Tensor, at: FeaturesAt
) -> RelativeSteps:
    """Build steps that are shares of each weight's norm.

    Args:
        model: what is trained.
        parameters: its parameters that are trained, by name.
        images_BCHW: run once for the sizes of the layers' inputs; a resumed run has to pass the same.
        at: where features are read.
    """
    try:
        sites = find_mlps(model)
    except SiteNotFoundError:
        sites = []
    gated = gated_weights(sites, parameters)
    # Factors may start at zero; a step of theirs is a share of the matrix that they are added to.
    looped = [layer for layer in model.modules() if isinstance(layer, RecursiveLinear)]
    norms = {up: norm for layer in looped for up, norm in layer.norms().items()}
    steps = RelativeSteps(model, list(parameters.values()), gated=gated, norms=norms, mean=mean)
    with torch.no_grad():
        features(model, images_BCHW, at=at)
    steps.close()
    return steps
