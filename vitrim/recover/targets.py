"""Where a micro-batch's targets come from: the teacher, run on it without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.models.taps import FeaturesAt, device_of, features
from vitrim.recipe import RecoverOptions
from vitrim.recover.order import MicroBatch
from vitrim.types import Features

Targets = Callable[[MicroBatch], Features]


class LiveTargets:
    """The teacher itself, in the precision of the run."""

    def __init__(self, teacher: nn.Module, options: RecoverOptions, device: torch.device) -> None:
        self.teacher, self.options, self.device = teacher, options, device

    def __call__(self, batch: MicroBatch) -> Features:
        """The teacher's features of a micro-batch, on the device."""
        with torch.no_grad(), autocast(self.options, self.device):
            return features(self.teacher, batch.images_BCHW.to(self.device), at=self.options.features_at)


def autocast(options: RecoverOptions, device: torch.device) -> Any:
    """bf16 where it was asked for, or where a GPU has it."""
    on = options.precision == "bf16" or (
        options.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def features_on_cpu(model: nn.Module, images: Tensor, at: FeaturesAt) -> Features:
    """A model's features of a batch, float32 on the CPU."""
    with torch.no_grad():
        found = features(model, images.to(device_of(model)), at=at)
    patches = None if found.patches_BND is None else found.patches_BND.float().cpu()
    return Features(pooled_BD=found.pooled_BD.float().cpu(), patches_BND=patches)
