"""Limits that a comparison of two models must keep, so that a build of somebody's models can fail on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from vitrim.errors import DataError, RecipeError

# Of the small model, as they are: cosines and shares, 0..1.
FIDELITY = (
    "cosine",
    "pooled_cosine",
    "patches_cosine",
    "top1_agreement",
    *(f"{kind}recall@{k}" for kind in ("", "old_index_") for k in (1, 5, 10)),
)
# Small less original, in points of percent: limits are mostly negative.
SCORES = ("top1", "knn", "linear_probe", "pck@0.2", "oks_ap")


def parse_limits(given: Iterable[str]) -> dict[str, float]:
    """Read limits: NAME=VALUE, or VALUE alone, which is one on `cosine`.

    Raises:
        RecipeError: a name is none of those that can be limited, or a value is no number.
    """
    limits: dict[str, float] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        name = name if equals else "cosine"
        if name not in (*FIDELITY, *SCORES):
            raise RecipeError(f"fail-under: {name!r} can't be limited; use one of {', '.join((*FIDELITY, *SCORES))}.")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not math.isfinite(limits[name]):
            raise RecipeError(f"fail-under: {text!r} has no number; write NAME=VALUE, such as recall@1=0.9.")
        most = 100 if name in SCORES else 1
        if abs(limits[name]) > most:
            raise RecipeError(f"fail-under: {text!r} can't be met; {name} is within {-most}..{most}.")
    return limits


def below_limits(
    limits: Mapping[str, float],
    fidelity: Mapping[str, float],
    scores: Mapping[str, float],
    original: Mapping[str, float],
) -> list[str]:
    """Say of each limit that is not kept what was measured.

    Args:
        limits: smallest values by name, of FIDELITY as they are, of SCORES as the difference small less original.
        fidelity: how close the small model is.
        scores: the small model's scores, in percent.
        original: those of the model that it is compared with.

    Raises:
        DataError: something limited was not measured.
    """
    found = {**fidelity, **{name: scores[name] - original[name] for name in SCORES if name in scores}}
    missing = [name for name in limits if name not in found]
    if missing:
        raise DataError(
            f"fail-under: {', '.join(missing)} was not measured; recall and agreement need 50 images, scores need "
            "labels, top1 a head for them, old_index_recall an old index."
        )
    words = {name: f"{name} of small less original" if name in SCORES else name for name in limits}
    return [
        f"{words[name]} is {found[name]:.6g}, below {limit:g}" for name, limit in limits.items() if found[name] < limit
    ]
