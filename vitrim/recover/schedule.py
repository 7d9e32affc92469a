"""When things happen in a long run: the rate and the decay at each step, and where Ctrl-C stops it."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def rate_shape(
    step: int, num_steps: int, warmup_ratio: float, *, floor: float = 0.0, drops: Sequence[float] = ()
) -> float:
    """Return the share of the peak rate at a step: linear warm-up in `warmup_ratio` of them, a cosine to `floor`.

    With `drops`, shares of the steps, there is no cosine: at each of them the rate falls to a tenth.
    """
    warmup = max(1, round(warmup_ratio * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    if drops:
        return max(floor, 0.1 ** sum(step >= share * num_steps for share in drops))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def cosine_between(start: float, end: float, share: float) -> float:
    """Interpolate from `start` to `end` along a cosine; `share` is the part of the way in 0..1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets, to be read between steps; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
