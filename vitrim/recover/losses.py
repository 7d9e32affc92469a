"""The label-free loss of DGMR: mean squared error on the CLS or pooled vector plus that on patch tokens, 1:1.

For the image tower of a pair the pooled vector is the projected one, and how similar it is to texts may count, too.
Beside it stand the losses of poses, and of blocks that run in cycles (SDPose).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

from vitrim.models.cycles import Cycle
from vitrim.models.features import same_patches
from vitrim.models.pose import encode_joints
from vitrim.models.prefix import num_prefix_tokens
from vitrim.models.towers import unit
from vitrim.tokens import Features


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpace:
    """Shared space of an image and a text tower, in which a student's pooled vector is compared with the teacher's.

    Attributes:
        project: the image tower's projection into the space, where it is a module outside of the tower.
        bank_TE: unit vectors of a bank of T texts; None for none.
        scale: what the pair multiplies similarities by.
        weight: of the loss on the bank, beside that on the features.
    """

    project: nn.Module | None = None
    bank_TE: Tensor | None = None
    scale: float = 1.0
    weight: float = 1.0

    def to(self, device: torch.device) -> EmbeddingSpace:
        """Return the same space on a device, frozen and in float32."""
        project = None if self.project is None else copy.deepcopy(self.project).to(device).float().requires_grad_(False)
        return replace(self, project=project, bank_TE=None if self.bank_TE is None else self.bank_TE.to(device))

    def placed(self, found: Features) -> Features:
        """Return features with the pooled vector projected into the space."""
        if self.project is None:
            return found
        return replace(found, pooled_BD=self.project(found.pooled_BD.float()))


def patches_at(found: Features, positions_BP: Tensor | None) -> Features:
    """Return features with the patches at these positions (B, P) of each image; None keeps all."""
    if positions_BP is None or found.patches_BND is None:
        return found
    index_BPD = positions_BP.to(found.patches_BND.device)[..., None].expand(-1, -1, found.patches_BND.shape[-1])
    return replace(found, patches_BND=found.patches_BND.gather(1, index_BPD))


def feature_loss(student: Features, teacher: Features) -> Tensor:
    """Compute the mean squared error of the pooled vectors plus that of the patch tokens; labels never enter.

    Of several layers of tokens each counts alike. A student that keeps some patches is compared at these. Paper: DGMR,
    arXiv 2506.08591, section 3; no normalisation, no temperature.
    """
    teacher = same_patches(teacher, student)
    loss = mse_loss(student.pooled_BD.float(), teacher.pooled_BD.float())
    pairs = zip(student.parts[1:], teacher.parts[1:], strict=True)
    both = [(mine, wanted) for mine, wanted in pairs if mine is not None and wanted is not None]
    layers = [mse_loss(mine.float(), wanted.float()) for mine, wanted in both]
    return loss + torch.stack(layers).mean() if layers else loss


def class_loss(student: Features, teacher: Features) -> Tensor:
    """Compute KL(teacher, student) of the class probabilities, the mean over the images, from features at `logits`."""
    mine, theirs = (log_softmax(found.pooled_BD.float(), dim=1) for found in (student, teacher))
    return kl_div(mine, theirs, reduction="batchmean", log_target=True)


def label_loss(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Compute the cross-entropy of class scores with labels, the mean over all images; one without a label adds 0."""
    return cross_entropy(scores_BC.float(), labels_B, ignore_index=-1, reduction="sum") / len(labels_B)


def space_loss(student: Features, teacher: Features, space: EmbeddingSpace) -> Tensor:
    """Compute the feature loss in the space of a pair, plus the divergence of the similarities to its bank of texts.

    The similarities, times the pair's scale, are made a distribution over the texts; the loss is KL(teacher, student),
    the mean over the images. A bias, as SigLIP's, would be the same for all texts and so changes nothing.
    """
    student, teacher = space.placed(student), space.placed(teacher)
    loss = feature_loss(student, teacher)
    if space.bank_TE is None:
        return loss
    mine, theirs = (
        log_softmax(space.scale * unit(found.pooled_BD) @ space.bank_TE.T, dim=1) for found in (student, teacher)
    )
    return loss + space.weight * kl_div(mine, theirs, reduction="batchmean", log_target=True)


def heatmap_loss(heatmaps_BKhw: Tensor, joints_BK4: Tensor) -> Tensor:
    """Compute the mean squared error of heatmaps against a Gaussian at each joint; unknown joints count as 0."""
    wanted = encode_joints(joints_BK4, (heatmaps_BKhw.shape[-2], heatmaps_BKhw.shape[-1]))
    known_BK11 = joints_BK4[..., 2, None, None] > 0
    return mse_loss(heatmaps_BKhw.float() * known_BK11, wanted * known_BK11)


def cycle_loss(
    model: nn.Module,
    found: Sequence[Cycle],
    task: Callable[[Any], Tensor],
    *,
    weights: tuple[float, float] = (5e-6, 5e-6),
    detach: bool = False,
) -> Tensor:
    """Compute the sum of a task's loss behind each cycle, and of how far its tokens are from those of the next one.

    Paper: SDPose, arXiv 2404.03518.

    Args:
        model: whose cycles were run; it says how many tokens stand in front of the patches.
        found: its cycles.
        task: the loss of what the model gives behind a cycle.
        weights: of the mean squared error of the tokens in front of the patches, and of that of the patches.
        detach: whether the later cycle is a fixed target; in the paper it is pulled, too.
    """
    loss = torch.stack([task(cycle.output) for cycle in found]).sum()
    first = num_prefix_tokens(model)
    parts = [(cycle.tokens_BND[:, :first], cycle.tokens_BND[:, first:]) for cycle in found]
    for term in pull_losses(parts, weights, detach=detach):
        loss = loss + term
    return loss


def pull_losses(
    cycles: Sequence[tuple[Tensor, Tensor | None]], weights: tuple[float, float], *, detach: bool
) -> list[Tensor]:
    """Compute how far each of two parts of the tokens is from that of the next cycle, weighted; without empty parts."""
    losses = []
    for before, after in pairwise(cycles):
        for weight, mine, next_one in zip(weights, before, after, strict=True):
            if weight and mine is not None and next_one is not None and mine.shape[1]:
                wanted = next_one.detach() if detach else next_one
                losses.append(weight * mse_loss(mine.float(), wanted.float()))
    return losses


def parts_of(found: Features, count: int) -> list[Features]:
    """Return features that stand one below the other, as several."""
    columns = [[None] * count if part is None else part.chunk(count) for part in found.parts]
    return [found.with_parts(parts) for parts in zip(*columns, strict=True)]


def detached(found: Features) -> Features:
    """Return features without a gradient."""
    return found.each(Tensor.detach)
