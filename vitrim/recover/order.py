"""Which images each step and each process sees: a function of seed and step alone, for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.data import ImageSet, collate
from vitrim.recipe import RecoverOptions


class MicroBatch(NamedTuple):
    """Images that could be read, (B, C, H, W), with their numbers in the training set, and the epoch of the draw."""

    images_BCHW: Tensor
    rows_B: Tensor
    epoch: int


class Order:
    """The order of images: shuffled anew each epoch, dealt out to processes, cut into micro-batches."""

    def __init__(
        self, images: ImageSet, options: RecoverOptions, seed: int, *, rank: int = 0, num_processes: int = 1
    ) -> None:
        self.images, self.options, self.seed = images, options, seed
        self.rank, self.num_processes = rank, num_processes
        self.global_batch = min(len(images), options.batch_size * options.accumulate)
        self.steps_per_epoch = max(1, len(images) // self.global_batch)

    def steps(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """This process's images for steps `first`..`last`, a list of micro-batches each."""
        micro = max(1, math.ceil(self.global_batch / self.options.accumulate / self.num_processes))
        step = first
        while step < last:
            epoch, offset = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.images), generator=generator).tolist()
            stop = min(self.steps_per_epoch, offset + last - step)
            parts = [
                order[i * self.global_batch : (i + 1) * self.global_batch][self.rank :: self.num_processes]
                for i in range(offset, stop)
            ]
            flat = [part[i : i + micro] for part in parts for i in range(0, len(part), micro)]
            loader = self._load(flat, epoch)
            for part in parts:
                yield [next(loader) for _ in range(math.ceil(len(part) / micro))]
            step += len(parts)

    def _load(self, micro_batches: Sequence[Sequence[int]], epoch: int) -> Iterator[MicroBatch]:
        """Images of given lists of numbers."""
        from torch.utils.data import DataLoader

        self.images.set_epoch(epoch)
        loader = DataLoader(
            self.images,
            batch_sampler=list(micro_batches),  # type: ignore[arg-type]
            num_workers=self.options.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),  # workers' base seed; items draw from their own
        )
        for rows, batch in zip(micro_batches, loader, strict=True):
            yield MicroBatch(batch.images_BCHW, torch.tensor(rows, dtype=torch.int64)[batch.places_B], epoch)
