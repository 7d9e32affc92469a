"""Judges a student by the features of its teacher: both read alike, and one relative error over all tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrim.metrics.fidelity import TokenComparison
from vitrim.models.features import device_of, evaluating, features
from vitrim.types import Features, FeaturesAt

# Images that judge a student, batch by batch, each with the teacher's features of it on the CPU.
Judged = Sequence[tuple[Tensor, Features]]


class FeatureModel(nn.Module):
    """A model whose forward returns its features, so that data-parallel wrappers see the call that trains it."""

    def __init__(self, model: nn.Module, at: FeaturesAt) -> None:
        super().__init__()
        self.model = model
        self.at: FeaturesAt = at

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pooled vector and patch tokens."""
        found = features(self.model, images_BCHW, at=self.at)
        return found.pooled_BD, found.patches_BND


def read(model: nn.Module, images_BCHW: Tensor, at: FeaturesAt) -> Features:
    """Features of a model, or of one that gives nothing else because it is wrapped for training."""
    if not isinstance(model, FeatureModel):
        return features(model, images_BCHW, at=at)
    pooled_BD, patches_BND = model(images_BCHW)
    return Features(pooled_BD=pooled_BD, patches_BND=patches_BND)


def relative_error(student: nn.Module, judged: Judged, at: FeaturesAt) -> float:
    """Relative error of all features of a student against the teacher's; infinite where it is no number."""
    compared = TokenComparison()
    with evaluating(student):
        for images, target in judged:
            found = read(student, images.to(device_of(student)), at)
            for mine, theirs in zip(_parts(found), _parts(target), strict=True):
                compared.update(mine.cpu(), theirs)
    return compared.relative_error if math.isfinite(compared.relative_error) else math.inf


def _parts(found: Features) -> list[Tensor]:
    """The tensors that features hold."""
    return [found.pooled_BD] + ([] if found.patches_BND is None else [found.patches_BND])


def features_on_cpu(model: nn.Module, images: Tensor, at: FeaturesAt) -> Features:
    """A model's features of a batch, float32 on the CPU."""
    with torch.no_grad():
        found = features(model, images.to(device_of(model)), at=at)
    patches = None if found.patches_BND is None else found.patches_BND.float().cpu()
    return Features(pooled_BD=found.pooled_BD.float().cpu(), patches_BND=patches)
