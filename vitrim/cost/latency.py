"""Times models by turns (original, cut, original, cut, ...), so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import io
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import NotRequired

from vitrim.inputs import run_on
from vitrim.models.features import device_of, evaluating, inputs_for

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

LOG = logging.getLogger("vitrim")
BATCH_SIZES = (1, 8, 32)


class Latency(TypedDict):
    """Time of one forward pass over a batch, and the throughput that follows from the median.

    All but the first of several models have a `ratio` as well: their median over that of the first, and the quartiles
    of the ratios of the single rounds.
    """

    median_ms: float
    iqr_ms: float
    images_per_s: float
    rounds: int
    ratio: NotRequired[float]
    ratio_quartiles: NotRequired[list[float]]  # JSON knows no tuples


def measure_latency(
    models: Sequence[nn.Module],
    example: Tensor,
    *,
    batch_sizes: Iterable[int] = BATCH_SIZES,
    rounds: int = 20,
    min_seconds: float = 0.01,
    max_seconds: float = 60.0,
) -> list[dict[int, Latency]]:
    """Time forward passes of models by turns, after a warm-up, on all of torch's threads.

    Args:
        models: modules that take images, each timed where it is; the first is what the others are compared with.
        example: one image (1, C, H, W), or one row of token ids (1, N); it is repeated.
        batch_sizes: images per pass.
        rounds: how often each model has its turn.
        min_seconds: a turn is as many passes as this takes, one at least; a clock is too coarse for very short ones.
        max_seconds: a batch size of which all rounds would take longer is left out, and the log says so.

    Returns:
        For each model, by batch size: median and inter-quartile range in ms, and the ratio to the first.
    """
    found: list[dict[int, Latency]] = [{} for _ in models]
    with evaluating(*models):
        for size in batch_sizes:
            images = example.repeat(size, *[1] * (example.ndim - 1))
            passes = [_pass_of(model, images) for model in models]
            warm = [min(_timed(one, 1), _timed(one, 1)) for one in passes]  # allocator, kernel choice, clocks
            counts = [math.ceil(min_seconds / max(seconds, 1e-9)) or 1 for seconds in warm]
            needed = rounds * sum(count * seconds for count, seconds in zip(counts, warm, strict=True))
            if needed > max_seconds:
                LOG.info("latency at batch %d: not measured; %d rounds would take %.0f s.", size, rounds, needed)
                continue
            turns = [[_timed(*turn) for turn in zip(passes, counts, strict=True)] for _ in range(rounds)]
            for model, row in zip(found, _summed_up(turns, size), strict=True):
                model[size] = row
    return found


def _pass_of(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a function that runs a model once, to its end."""
    moved, device = inputs_for(model, images), device_of(model)

    def run() -> None:
        run_on(model, moved)
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    return run


def _timed(run: Callable[[], None], count: int) -> float:
    """Return the seconds of one of several passes."""
    started = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - started) / count


def _summed_up(turns: Sequence[Sequence[float]], size: int) -> list[Latency]:
    """Return one row for each model, from the seconds of each round."""
    rows: list[Latency] = []
    for times in zip(*turns, strict=True):
        median, (low, high) = statistics.median(times), _quartiles(times)
        row: Latency = {
            "median_ms": median * 1e3,
            "iqr_ms": (high - low) * 1e3,
            "images_per_s": size / median,
            "rounds": len(times),
        }
        if rows:
            ratios = [mine / first for mine, first in zip(times, (turn[0] for turn in turns), strict=True)]
            row["ratio"], row["ratio_quartiles"] = row["median_ms"] / rows[0]["median_ms"], [*_quartiles(ratios)]
        rows.append(row)
    return rows


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def import_timer() -> type[Timer]:
    """Return torch's timer. Importing it makes torch say on standard error that no CUDA was found, which is no news."""
    log = logging.getLogger("torch.utils.cpp_extension")  # before torch 2.7 it is printed
    disabled, log.disabled = log.disabled, True
    try:
        with redirect_stderr(io.StringIO()):
            from torch.utils.benchmark import Timer
    finally:
        log.disabled = disabled
    return Timer
