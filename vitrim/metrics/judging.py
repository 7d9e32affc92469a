"""Compares a student's features with its teacher's on held-out images: one relative error over all tokens.

The teacher's features are computed once and kept on the CPU. A student may be wrapped for training in a `FeatureModel`;
it is read through the wrapper then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrim.metrics.fidelity import TokenComparison, kinds
from vitrim.models.features import device_of, evaluating, features, kept_patches, kept_positions, same_patches
from vitrim.tokens import Features, Parts, features_of
from vitrim.types import FeaturesAt

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

    def forward(self, images_BCHW: Tensor) -> Parts:
        """Return pooled vector (B, D), patch tokens (B, N, D) or None, and those of further layers."""
        return features(self.model, images_BCHW, at=self.at).parts


def read_features(model: nn.Module, images_BCHW: Tensor, at: FeaturesAt) -> Features:
    """Return the features of a model, or of a `FeatureModel`, which reads them where it was told to."""
    if not isinstance(model, FeatureModel):
        return features(model, images_BCHW, at=at)
    return features_of(model(images_BCHW), token_positions=kept_patches(model.model))


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
    return found.each(lambda tensor: tensor.float().cpu())


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
            mine, theirs = kinds(found, pooled=True)[""], kinds(same_patches(target, found), pooled=True)[""]
            for (layer, one), (_, other) in zip(mine, theirs, strict=True):
                compared.update(one.cpu(), other, layer=layer)
    return compared.relative_error if math.isfinite(compared.relative_error) else math.inf
