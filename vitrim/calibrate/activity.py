"""Count how many hidden units of each MLP are active, as The Lazy Neuron Phenomenon (arXiv 2210.06313) does.

A unit is active for a token if its activation is not zero, which is meaningful for a ReLU. A GELU is hardly ever
exactly
zero, so units above shares of the layer's root mean square are counted as well, and reported separately. Counts are
plain sums: how the images are split into batches does not matter.

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
    """One MLP: shares of (token, unit) pairs that are active, and how often its units are.

    `nonzero` is the share of activations that are not zero, `above` the share above each multiple of the root mean
    square.
    `firing` counts units by how often they are nonzero, in tenths of all tokens; `silent` is the number that never are.
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
    """Run images through a model twice and count active units: the first pass finds the root mean squares.

    Args:
        model: the model; it runs in eval mode and is not changed.
        sites: the MLPs to count in.
        batches: preprocessed images (B, C, H, W).
        thresholds: multiples of each layer's root mean square above which an activation counts.

    Returns:
        One entry per site, in the order of `sites`.
    """
    view = LiveModelView(model, sites, {}, batches, seed=0)
    outputs = [site.output for site in sites]
    squares = dict.fromkeys(outputs, 0.0)
    num_tokens = dict.fromkeys(outputs, 0)

    def add_squares(path: str, hidden: Tensor, _: Tensor) -> None:
        squares[path] += float(hidden.double().square().sum())
        num_tokens[path] += hidden.flatten(0, -2).shape[0]

    view.observe(outputs, add_squares)
    counts: dict[str, list[Tensor]] = {}

    def count(path: str, hidden: Tensor, _: Tensor) -> None:
        sizes_NH = hidden.flatten(0, -2).abs()
        rms = (squares[path] / num_tokens[path] / sizes_NH.shape[1]) ** 0.5
        found = [(sizes_NH > share * rms).sum(0).cpu() for share in (0.0, *thresholds)]
        counts[path] = [a + b for a, b in zip(counts[path], found, strict=True)] if path in counts else found

    view.observe(outputs, count)
    return [_row(site, counts[site.output], num_tokens[site.output], thresholds) for site in sites]


def _row(site: MlpSite, counts: Sequence[Tensor], num_tokens: int, thresholds: Sequence[float]) -> Activity:
    """Turn the counts of one site into shares."""
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
