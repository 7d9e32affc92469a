"""When things happen in a long run: the rates to try, the rate and decay at each step, and where Ctrl-C may stop it."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitrim.config.options import RecoverOptions

# Rates of the range test, from the paper's own scale down; a repaired student wants the low end.
RATES = (2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5)
# LoRA's factors stand about 25 times the rate that the weights themselves do; what emits OP-LoRA's does not.
LORA_RATES = (2e-2, 1e-2, 5e-3, *RATES)


def rates_to_try(options: RecoverOptions) -> tuple[float, ...]:
    """The rates of the range test, falling, by what trains."""
    return LORA_RATES if options.adapter is not None and options.adapter.kind == "lora" else RATES


def rate_shape(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak rate at a step: linear warm-up, then cosine to zero."""
    warmup = max(1, round(warmup_ratio * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def cosine_between(start: float, end: float, share: float) -> float:
    """Cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that is read between steps; a second one interrupts at once."""
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
