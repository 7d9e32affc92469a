"""Says what more images would bring: the closed form from part of the images beside that from all, on held-out tokens.

The error of a fit on n images falls as what no fit can reach plus a share of 1/n, so two sizes tell of a third.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit
from vitrim.calibrate.walk import num_in_half
from vitrim.surgery import hidden_and_output

# Of an MLP's errors: what tokens cost that were held out, and what there was to say.
ALL, HALF, ENERGY = "held_out_all", "held_out_half", "held_out_energy"
# Tokens to judge on at most; both fits see the same, so their ratio is far better known than either.
MOST_TOKENS = 8192
# A gain at each MLP below this share of its error is not worth as many images again. Gains add up from block to block:
# 2.2, 1.4 and 0.6% foretold for a CIFAR-10 ViT at 200, 400 and 800 images were 8, 6 and 3% of the whole's error.
WORTH = 0.01


@torch.no_grad()
def judged_halves(student: nn.Module, visit: SiteVisit, half: tuple[Tensor, Tensor | None]) -> dict[str, float]:
    """Return the squared errors of a held-out token by two fits of an MLP's output, and the energy of the targets.

    Args:
        student: its MLP is cut, and has the fit on all images.
        visit: the MLP with its held-out tokens.
        half: weight (D, K) and bias of the fit on half of the images.
    """
    weight_DK, bias_D = half
    tokens, share, device = visit.held_out.thinned(MOST_TOKENS), visit.share, weight_DK.device
    scale_D = 1.0 if visit.scale_D is None else visit.scale_D.to(device)
    mean_D = torch.zeros(len(weight_DK), dtype=weight_DK.dtype, device=device)
    for lane in tokens.lanes:
        mean_D += lane.targets_ND.to(mean_D).sum(0)
    share.sum_([mean_D])
    mean_D /= tokens.num_all
    total = {ALL: 0.0, HALF: 0.0, ENERGY: 0.0}
    for lane in tokens.lanes:
        hidden_NK, output_ND = hidden_and_output(student, visit.site, lane.inputs_ND.to(device))
        other_ND = hidden_NK @ weight_DK.to(hidden_NK).T + (0.0 if bias_D is None else bias_D.to(hidden_NK))
        targets_ND = lane.targets_ND.to(device)
        found = {ALL: output_ND - targets_ND, HALF: other_ND - targets_ND, ENERGY: targets_ND - mean_D}
        for name, each in found.items():
            total[name] += float((each * scale_D).square().sum())
    return {name: share.total(value) / tokens.num_all for name, value in total.items()}


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Mean relative error of the closed form of MLPs on held-out calibration images, by images that it was fitted on.

    Attributes:
        num_mlps: MLPs behind the means.
        num_images: images that the closed form was fitted on, and `error` of that.
        num_half: images of the smaller fit, and `error_of_half`.
        num_held_out: calibration images that judged both.
        error_of_twice: what the two lead to expect of twice as many images.
    """

    num_mlps: int
    num_images: int
    error: float
    num_half: int
    error_of_half: float
    num_held_out: int
    error_of_twice: float

    @property
    def note(self) -> str | None:
        """A sentence where more images would help."""
        if self.error_of_twice > (1 - WORTH) * self.error:
            return None
        return (
            f"more images would help: on held-out images the closed form's relative error at an MLP is "
            f"{self.error_of_half:.3g} where {self.num_half:,} images were fitted and {self.error:.3g} where "
            f"{self.num_images:,} were, so about {self.error_of_twice:.3g} where {2 * self.num_images:,} are (mean of "
            f"{self.num_mlps} MLPs, {self.num_held_out:,} images); the whole model's error falls by more."
        )

    def describe(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return asdict(self)


def learning_curve(
    errors: Mapping[str, Mapping[str, float]], batches: Sequence[Tensor], *, num_held_out: int, num_views: int = 1
) -> Learning | None:
    """Put together what MLPs' errors say of more images; None where no MLP was fitted on half of them.

    Args:
        errors: of the cut, by path of an MLP.
        batches: calibration images and their views, of which the last `num_held_out` batches judged.
        num_held_out: number of these batches.
        num_views: views of each image, itself included.
    """
    rows = [row for row in errors.values() if HALF in row and row[ENERGY] > 0]
    if not rows:
        return None
    num_fit = len(batches) - num_held_out
    half, fitted, judged = (
        sum(map(len, part)) // num_views
        for part in (batches[: num_in_half(num_fit)], batches[:num_fit], batches[num_fit:])
    )
    error, of_half = (sum(row[key] / row[ENERGY] for row in rows) / len(rows) for key in (ALL, HALF))
    fall = (of_half - error) / (1 / half - 1 / fitted)  # of the error with 1/n
    return Learning(
        num_mlps=len(rows),
        num_images=fitted,
        error=error,
        num_half=half,
        error_of_half=of_half,
        num_held_out=judged,
        error_of_twice=min(error, max(0.0, error - fall / (2 * fitted))),
    )
