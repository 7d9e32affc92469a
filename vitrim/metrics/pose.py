"""How well joints are found: PCK of any, and OKS AP of persons whose annotators' spread is known (COCO's).

Shapes: N persons, K joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.errors import DataError
from vitrim.metrics.outputs import images_and_labels
from vitrim.models.features import device_of, evaluating
from vitrim.models.joints import JointLayout, layout_of
from vitrim.models.pose import predict_joints

OKS_LEVELS = torch.linspace(0.5, 0.95, 10)


def pose_scores(model: nn.Module, batches: Sequence[Any], *, flip: bool = True) -> dict[str, float]:
    """Return in percent `pck@0.2` of a pose model, and `oks_ap` where joints have a known spread and persons a size.

    Args:
        model: a model that gives heatmaps.
        batches: images and joints (B, K, 4), as `PoseSet.batches` has them.
        flip: read the mean of each image and its mirror image.

    Raises:
        DataError: no person has a torso that is known.
    """
    found, joints = [], []
    with evaluating(model):
        for images_BCHW, joints_BK4 in images_and_labels(batches):
            found.append(predict_joints(model, images_BCHW.to(device_of(model)), flip=flip).cpu())
            joints.append(joints_BK4)
    found_NK3, joints_NK4 = torch.cat(found), torch.cat(joints)
    layout = layout_of(joints_NK4.shape[1], "joints")
    scores = {"pck@0.2": pck(found_NK3, joints_NK4, layout)}
    if layout.sigmas and bool((joints_NK4[..., 3] > 0).all()):
        scores["oks_ap"] = oks_ap(found_NK3, joints_NK4, layout)
    return scores


def pck(found_NK3: Tensor, joints_NK4: Tensor, layout: JointLayout, *, share: float = 0.2) -> float:
    """Return the percentage of known joints that are found within a share of the torso's diagonal.

    Raises:
        DataError: no person has a torso that is known.
    """
    first, second = layout.torso
    known_NK = joints_NK4[..., 2] > 0
    torso_N = (joints_NK4[:, first, :2] - joints_NK4[:, second, :2]).norm(dim=-1)
    measured_NK = known_NK & (known_NK[:, first] & known_NK[:, second] & (torso_N > 0))[:, None]
    if not measured_NK.any():
        raise DataError("pck: no person has a torso that is known; use pictures with shoulders and hips.")
    distance_NK = (found_NK3[..., :2] - joints_NK4[..., :2]).norm(dim=-1)
    return 100 * float((distance_NK <= share * torso_N[:, None])[measured_NK].double().mean())


def oks_ap(found_NK3: Tensor, joints_NK4: Tensor, layout: JointLayout) -> float:
    """Return the mean average precision, in percent, over similarities of 0.5 to 0.95 (OKS).

    Each prediction stands for the person in whose box it was made, and predictions are ranked by the mean height of
    their peaks, as where boxes are given.
    """
    variances_K = (2 * torch.tensor(layout.sigmas)).square()
    squared_NK = (found_NK3[..., :2] - joints_NK4[..., :2]).square().sum(-1)
    similar_NK = torch.exp(-squared_NK / (2 * joints_NK4[..., 3].square() * variances_K))
    known_NK = joints_NK4[..., 2] > 0
    oks_N = (similar_NK * known_NK).sum(1) / known_NK.sum(1).clamp(min=1)
    order = found_NK3[..., 2].mean(1).argsort(descending=True, stable=True)
    right_LN = (oks_N[order] >= OKS_LEVELS[:, None]).double()
    hits_LN = right_LN.cumsum(1)
    precision_LN = hits_LN / torch.arange(1, len(order) + 1)
    best_LN = precision_LN.flip(1).cummax(1).values.flip(1)  # at this recall or a higher one
    recall_LN = hits_LN / len(order)
    levels_R = torch.linspace(0, 1, 101, dtype=torch.float64)
    place_LR = torch.searchsorted(recall_LN.contiguous(), levels_R.expand(len(recall_LN), -1).contiguous())
    padded = torch.cat([best_LN, best_LN.new_zeros(len(best_LN), 1)], dim=1)
    return 100 * float(padded.gather(1, place_LR).mean())
