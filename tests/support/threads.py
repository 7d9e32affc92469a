"""Threads that share images as processes do: quicker to start, with sums in the order of their numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier, BrokenBarrierError
from typing import Any

import torch
from torch import Tensor

from vitrim.share import ALONE, Share, T


@dataclass
class Meeting:
    """Where threads exchange values."""

    num: int
    slots: list[Any] = field(init=False)
    barrier: Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.slots, self.barrier = [None] * self.num, Barrier(self.num, timeout=60)

    def __deepcopy__(self, _: object) -> Meeting:
        return self

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = copy.deepcopy(value)
        self.barrier.wait()
        every = copy.deepcopy(self.slots)
        self.barrier.wait()
        return every


@dataclass(frozen=True, kw_only=True)
class ThreadShare(Share):
    meeting: Meeting

    def on_main(self, work: Callable[[], T]) -> T:
        return self.gathered(work() if self.rank == 0 else None)[0]

    def gathered(self, value: T) -> list[T]:
        return self.meeting.exchange(self.rank, value)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            every = self.gathered(tensor.detach().clone())
            with torch.no_grad():
                tensor.copy_(sum(every[1:], every[0]))

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.sum_([tensor])
            tensor /= self.num

    def give_(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            with torch.no_grad():
                tensor.copy_(self.gathered(tensor.detach().clone())[0])

    def total(self, value: float) -> float:
        return sum(self.gathered(value))


def in_threads(num: int, work: Callable[[Share], T]) -> list[T]:
    """Return what work comes to in each of so many threads."""
    if num == 1:
        return [work(ALONE)]
    meeting = Meeting(num)

    def run(rank: int) -> T:
        try:
            return work(ThreadShare(rank=rank, num=num, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(num) as pool:
        waiting = [pool.submit(run, rank) for rank in range(num)]
    failed = [each.exception() for each in waiting if each.exception() is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error
    return [each.result() for each in waiting]
