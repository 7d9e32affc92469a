"""What calibration streams, from activations that are held whole."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.calibrate import Tokens
from vitrim.types import Stats


def stored_stats(hidden: Tensor, target: Tensor) -> Stats:
    """The sums over stored activations: what calibration streams."""
    return Stats(
        num_tokens=len(hidden),
        hidden_H=hidden.sum(0),
        hidden_HH=hidden.T @ hidden,
        target_D=target.sum(0),
        cross_HD=hidden.T @ target,
        target_square=float(target.square().sum()),
    )


def inputs_of(tokens: Tokens) -> Tensor:
    return torch.cat([lane.inputs_ND for lane in tokens.lanes])


def targets_of(tokens: Tokens) -> Tensor:
    return torch.cat([lane.targets_ND for lane in tokens.lanes])
