"""Trains early exits of a model whose blocks are looped, once it has been distilled (Relaxed Recursive Transformers).

The end of each loop is an exit, with the model's own final norm and head. The last one learns from the teacher, at
weight 1, and each before it from the last one, detached, at a small weight. The loop and its states are those of
distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config.options import ExitOptions, RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, ImageStream
from vitrim.distributed.processes import from_main, join_
from vitrim.metrics.judging import FeatureModel, relative_error
from vitrim.models.exits import Loops
from vitrim.models.features import device_of
from vitrim.recover.distill import distil_
from vitrim.recover.files import EXITS
from vitrim.recover.judge import Judge
from vitrim.recover.losses import detached, parts_of
from vitrim.recover.result import Recovery
from vitrim.recover.run import Run
from vitrim.tokens import Features, Parts, one_below_the_other
from vitrim.types import FeaturesAt


def train_exits_(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet | ImageStream,
    *,
    held_out: Sequence[Tensor],
    options: ExitOptions,
    context: RunContext | None = None,
) -> Recovery:
    """Train the early exits of a looped student, in place.

    Args:
        student: the looped model; ends with the best state on the held-out images, the start and averaged weights
            included.
        teacher: the original; never changed.
        images: what to train on, augmented already; labels are not read.
        held_out: preprocessed images (B, C, H, W) that judge which state is best.
        options: length, batch, rate, the weight of exits and the rest.
        context: the seed of the order of images, the folder for the state, whether to continue from the state there,
            and whether progress is shown. Without it: seed 0, no files.

    Returns:
        The curve of held-out errors, of each exit (`exit=N`) and their weighted mean, and what was chosen.

    Raises:
        Interrupted: stopped by Ctrl-C; with a work folder, the run can be resumed.
        OutputError: the state could not be written; the state before it is whole.
        ModelError: the student's blocks are not looped.
    """
    join_(device_of(student).type)
    context = context or RunContext()
    context = replace(context, work=context.work and context.work / EXITS)
    options_of_run = RecoverOptions(**options.model_dump(exclude={"weight"}), optimizer="relative")
    given = {"images": images, "held_out": held_out, "options": options_of_run, "context": context}
    return distil_(ExitRun(student, teacher, weight=options.weight, **given))


class ExitModel(FeatureModel):
    """A looped model that returns the features of all exits, the last one last, one below the other."""

    def __init__(self, model: nn.Module, at: FeaturesAt) -> None:
        super().__init__(model, at)
        self.loops = Loops(model)

    def forward(self, images_BCHW: Tensor) -> Parts:
        """Return pooled vectors (E B, D), patch tokens (E B, N, D) or None, and those of further layers."""
        return one_below_the_other(self.loops.exits(lambda: FeatureModel.forward(self, images_BCHW)))


class ExitJudge(Judge):
    """The held-out images of another judge, and the errors of all exits on them."""

    def __init__(self, like: Judge, weights: Sequence[float]) -> None:
        self.at, self.widths, self.held_out = like.at, like.widths, like.held_out
        self.weights = weights

    def errors(self, student: FeatureModel) -> dict[str, float]:
        """Return `exit=N`, the error of each exit against the teacher, and their weighted mean as `relative_error`."""
        errors, loops = {}, Loops(student.model)
        for number in range(1, len(loops) + 1):
            with loops.up_to(number):
                errors[f"exit={number}"] = relative_error(FeatureModel(student.model, self.at), self.held_out, self.at)
        weighted = sum(weight * error for weight, error in zip(self.weights, errors.values(), strict=True))
        return from_main({"relative_error": weighted / sum(self.weights), **errors})


class ExitRun(Run):
    """A run whose loss adds, to that of the whole student, the distance of each earlier exit to the last one."""

    title = name = result_name = "early exits"

    def __init__(self, student: nn.Module, teacher: nn.Module, *, weight: float, **given: Any) -> None:
        self.num_exits, self.weight = len(Loops(student)), weight
        super().__init__(student, teacher, **given)
        self.judge = ExitJudge(self.judge, [weight] * (self.num_exits - 1) + [1.0])

    def _reader(self) -> FeatureModel:
        return ExitModel(self.student, self.options.features_at)

    def score(self, errors: Mapping[str, float]) -> float:
        """Return the weighted mean: a little of the last exit may be given for much of the others."""
        return errors["relative_error"]

    def _compared(self, found: Features, target: Features) -> Tensor:
        *earlier, last = parts_of(found, self.num_exits)
        wanted = detached(last)
        losses = [super(ExitRun, self)._compared(part, wanted) for part in earlier]
        return super()._compared(last, target) + self.weight * torch.stack(losses).sum()
