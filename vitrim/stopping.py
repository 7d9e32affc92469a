"""Being asked to end: SIGTERM, which schedulers and `kill` send, is taken as Ctrl-C is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stoppable() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C in a `with` block or a decorated function, unless the program handles it by itself.

    So a state is kept wherever Ctrl-C keeps one. Where Ctrl-C is ignored, as in jobs that a shell put into the
    background, SIGTERM is not.
    """
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a process that was forked off ends as it would have
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(on_ctrl_c):
            raise KeyboardInterrupt
        on_ctrl_c(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
