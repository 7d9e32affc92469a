"""Trains a model with labels: a run of distillation's loop with a loss on labels in place of a teacher's features.

Order of images, rate, states, divergence and resume are those of the loop. Modules train in training mode (batch norms,
dropout), and what is random in them is drawn under seed and step, so a resumed run goes on exactly. What is judged, and
so which state is kept, is the mean loss on held-out images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import Batch, ImageSet
from vitrim.distributed.processes import from_main, join_
from vitrim.errors import DataError, RecipeError
from vitrim.models.features import device_of, evaluating, first_tensor, num_classes
from vitrim.recover.cycles import with_cycles
from vitrim.recover.distill import OnValidation, distil_
from vitrim.recover.judge import Judge
from vitrim.recover.losses import label_loss
from vitrim.recover.result import Recovery
from vitrim.recover.run import Run
from vitrim.recover.sampler import MicroBatch
from vitrim.recover.targets import in_precision

# From what a model puts out for a batch and the batch's labels to the mean loss.
TaskLoss = Callable[[Any, Tensor], Tensor]


def class_scores_loss(output: Any, labels_B: Tensor) -> Tensor:
    """Return the cross-entropy of a classifier's output."""
    return label_loss(first_tensor(output), labels_B)


def train_labels_(
    model: nn.Module,
    images: ImageSet,
    *,
    held_out: Sequence[Batch],
    options: RecoverOptions,
    context: RunContext | None = None,
    loss: TaskLoss = class_scores_loss,
    on_validation: OnValidation | None = None,
) -> Recovery:
    """Train a model with labels, in place.

    Args:
        model: ends with the best state on the held-out images, the start included.
        images: labelled images to train on, augmented already.
        held_out: labelled images that judge which state is best.
        options: length, batch, optimizer, rate and the rest.
        context: seed, folder of the state, whether to continue from it, progress; without it seed 0 and no files.
        loss: of a batch; class scores and their numbers by default.
        on_validation: called with a `Validation` whenever held-out images are judged.

    Returns:
        The curve, whose `relative_error` is the mean loss on held-out images here, and what was chosen.

    Raises:
        DataError: there are no labels, none are held out, or one is outside of the head's classes.
        RecipeError: an option belongs to distillation from a teacher.
        Interrupted, OutputError: as for `recover_`.
    """
    join_(device_of(model).type)
    context = context or RunContext()
    check_label_options(options)
    if not images.has_labels:
        raise DataError(f"{images.name}: has no labels to train with; pass a labelled source.")
    if loss is class_scores_loss:
        check_labels(held_out, num_classes(model), images.name)
    given = {"images": images, "held_out": [batch.images_BCHW for batch in held_out]}
    model, loss = with_cycles(model, loss, options)
    run = LabelRun(model, loss=loss, judged=held_out, options=options, context=context, **given)
    return distil_(run, on_validation)


def check_label_options(options: RecoverOptions) -> None:
    """Refuse options that need a teacher, or a length that is not filled in.

    Raises:
        RecipeError: there is one.
    """
    given = {name: getattr(options, name) for name in ("elastic", "cache_teacher", "text_bank", "schedule")}
    found = next((name for name, value in given.items() if value is not None), "fsdp" if options.fsdp else None)
    if found is not None:
        raise RecipeError(f"recover.{found}: goes with distillation, not with loss=labels; drop one of the two.")


def check_labels(held_out: Sequence[Batch], classes: int, name: str) -> None:
    """Check the labels of held-out images.

    Raises:
        DataError: there are none, or one is outside of the head's classes.
    """
    labels = [label for batch in held_out for label in batch.labels_B.tolist() if label >= 0]
    if not labels:
        raise DataError(f"{name}: no held-out image has a label, so nothing could be judged; pass more labelled ones.")
    if max(labels) >= classes:
        raise DataError(
            f"{name}: label {max(labels)} is outside of the {classes} classes of the head; use 0..{classes - 1}."
        )


class LabelJudge(Judge):
    """Held-out images with their labels; the error of a model is its mean loss on them."""

    def __init__(self, batches: Sequence[Batch], loss: TaskLoss) -> None:
        self.batches, self.loss, self.widths = batches, loss, None
        self.held_out = [(batch.images_BCHW, batch.labels_B) for batch in batches]  # type: ignore[assignment]

    def errors(self, student: nn.Module) -> dict[str, float]:
        """Return the mean loss as `relative_error`; infinite where it is no number."""
        total, device = 0.0, device_of(student)
        with evaluating(student):
            for batch in self.batches:
                loss = self.loss(student(batch.images_BCHW.to(device)), batch.labels_B.to(device))
                total += float(loss) * len(batch.labels_B)
        mean = total / sum(len(batch.labels_B) for batch in self.batches)
        return from_main({"relative_error": mean if math.isfinite(mean) else math.inf})


class OutputModel(nn.Module):
    """Wrapper whose forward is the model's own, so that data-parallel wrappers see the call that trains it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Any:
        """Return what the model puts out."""
        return self.model(images_BCHW)


class LabelRun(Run):
    """A run whose loss is that of a task with labels; there is no teacher."""

    title, name, result_name = "train", "training", "training with labels"

    def __init__(self, model: nn.Module, *, loss: TaskLoss, judged: Sequence[Batch], **given: Any) -> None:
        self.task_loss, self.judged_batches = loss, judged
        super().__init__(model, model, **given)

    def _make_judge(self, held_out: Sequence[Tensor]) -> Judge:
        return LabelJudge(self.judged_batches, self.task_loss)

    def _reader(self) -> Any:
        return OutputModel(self.student)

    def _probe(self) -> Tensor:
        """Return the loss of two images."""
        batch = self.judged_batches[0]
        images, labels = batch.images_BCHW[:2].to(self.device), batch.labels_B[:2].to(self.device)
        return self.task_loss(self.student(images), labels)

    def _backward(self, batches: Sequence[MicroBatch]) -> float:
        """Add up gradients in training mode, with what is random drawn under seed and step."""
        self.trained.train()
        try:
            with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
                torch.manual_seed(self.context.seed * 1_000_003 + self.step)
                return super()._backward(batches)
        finally:
            self.trained.eval()

    def _loss(self, batch: MicroBatch) -> Tensor:
        """Return the mean loss of a micro-batch; nothing where no image of it could be read."""
        stood_in = self._stood_in(batch)
        with in_precision(self.options, self.device):
            output = self.model(stood_in.images_BCHW.to(self.device))
        if stood_in is not batch:
            return 0.0 * first_tensor(output).sum()
        return self.task_loss(output, batch.labels_B.to(self.device))

    def score(self, errors: Mapping[str, float]) -> float:
        """Return the mean loss."""
        return errors["relative_error"]
