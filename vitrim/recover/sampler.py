"""Deals out the images of each step to each process: a function of seed and step alone, for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.config.options import RecoverOptions
from vitrim.data import Batch, Draw, ImageSet, ImageStream, Record, collate
from vitrim.errors import RecipeError


class MicroBatch(NamedTuple):
    """Images of one forward pass that could be read.

    Attributes:
        images_BCHW: the images.
        rows_B: their numbers in the training set; in a stream their positions in the run, since images have no numbers.
        epoch: the pass over the training set; 0 in a stream.
        labels_B: their class numbers, -1 where there is none.
    """

    images_BCHW: Tensor
    rows_B: Tensor
    epoch: int
    labels_B: Tensor


class Sampler:
    """Order of a set of images: shuffled anew each epoch, dealt out to processes, cut into micro-batches.

    Args:
        images: the training set.
        options: batch size, accumulation, views and workers.
        seed: of the order.
        rank: number of this process.
        num_processes: how many share each step.
    """

    def __init__(
        self, images: ImageSet, options: RecoverOptions, seed: int, *, rank: int = 0, num_processes: int = 1
    ) -> None:
        self.images, self.options, self.seed = images, options, seed
        self.rank, self.num_processes = rank, num_processes
        self.unreadable: set[int] = set()
        self.global_batch = min(len(images), options.batch_size * options.gradient_accumulation_steps)
        self.steps_per_epoch = max(1, len(images) // self.global_batch)

    def steps(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """Yield this process's micro-batches of each step from `first` up to `last`, as many for every process."""
        share = math.ceil(self.global_batch / self.num_processes)
        micro = math.ceil(share / self.options.gradient_accumulation_steps)
        num_micro = math.ceil(share / micro)
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
            flat = [part[i * micro : (i + 1) * micro] for part in parts for i in range(num_micro)]
            loader = self._load(flat, epoch)
            for _ in parts:
                yield [next(loader) for _ in range(num_micro)]
            step += len(parts)

    def _load(self, micro_batches: Sequence[Sequence[int]], epoch: int) -> Iterator[MicroBatch]:
        """Yield the images with these numbers, micro-batch after micro-batch."""
        from torch.utils.data import DataLoader

        self.images.set_epoch(self.options.view_of(epoch))
        loader = DataLoader(
            self.images,
            batch_sampler=list(micro_batches),  # type: ignore[arg-type]
            num_workers=self.options.num_workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),  # workers' base seed; items draw from their own
        )
        for rows, batch in zip(micro_batches, loader, strict=True):
            self.unreadable |= set(rows) - {rows[place] for place in batch.places_B.tolist()}
            numbers_B = torch.tensor(rows, dtype=torch.int64)[batch.places_B]
            yield MicroBatch(batch.images_BCHW, numbers_B, epoch, batch.labels_B)


class StreamSampler:
    """Order of a stream: position p of the run is the next image of lane p modulo the number of lanes.

    Step s trains the positions s * B up to (s + 1) * B, for any number of processes. Process r of W decodes those with
    p = r modulo W, and reads the lanes they fall on: each shard is read by one process where W divides the number of
    lanes, by W / lanes of them where it is a multiple, and by all where the two have no common divisor.

    Args are those of `Sampler`.

    Raises:
        RecipeError: an option does not work with a stream.
    """

    def __init__(
        self, images: ImageStream, options: RecoverOptions, seed: int, *, rank: int = 0, num_processes: int = 1
    ) -> None:
        check_stream(images, options)
        self.images, self.options, self.seed = images, options, seed
        self.rank, self.num_processes = rank, num_processes
        self.global_batch = options.batch_size * options.gradient_accumulation_steps
        self.steps_per_epoch = max(1, (options.epoch_images or 0) // self.global_batch)
        # Of a stream with too few shards for all lanes, the largest number that still divides the one asked for.
        asked = options.stream_lanes
        self.num_lanes = max(n for n in range(1, asked + 1) if asked % n == 0 and n <= images.num_shards)
        self.unreadable: set[tuple[int, int]] = set()

    def steps(self, first: int, last: int) -> Iterator[list[MicroBatch]]:
        """Yield this process's micro-batches of each step from `first` up to `last`, as many for every process."""
        loaded = self.images.load(self._draws(first, last), num_workers=self.options.num_workers)
        for _ in range(first, last):
            yield [self._micro_batch(*next(loaded)) for _ in range(self.options.gradient_accumulation_steps)]

    def _draws(self, first: int, last: int) -> Iterator[list[Draw]]:
        """Yield this process's share of each micro-batch, not decoded; lanes without a share in it are not read."""
        common = math.gcd(self.num_lanes, self.num_processes)
        mine = range(self.rank % common, self.num_lanes, common)
        lanes = {lane: self._lane(lane, first * self.global_batch) for lane in mine}
        for step in range(
            first * self.options.gradient_accumulation_steps, last * self.options.gradient_accumulation_steps
        ):
            drawn = []
            for position in range(step * self.options.batch_size, (step + 1) * self.options.batch_size):
                if position % self.num_lanes in lanes:
                    record = next(lanes[position % self.num_lanes])
                    drawn += [(position, record)] if position % self.num_processes == self.rank else []
            yield drawn

    def _lane(self, lane: int, start: int) -> Iterator[Record]:
        """Yield a lane from the first position not below `start`."""
        return self.images.lane(
            lane,
            num_lanes=self.num_lanes,
            window=max(1, self.options.shuffle_buffer // self.num_lanes),
            seed=self.seed,
            first=len(range(lane, start, self.num_lanes)),
        )

    def _micro_batch(self, drawn: Sequence[Draw], batch: Batch) -> MicroBatch:
        read = set(batch.places_B.tolist())
        self.unreadable |= {record.place for at, (_, record) in enumerate(drawn) if at not in read}
        positions = torch.tensor([position for position, _ in drawn], dtype=torch.int64)
        return MicroBatch(batch.images_BCHW, positions[batch.places_B], 0, batch.labels_B)


def check_stream(images: ImageStream, options: RecoverOptions) -> None:
    """Refuse options that don't work with a stream.

    Raises:
        RecipeError: the length is given in epochs and an epoch has no length, or a cache of the teacher's features is
            asked for, although no image comes again.
    """
    if options.steps is None and options.epoch_images is None:
        raise RecipeError(
            f"recover.epochs: {images.name} is a stream of unknown length; give recover.steps, "
            "or recover.epoch_images as the length of an epoch."
        )
    if options.cache_teacher is not None:
        raise RecipeError(
            f"recover.cache_teacher: {images.name} is a stream, larger than what a cache should hold; drop the option, "
            "or bring the images to a disk."
        )


def open_sampler(
    images: ImageSet | ImageStream, options: RecoverOptions, seed: int, *, rank: int = 0, num_processes: int = 1
) -> Sampler | StreamSampler:
    """Return the sampler for a set or a stream of images; see `Sampler` and `StreamSampler`."""
    kind = StreamSampler if isinstance(images, ImageStream) else Sampler
    return kind(images, options, seed, rank=rank, num_processes=num_processes)  # type: ignore[arg-type]
