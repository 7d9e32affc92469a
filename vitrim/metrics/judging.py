"""Compares a student's features with its teacher's on held-out images: one relative error over all tokens.

The teacher's features are computed once and kept on the CPU. A student may be wrapped for training in a `FeatureModel`;
it is read through the wrapper then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrim.metrics.fidelity import TokenComparison
from vitrim.models.features import device_of, evaluating, features, kept_patches, kept_positions, same_patches
from vitrim.types import Features, FeaturesAt

# Batches of held-out images, each with the teacher's features on the CPU.
Judged = Sequence[tuple[Tensor, Features]]


class FeatureModel(nn.Module):
    """Wrapper whose forward returns a model's features, so that data-parallel wrappers see the call that trains it.

    Args:
        model: a vision encoder.
        at: where features are read.
    """

    def __init__(self, model: nn.Module, at: FeaturesAt) -> None:
        super().__init__()
        self.model = model
        self.at: FeaturesAt = at

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return pooled vector (B, D), and patch tokens (B, N, D) where the model has any."""
        found = features(self.model, images_BCHW, at=self.at)
        return found.pooled_BD, found.patches_BND


def read_features(model: nn.Module, images_BCHW: Tensor, at: FeaturesAt) -> Features:
    """Return the features of a model, or of a `FeatureModel`, which reads them where it was told to."""
    if not isinstance(model, FeatureModel):
        return features(model, images_BCHW, at=at)
    pooled_BD, patches_BND = model(images_BCHW)
    return Features(pooled_BD=pooled_BD, patches_BND=patches_BND, token_positions=kept_patches(model.model))


def kept_by(model: nn.Module, images_BCHW: Tensor) -> tuple[int, ...] | None:
    """Return which patches a model's features have, found out on one of some images; None for all."""
    if not kept_positions(model):
        return None
    with evaluating(model):
        return features(model, images_BCHW[:1].to(device_of(model))).token_positions


def features_on_cpu(model: nn.Module, images_BCHW: Tensor, at: FeaturesAt) -> Features:
    """Return a model's features of a batch, float32 on the CPU, to judge others by."""
    with torch.no_grad():
        found = features(model, images_BCHW.to(device_of(model)), at=at)
    patches = None if found.patches_BND is None else found.patches_BND.float().cpu()
    return replace(found, pooled_BD=found.pooled_BD.float().cpu(), patches_BND=patches)


def relative_error(student: nn.Module, judged: Judged, at: FeaturesAt) -> float:
    """Return the relative error of all features of a student against the teacher's; infinite where it is NaN.

    Args:
        student: a model or a `FeatureModel`.
        judged: images with the teacher's features, from `features_on_cpu`.
        at: where features are read.
    """
    compared = TokenComparison()
    with evaluating(student):
        for images, target in judged:
            found = read_features(student, images.to(device_of(student)), at)
            for mine, theirs in zip(_tensors(found), _tensors(same_patches(target, found)), strict=True):
                compared.update(mine.cpu(), theirs)
    return compared.relative_error if math.isfinite(compared.relative_error) else math.inf


def _tensors(found: Features) -> list[Tensor]:
    """Return the tensors that features hold."""
    return [found.pooled_BD] + ([] if found.patches_BND is None else [found.patches_BND])
