"""The label-free loss of DGMR: mean squared error on the CLS or pooled vector plus that on patch tokens, 1:1."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from vitrim.models.taps import FeaturesAt, features
from vitrim.types import Features


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


def feature_loss(student: Features, teacher: Features) -> Tensor:
    """Mean squared error of the pooled vector plus that of the patch tokens; labels never enter.

    Paper: DGMR, arXiv 2506.08591, section 3; no normalisation, no temperature.
    """
    loss = mse_loss(student.pooled_BD.float(), teacher.pooled_BD.float())
    if student.patches_BND is not None and teacher.patches_BND is not None:
        loss = loss + mse_loss(student.patches_BND.float(), teacher.patches_BND.float())
    return loss
