"""Progress of long work: a bar on a terminal, plain lines anywhere else, always on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class Counted(Protocol[Item]):
    """What can be run through and tells how many items there are."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Item]: ...


# Seconds between plain lines where there is no terminal.
PLAIN_INTERVAL_S = 10.0


class Progress:
    """A count of finished work with a few words beside it. This base class shows nothing."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.words = title, total, 0, ""
        self.started = time.monotonic()

    def advance(self, num_done: int = 1, words: str = "") -> None:
        """Count work as done, and change the words if given."""
        self.done += num_done
        self.words = words or self.words
        self.show()

    def say(self, words: str) -> None:
        """Change the words and show them at once, in front of work that can't be counted."""
        self.words = words
        self.show()

    def track(self, items: Counted[T], words: str) -> Iterator[T]:
        """Yield items as a part of the work with its own count and time left; inside another part only yield them."""
        if self.total:
            yield from items
            return
        outer = self.done, self.started, self.words
        self.total, self.done, self.started, self.words = len(items), 0, time.monotonic(), words
        try:
            for item in items:
                yield item
                self.advance()
        finally:
            self.total, (self.done, self.started, self.words) = 0, outer

    def show(self) -> None:
        """Update the display; the base class has none."""


class _Plain(Progress):
    """Prints a line every PLAIN_INTERVAL_S seconds, and one at the end."""

    last = 0.0

    def say(self, words: str) -> None:
        self.last = 0.0
        super().say(words)

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last < PLAIN_INTERVAL_S and (self.done < self.total or not self.total):
            return
        self.last, spent = now, now - self.started
        left = f", {spent / self.done * (self.total - self.done):.0f} s left" if 0 < self.done < self.total else ""
        words = f" {self.words}" if self.words else ""
        of = f"/{self.total}" if self.total else ""
        count = f" {self.done}{of}{left}" if self.done or self.total else ""
        print(f"{self.title}:{count}{words}", file=sys.stderr, flush=True)


class _Bar(Progress):
    """Shows a rich bar with the time left."""

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        super().__init__(title, total)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Bars(*columns, TextColumn("{task.fields[words]}"), console=Console(stderr=True))
        self.task = self.bars.add_task(title, total=total or None, words="")

    def show(self) -> None:
        self.bars.update(self.task, total=self.total or None, completed=self.done, words=self.words)


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Progress]:
    """Show progress while a block runs, and yield the `Progress` to advance.

    Args:
        title: what is being done, in a word or two.
        total: units of work; 0 if unknown.
        quiet: show nothing.
    """
    if quiet:
        yield Progress(title, total)
    elif sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        bar = _Bar(title, total)
        with bar.bars:
            yield bar
    else:
        yield _Plain(title, total)
