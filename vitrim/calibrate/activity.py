"""How many hidden units of each MLP are active: what The Lazy Neuron Phenomenon (arXiv 2210.06313) counts.

A unit is active for a token where its activation is not zero; that says something of a ReLU. A GELU is hardly ever
exactly zero, so units above shares of the layer's own root mean square are counted beside it, and never called zero.
Counts are plain sums: how the images are split into batches plays no part.

Shapes: N tokens, H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrim.calibrate.model_view import LiveModelView
from vitrim.types import MlpSite

# Shares of the root mean square above which an activation counts.
THRESHOLDS = (0.01, 0.1, 1.0)
NUM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One MLP: shares of (token, unit) pairs that are active, and how often its units fire.

    `nonzero` counts activations that are not zero, `above` those above each share of the root mean square. `firing`
    counts units by how often they are nonzero, in tenths of all tokens; `silent` are those that never are.
    """

    path: str
    nonzero: float
    above: dict[float, float]
    firing: tuple[int, ...]
    silent: int


def measure_activity(
    model: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[Activity]:
    """Run images through a model and count, in two passes: the root mean square comes first.

    Args:
        model: run in eval mode; not changed.
        sites: the MLPs to look at.
        batches: preprocessed images (B, C, H, W).
        thresholds: shares of each layer's root mean square.

    Returns:
        One row a site, in their order.
    """
    bench = LiveModelView(model, sites, {}, batches, seed=0)
    outputs = [site.output for site in sites]
    squares = dict.fromkeys(outputs, 0.0)
    num_tokens = dict.fromkeys(outputs, 0)

    def add_squares(path: str, hidden: Tensor, _: Tensor) -> None:
        squares[path] += float(hidden.double().square().sum())
        num_tokens[path] += hidden.flatten(0, -2).shape[0]

    bench.observe(outputs, add_squares)
    counts: dict[str, list[Tensor]] = {}

    def count(path: str, hidden: Tensor, _: Tensor) -> None:
        sizes_NH = hidden.flatten(0, -2).abs()
        rms = (squares[path] / num_tokens[path] / sizes_NH.shape[1]) ** 0.5
        found = [(sizes_NH > share * rms).sum(0).cpu() for share in (0.0, *thresholds)]
        counts[path] = [a + b for a, b in zip(counts[path], found, strict=True)] if path in counts else found

    bench.observe(outputs, count)
    return [_row(site, counts[site.output], num_tokens[site.output], thresholds) for site in sites]


def _row(site: MlpSite, counts: Sequence[Tensor], num_tokens: int, thresholds: Sequence[float]) -> Activity:
    """Counts of one site as shares."""
    nonzero, *above = [float(count.sum()) / num_tokens / len(count) for count in counts]
    rates_H = counts[0].double() / num_tokens
    bins = (rates_H * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    return Activity(
        path=site.path,
        nonzero=nonzero,
        above=dict(zip(thresholds, above, strict=True)),
        firing=tuple(torch.bincount(bins, minlength=NUM_BINS).tolist()),
        silent=int((counts[0] == 0).sum()),
    )
