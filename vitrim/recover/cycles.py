"""Training with the blocks run in cycles (SDPose, arXiv 2404.03518): the result runs them once, and costs no more.

Behind each cycle there is the loss of what is learned, and tokens are pulled to those of the next cycle. What is kept,
and so judged, is the model of one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config.options import RecoverOptions
from vitrim.errors import RecipeError
from vitrim.metrics.judging import FeatureModel
from vitrim.models.cycles import CycleModel, block_row, cycles
from vitrim.models.features import kept_positions
from vitrim.recover.judge import Judge
from vitrim.recover.losses import cycle_loss, parts_of, pull_losses
from vitrim.recover.run import Run
from vitrim.tokens import Features, Parts, one_below_the_other
from vitrim.types import FeaturesAt


def with_cycles(
    model: nn.Module, loss: Callable[[Any, Tensor], Tensor], options: RecoverOptions
) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """Return a model that runs its blocks in cycles while it trains, and the loss of that, of a task's loss.

    Args:
        model: the model; its own parameters are trained.
        loss: of what the model puts out, and labels.
        options: how many cycles, and how tokens are pulled.

    Raises:
        RecipeError: the model's blocks do not keep all tokens.
    """
    if options.cycles == 1:
        return model, loss
    _check(model)

    def summed(output: Any, labels: Tensor) -> Tensor:
        if not isinstance(output, list):  # of one pass, as it is judged
            return loss(output, labels)
        pulled = {"weights": options.cycle_weights, "detach": options.cycle_detach}
        return cycle_loss(model, output, lambda found: loss(found, labels), **pulled)

    return CycleModel(model, options.cycles), summed


class CycleFeatures(FeatureModel):
    """A model that returns the features behind every cycle, the first cycle's first, one below the other."""

    def __init__(self, model: nn.Module, at: FeaturesAt, count: int) -> None:
        super().__init__(model, at)
        self.count, self.blocks = count, block_row(model)

    def forward(self, images_BCHW: Tensor) -> Parts:
        """Return pooled vectors (C B, D), patch tokens (C B, N, D) or None, and those of further layers."""
        found = cycles(self.model, self.blocks, self.count, lambda: FeatureModel.forward(self, images_BCHW))
        return one_below_the_other([cycle.output for cycle in found])


class OnePassJudge(Judge):
    """A judge of the model as it is, of whatever trains it."""

    def errors(self, student: FeatureModel) -> dict[str, float]:
        """Return the error of one pass."""
        return super().errors(FeatureModel(student.model, self.at))


class CycleRun(Run):
    """A run whose loss is that of the features behind each cycle, and of how far these are from the next cycle's."""

    def __init__(self, student: nn.Module, *given: Any, **named: Any) -> None:
        _check(student)
        super().__init__(student, *given, **named)

    def _make_judge(self, held_out: Any) -> Judge:
        return OnePassJudge(self.teacher, held_out, at=self.options.features_at, widths=self.widths)

    def _reader(self) -> FeatureModel:
        return CycleFeatures(self.student, self.options.features_at, self.options.cycles)

    def _compared(self, found: Features, target: Features) -> Tensor:
        parts = parts_of(found, self.options.cycles)
        losses = [super(CycleRun, self)._compared(part, target) for part in parts]
        tokens = [(part.pooled_BD, part.patches_BND) for part in parts]
        losses += pull_losses(tokens, self.options.cycle_weights, detach=self.options.cycle_detach)
        return torch.stack(losses).sum()


def _check(model: nn.Module) -> None:
    """Refuse a model whose blocks let tokens end, since the first block takes all of them."""
    if kept_positions(model):
        raise RecipeError("recover.cycles: its blocks keep some of the tokens, and a cycle begins with all; drop it.")
