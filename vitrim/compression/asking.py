"""What a method is shown of an MLP or attention, and asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, final_metrics, num_held_out
from vitrim.methods import Method, SiteMethod
from vitrim.surgery import KeepUnits
from vitrim.types import AttentionSite, MlpSite, MlpWeights, SiteView


def metrics_for(
    method: Method, teacher: nn.Module, sites: Sequence[MlpSite | AttentionSite], batches: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Return the metrics on these outputs, by path of a projection, if the method weighs by them."""
    if batches is None or not (isinstance(method, SiteMethod) and method.weighs_by_features()):
        return {}
    fitted = batches[: max(1, len(batches) - num_held_out(batches))]
    return final_metrics(teacher, [site.output for site in sites], fitted)


def select(
    weights: MlpWeights, site: MlpSite, visit: SiteVisit | None, width: int, method: SiteMethod, seed: int
) -> KeepUnits:
    """Ask a method which units of an MLP to keep, and return the cut."""
    view = SiteView(
        site=site,
        weights=weights,
        num_keep=width,
        generator=torch.Generator().manual_seed(seed),
        stats=None if visit is None else visit.stats,
        scale_D=None if visit is None else visit.scale_D,
        metric_DD=None if visit is None else visit.metric_DD,
    )
    return KeepUnits(site=site, keep=tuple(int(i) for i in method.select(view)))
