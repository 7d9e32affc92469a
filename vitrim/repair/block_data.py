"""Gives each block of a student its task: inputs and targets from activations on disk, and its error on them.

Images are decoded once. Only the activations of the current block are on disk; of its batches, three at a time are in
memory: one that is worked on, one that is done, one that is being read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vitrim.calibrate import layer_scale
from vitrim.calibrate.activations import Activations, Store, activation_bytes, first_tensor, forward_order, observe
from vitrim.calibrate.walk import corrected, stands_alone
from vitrim.config.options import BlockwiseOptions
from vitrim.data import ImageSet
from vitrim.errors import DataError
from vitrim.models.features import device_of, kept_positions
from vitrim.share import Share
from vitrim.surgery import mlp_output, submodule
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """Task of a block: the batches to learn from, and how its output follows from an input.

    Attributes:
        read: gives inputs and target of a batch, by its number.
        predict: gives the block's output for an input.
        fit: numbers of the batches to learn from.
        held_out: numbers of the batches that judge.
        device: where the student is.
        share: which part of all batches this process has.
        scale_D: layer scale behind an MLP that is trained outside its block; 1 for none.
    """

    read: Callable[[int], tuple[Any, Tensor]]
    predict: Callable[[Any], Tensor]
    fit: Sequence[int]
    held_out: Sequence[int]
    device: torch.device
    share: Share
    scale_D: Tensor | float = 1.0

    def losses(self, seed: int) -> Generator[Tensor, None, None]:
        """Yield the mean squared error of a token, batch after batch in a random order, without end."""
        generator = torch.Generator().manual_seed(seed)
        orders = (torch.randperm(len(self.fit), generator=generator).tolist() for _ in repeat(None))
        for batch in read_ahead(self.read, (self.fit[i] for order in orders for i in order)):
            yield self._errors(batch).mean()

    def judge(self) -> float:
        """Return the mean squared error of a token on the held-out batches of all processes that share the images."""
        total, num_tokens = 0.0, 0.0
        for batch in read_ahead(self.read, self.held_out):
            errors = self._errors(batch)
            total, num_tokens = total + float(errors.double().sum()), num_tokens + errors.numel()
        return self.share.total(total) / self.share.total(num_tokens)

    def _errors(self, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, target = _movable(batch, self.device)
        return ((self.predict(inputs).float() - target.float()) * self.scale_D).square().sum(-1)


class BlockData:
    """Activations of student and teacher along the blocks, from which each block gets its task.

    Args:
        student: the cut model.
        teacher: the original.
        blocks: paths of the blocks, in forward order.
        sites: the MLPs that were cut.
        images: what to learn from.
        options: how many images in which batches, and which parts are trained on what.
        seed: of the choice of images.
        share: the part of the images that this process reads.
        offload: folder for images and activations; None keeps them in memory.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        blocks: Sequence[str],
        sites: Sequence[MlpSite],
        images: ImageSet,
        *,
        options: BlockwiseOptions,
        seed: int,
        share: Share,
        offload: Path | None,
    ) -> None:
        self.student, self.blocks, self.sites, self.train = student, blocks, sites, options.train
        self.share, self.offload, self.kept = share, offload, kept_positions(student)
        batches = _decode(images, options, seed, share, offload and offload / "images")
        self.theirs = Activations(teacher, blocks, batches, frozen=True, offload=offload and offload / "teacher")
        self.inputs = self.theirs
        if options.inputs == "student":
            self.inputs = Activations(student, blocks, batches, frozen=False, offload=offload and offload / "student")

    def enter(self, index: int) -> BlockTask:
        """Bring the activations to a block, and return its task.

        An MLP behind a residual sum with a fixed layer scale learns outside its block, so that whatever comes before it
        is run once and not at every step. Its target makes up for everything that its block gets wrong.

        Args:
            index: number of the block; blocks are entered in order.
        """
        self.theirs.enter(index)
        if self.inputs is not self.theirs:
            self.inputs.enter(index)
        here = [site for site in self.sites if site.block == self.blocks[index]]
        if self.train == "mlp" and len(here) == 1 and self._kept(index) is None:
            call = self.inputs.call(0)
            scale_D = layer_scale(self.student, here[0].block, here[0].output, call)
            if scale_D is not None and stands_alone(self.student, here[0], observe(self.student, here[0], call)[1]):
                return self._of_mlp(here[0], scale_D)
        return self._of_block(index)

    def _of_mlp(self, site: MlpSite, scale_D: Tensor) -> BlockTask:
        pairs = Store(self.offload and self.offload / "pairs")
        for i in range(len(self.theirs.batches)):
            theirs = self.theirs.observe(site, i)
            _, ours = observe(self.student, site, self.inputs.call(i))
            pairs.put(i, (ours["input"].cpu(), corrected(theirs, ours, scale_D, 1.0).cpu()))
        return self._task(pairs.get, partial(mlp_output, self.student, site), scale_D.clone())

    def _of_block(self, index: int) -> BlockTask:
        for i in range(len(self.theirs.batches)):
            self.theirs.run(i)
        calls, outputs, block = self.inputs.calls, self.theirs.outputs, submodule(self.student, self.blocks[index])
        left = self._kept(index)
        kept = slice(None) if left is None else list(left)  # of the teacher's tokens
        return self._task(
            lambda i: (calls.get(i), outputs.get(i)[:, kept]), lambda call: first_tensor(block(*call[0], **call[1]))
        )

    def _kept(self, index: int) -> Sequence[int] | None:
        """Return which tokens the student still has behind a block; None for all."""
        latest = [self.kept[path] for path in self.blocks[: index + 1] if path in self.kept]
        return latest[-1] if latest else None

    def _task(
        self, read: Callable[[int], Any], predict: Callable[[Any], Tensor], scale_D: Tensor | float = 1.0
    ) -> BlockTask:
        num_batches = len(self.theirs.batches)
        num_held_out = max(1, num_batches // 10)
        return BlockTask(
            read=read,
            predict=predict,
            fit=range(max(1, num_batches - num_held_out)),  # a single batch serves both
            held_out=range(num_batches - num_held_out, num_batches),
            device=device_of(self.student),
            share=self.share,
            scale_D=scale_D,
        )


def disk_bytes(
    teacher: nn.Module, sites: Sequence[MlpSite], sample: Tensor, *, num_images: int, options: BlockwiseOptions
) -> int:
    """Estimate the bytes on disk: the images, the activations of both models, and an MLP's own inputs and targets.

    Args:
        teacher: the model.
        sites: the MLPs that are cut.
        sample: a few preprocessed images.
        num_images: how many images are read.
        options: which parts are trained on what.
    """
    calls, outputs = activation_bytes(teacher, forward_order(teacher, sites, sample), sample)
    activations = calls + outputs + (calls if options.inputs == "student" else 0)
    pairs = 2 * outputs if options.train == "mlp" else 0
    return num_images * (sample[0].nbytes + activations + pairs)


def read_ahead(read: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """Yield batches in an order of numbers, each read while the one before it is worked on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for number in numbers:
            coming = pool.submit(read, number)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _decode(images: ImageSet, options: BlockwiseOptions, seed: int, share: Share, folder: Path | None) -> Store:
    """Decode a process's share of the images, in batches of its share of a batch.

    Raises:
        DataError: no image could be read.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    loader = images.loader(
        batch_size=max(1, options.batch_size // share.num),
        indices=share.own(order[: options.num_images]),
        num_workers=options.num_workers,
    )
    batches = Store(folder)
    for batch in loader:
        batches.put(len(batches), batch.images_BCHW)
    if not len(batches):
        raise DataError(
            f"{images.name}: no image that could be read for process {share.rank} of {share.num}; add some."
        )
    return batches


def _movable(value: Any, device: torch.device) -> Any:
    """Move nested tensors to a device, as tensors that can take part in a backward pass."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device).clone() if leaf.is_inference() else leaf.to(device)

    return tree_map(move, value)
