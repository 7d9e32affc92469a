"""What a looped classifier costs and is worth if each image leaves it at the first exit whose class is sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cost.latency import measure_latency
from vitrim.data import Batch
from vitrim.inputs import run_on
from vitrim.metrics.exits import at_confidence
from vitrim.models.exits import UntilSure

# How many images are timed, one by one, since each takes a depth of its own.
NUM_TIMED = 32


def judge_sure(
    student: UntilSure, teacher: nn.Module, batches: Sequence[Batch], *, top1: bool, latency: bool
) -> dict[str, Any]:
    """Return what `at_confidence` does, and as `latency` the time of some images one by one, beside the teacher's."""
    found: dict[str, Any] = at_confidence(student, teacher, batches, top1=top1)
    if latency:
        images_BCHW = torch.cat([batch.images_BCHW for batch in batches[:NUM_TIMED]])[:NUM_TIMED]
        _, timed = measure_latency([OneByOne(teacher), student], images_BCHW, batch_sizes=(1,))
        found |= {"latency": timed[1]} if timed else {}
    return found


class OneByOne(nn.Module):
    """A model that runs each image by itself, to be timed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> None:
        """Run all images."""
        for image_CHW in images_BCHW:
            run_on(self.model, image_CHW[None])
