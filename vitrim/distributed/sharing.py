"""Images shared by the processes of a run: what `vitrim.share.Share` says, by talks between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vitrim.distributed.processes import broadcast_, gathered, mean_, num_processes, on_main, rank, sum_
from vitrim.share import ALONE, Share, T


def shared_on(device: torch.device) -> Share:
    """Return this process's share of a run's images; `device` is where it gets what the main one computes."""
    return _Shared(rank=rank(), num=num_processes(), device=device) if num_processes() > 1 else ALONE


@dataclass(frozen=True, kw_only=True)
class _Shared(Share):
    """A share among several processes.

    Sums do not depend on which process comes first: gloo and NCCL add in an order that follows from the processes'
    numbers and a tensor's size, and each sum is made once and sent to all.
    """

    device: torch.device

    def on_main(self, work: Callable[[], T]) -> T:
        found = on_main(lambda: tree_map_only(Tensor, lambda tensor: tensor.cpu(), work()))
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), found)

    def gathered(self, value: T) -> list[T]:
        return gathered(value)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        sum_(tensors)

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        mean_(tensors)

    def give_(self, tensors: Iterable[Tensor]) -> None:
        broadcast_(tensors)

    def total(self, value: float) -> float:
        summed = torch.tensor(value, dtype=torch.float64)
        sum_([summed])
        return float(summed)
