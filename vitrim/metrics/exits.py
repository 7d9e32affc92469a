"""What it costs in quality that each image leaves a looped classifier at the first exit whose class is sure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.errors import DataError
from vitrim.metrics.fidelity import TokenComparison, kinds
from vitrim.metrics.outputs import images_and_labels
from vitrim.models.exits import UntilSure
from vitrim.models.features import evaluating, features, inputs_for, logits, same_patches
from vitrim.tokens import Features


def at_confidence(student: UntilSure, teacher: nn.Module, batches: Iterable[Any], *, top1: bool) -> dict[str, float]:
    """Judge a student that is left once it is sure; all exits are read, and of each image the one that it would take.

    Args:
        student: the looped model with its confidence.
        teacher: the model to compare features with.
        batches: tensors (B, C, H, W), or tuples that start with one and its labels (such as `Batch`).
        top1: whether the labels are those of the student's head.

    Returns:
        `confidence`; `blocks`, how many run for an image in the mean; `exit=N`, the share of images (0..1) that leave
        behind loop N; `relative_error` of the features, as `fidelity` has it; and `top1` in percent, if it is asked for
        and there are labels.

    Raises:
        DataError: there was no image.
    """
    compared, taken, right = TokenComparison(), list[Tensor](), list[Tensor]()
    with evaluating(student, teacher):
        for images, labels in images_and_labels(batches):
            exit_B, classes_B, found = _left(student, inputs_for(student.model, images))
            target = same_patches(features(teacher, inputs_for(teacher, images)), found)
            for (layer, one), (_, other) in zip(kinds(found)[""], kinds(target)[""], strict=True):
                compared.update(one, other, layer=layer)
            taken.append(exit_B.cpu())
            right.append((classes_B.cpu() == labels)[labels >= 0])
    if not taken:
        raise DataError("confidence: no images to compare on; pass at least one batch.")
    exit_N, right_N = torch.cat(taken), torch.cat(right)
    numbers = range(len(student.loops))
    result = {"confidence": student.confidence, "blocks": float((exit_N + 1).double().mean()) * student.loops.length}
    result |= {f"exit={number + 1}": float((exit_N == number).double().mean()) for number in numbers}
    result |= {"relative_error": compared.relative_error}
    return {**result, "top1": 100 * float(right_N.double().mean())} if top1 and len(right_N) else result


def _left(student: UntilSure, inputs: Tensor) -> tuple[Tensor, Tensor, Features]:
    """Return the exit, the class and the features of each image of a batch."""
    scores = student.loops.exits(lambda: logits(student.model, inputs))
    scores_EBC = torch.stack([scores_BC for scores_BC in scores if scores_BC is not None])  # all are there
    every = student.loops.exits(lambda: features(student.model, inputs))
    exit_B = student.first_sure(scores_EBC)
    at_B = (exit_B, torch.arange(len(exit_B), device=exit_B.device))
    columns = zip(*(found.parts for found in every), strict=True)
    left = [None if column[0] is None else torch.stack(column)[at_B] for column in columns]
    return exit_B, scores_EBC.argmax(-1)[at_B], every[-1].with_parts(left)
