"""One process's part of the images of a run, and how it agrees with the others; a single process has them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Batches are dealt into so many lanes, and a lane is never split: what is added up lane by lane comes out with the same
# bits for any number of processes up to this.
LANES = 8


@dataclass(frozen=True, kw_only=True)
class Share:
    """Place of a process among those that share images. Alone, as here, it has them all and talks to nobody.

    `distributed.sharing` makes one that talks: then all processes call the same methods in the same order.
    """

    rank: int = 0
    num: int = 1

    def own(self, numbers: Sequence[T]) -> Sequence[T]:
        """Return this process's part of what is shared: every `num`-th, so that the main one has the first."""
        return numbers[self.rank :: self.num]

    def batches(self, count: int) -> list[int]:
        """Return the numbers of this process's batches of so many: whole lanes, as long as there are enough of them."""
        return [index for index in range(count) if (index % max(LANES, self.num)) % self.num == self.rank]

    def on_main(self, work: Callable[[], T]) -> T:
        """Return on every process what the main one's `work` returns; nobody else calls it."""
        return work()

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        return [value]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, the same bits on each."""

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their means over all processes."""

    def give_(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the main process's values."""

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        return value


ALONE = Share()
