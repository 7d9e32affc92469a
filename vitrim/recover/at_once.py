"""Trains all blocks of a cut student at once: each learns, by an error of its own, to put out what the teacher's does.

A step is one pass of both models. The student's stream is detached behind every block, so that a block's gradient comes
from its own error alone, on what the student's earlier blocks put out now; errors are relative to the energy of the
teacher's output, and steps to each weight's norm, so nothing depends on how weights are scaled. No foreign `forward` is
copied: hooks at the blocks see and detach. The loop, its states and its judge are those of distillation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vitrim.calibrate.activations import forward_order
from vitrim.config.options import AtOnceOptions, RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, ImageStream
from vitrim.distributed.processes import join_
from vitrim.errors import ModelError
from vitrim.metrics.judging import FeatureModel
from vitrim.models.features import device_of, features, first_tensor, kept_positions
from vitrim.models.sites import find_mlps
from vitrim.recover.distill import distil_
from vitrim.recover.files import AT_ONCE
from vitrim.recover.result import Recovery
from vitrim.recover.run import Run
from vitrim.recover.sampler import MicroBatch
from vitrim.recover.targets import in_precision


def train_at_once_(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet | ImageStream,
    *,
    held_out: Sequence[Tensor],
    options: AtOnceOptions,
    context: RunContext | None = None,
) -> Recovery:
    """Train all blocks of a cut student at once, in place.

    Args:
        student: the cut model, with the blocks of the teacher; ends with the best state on the held-out images, the
            start and averaged weights included.
        teacher: the original; never changed.
        images: what to train on, augmented already; labels are not read.
        held_out: preprocessed images (B, C, H, W) that judge which state is best.
        options: length, batch, rate and the rest.
        context: the seed of the order of images, the folder for the state, whether to continue from the state there,
            and whether progress is shown. Without it: seed 0, no files.

    Returns:
        The curve of held-out errors and what was chosen.

    Raises:
        Interrupted: stopped by Ctrl-C; with a work folder, the run can be resumed.
        OutputError: the state could not be written; the state before it is whole.
        ModelError: a block runs more than once in a pass.
    """
    join_(device_of(student).type)
    context = context or RunContext()
    context = replace(context, work=context.work and context.work / AT_ONCE)
    options_of_run = RecoverOptions(**options.model_dump(), optimizer="relative")
    return distil_(
        LocalRun(student, teacher, images=images, held_out=held_out, options=options_of_run, context=context)
    )


def check_blocks(teacher: nn.Module, images_BCHW: Tensor) -> None:
    """Check, on any images, that each block has one output to learn.

    Raises:
        ModelError: a block runs more than once in a pass.
    """
    images_BCHW = images_BCHW[:2].to(device_of(teacher))
    blocks = forward_order(teacher, find_mlps(teacher), images_BCHW)
    with torch.no_grad(), recorded(teacher, blocks) as outputs:
        features(teacher, images_BCHW)
    if len(outputs) != len(blocks):
        raise ModelError(
            f"at_once: the {len(blocks)} blocks of {type(teacher).__name__} run {len(outputs)} times in a pass, and "
            "one that runs again has no output of its own to learn; drop at_once."
        )


class LocalRun(Run):
    """A run whose loss is the mean over blocks of the error of a block's output, relative to the teacher's energy."""

    title = name = result_name = "all blocks at once"

    def __init__(self, student: nn.Module, teacher: nn.Module, **given: Any) -> None:
        super().__init__(student, teacher, **given)
        self.sites = find_mlps(teacher)
        probe = self.judge.held_out[0][0].to(self.device)
        check_blocks(teacher, probe)
        self.local = forward_order(teacher, self.sites, probe[:2])
        kept = kept_positions(student)  # a block that lets tokens end does so for those behind it
        self.kept = list(accumulate((kept.get(block) for block in self.local), lambda last, own: own or last))
        tiny = torch.finfo(torch.float32).tiny
        self.energies = [max(float(target.float().square().mean()), tiny) for target in self._local_targets(probe)]

    def _may_train(self, name: str) -> bool:
        """Return whether a parameter is one of a block."""
        return name.startswith(tuple(f"{block}." for block in self.local))

    def _probe(self) -> Tensor:
        """Return the loss of two images."""
        return self._local_loss(FeatureModel(self.student, self.options.features_at), self.judge.held_out[0][0][:2])

    def _loss(self, batch: MicroBatch) -> Tensor:
        return self._local_loss(self.model, self._stood_in(batch).images_BCHW)

    def _local_loss(self, student: nn.Module, images_BCHW: Tensor) -> Tensor:
        """Return the mean over blocks of the relative error of their outputs, on the student's own stream."""
        images_BCHW = images_BCHW.to(self.device)
        with in_precision(self.options, self.device):
            targets = self._local_targets(images_BCHW)
        with in_precision(self.options, self.device), parted(self.student, self.local, targets) as errors:
            student(images_BCHW)
        relative = [error / energy for error, energy in zip(errors, self.energies, strict=True)]
        return torch.stack(relative).mean()

    def _local_targets(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return what the teacher's blocks put out, of the tokens that the student still has there."""
        with torch.no_grad(), recorded(self.teacher, self.local) as outputs:
            features(self.teacher, images_BCHW, at=self.options.features_at)
        return [
            output if kept is None else output[:, list(kept)] for output, kept in zip(outputs, self.kept, strict=True)
        ]


@contextmanager
def recorded(model: nn.Module, blocks: Sequence[str]) -> Iterator[list[Tensor]]:
    """Yield a list that gets copies of what blocks put out, in the order in which they run."""
    outputs: list[Tensor] = []
    with _hooked(model, blocks, lambda _, __, output: outputs.append(first_tensor(output).clone())):
        yield outputs


@contextmanager
def parted(model: nn.Module, blocks: Sequence[str], targets: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield a list that gets the mean squared error of each block's output; the stream goes on without gradient."""
    errors: list[Tensor] = []

    def part(_: nn.Module, __: Any, output: Any) -> Any:
        errors.append((first_tensor(output).float() - targets[len(errors)].float()).square().mean())
        return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output)

    with _hooked(model, blocks, part):
        yield errors


@contextmanager
def _hooked(model: nn.Module, blocks: Sequence[str], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handles = [model.get_submodule(block).register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
