"""Trains a cut student block by block: each learns to put out what the teacher's block does, from activations on disk.

The refit of `refit.py` without its bound: activations lie in files (`block_data.py`), so disk, not memory, bounds the
number of images. Inputs are the student's own, block after block, and processes share the images; or the
teacher's, and then blocks are independent and processes share the blocks. A block's result is taken only if it is
better on held-out images, and finished blocks survive a kill. Nothing is trained through more than one block:
`recover/distill.py` does that.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from vitrim.calibrate.activations import forward_order
from vitrim.config.options import BlockwiseOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, ImageStream, Split, first_images
from vitrim.distributed.processes import any_process, is_main, join_, rank
from vitrim.distributed.sharing import shared_on
from vitrim.errors import Interrupted, OutputError
from vitrim.metrics.judging import features_on_cpu, relative_error
from vitrim.models.features import device_of
from vitrim.progress import Progress, progress
from vitrim.repair.block_data import BlockData, BlockTask, disk_bytes
from vitrim.repair.finished_blocks import Errors, FinishedBlocks, Parts, exchange_, is_mine
from vitrim.repair.refit import improve_
from vitrim.repair.relative_steps import gated_weights
from vitrim.share import ALONE
from vitrim.surgery import submodule
from vitrim.types import MlpSite

# Repair with feedback makes each block correct those before it; with the teacher's inputs it unlearns that.
ADVICE = "use inputs: student, or repair with feedback: 0."

# Of the work folder: a file for each finished block.
FINISHED = "blocks"


@dataclass(frozen=True, kw_only=True)
class Blockwise:
    """Result of training block by block.

    Attributes:
        errors: by block, the held-out squared error of a token `before` and `after`.
        relative_error: of the whole student's features on held-out images, before and after.
        notes: sentences for the user.
    """

    errors: Errors
    relative_error: tuple[float, float]
    notes: tuple[str, ...]


def recover_blocks_(
    student: nn.Module,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    images: ImageSet | ImageStream,
    *,
    held_out: Sequence[Tensor],
    options: BlockwiseOptions,
    context: RunContext,
) -> Blockwise:
    """Train a cut student's blocks one by one, in place.

    Args:
        student: the cut model; neither a block nor the whole ends worse on held-out images than it was.
        teacher: the original; never changed.
        sites: the MLPs that were cut, by paths from the models' root; their blocks are trained.
        images: what to learn from, preprocessed; the last tenth of the batches judges the blocks. Of a stream, the
            first images of a seeded order are held in memory, encoded as they came.
        held_out: preprocessed images (B, C, H, W) that judge the whole.
        options: how many images, how long, and which parts of a block.
        context: the seed of the choice of images and of the order of batches; the folder for activations while this
            runs and for finished blocks (None keeps all in memory); whether to take up finished blocks from there; and
            whether progress is shown.

    Returns:
        The errors by block, the same on every process.

    Raises:
        CheckpointError: a finished block in the work folder is damaged.
        OutputError: the disk has no room for the activations.
        RecipeError: the finished blocks in the work folder were trained with other options.
        Interrupted: stopped by Ctrl-C; with a work folder, the run can be resumed.
    """
    join_(device_of(student).type)
    spread, folder, seed = options.inputs == "teacher", context.work, context.seed
    share = ALONE if spread else shared_on(device_of(student))
    if isinstance(images, ImageStream):
        images, _ = images.take(options.num_images, seed=seed)
    sample = torch.cat(first_images(images, 2, seed=seed)[0])
    parts = {block: _trained(student, block, sites, options.train) for block in forward_order(teacher, sites, sample)}
    whole = _Whole(student, teacher, held_out)
    made = {**options.model_dump(exclude={"num_workers"}), "seed": seed}
    finished = FinishedBlocks(folder and folder / FINISHED, made, context.resume)
    errors = finished.take_up_(parts, spread)
    todo = [i for i, block in enumerate(parts) if parts[block] and block not in errors and is_mine(i, spread)]
    num_read = math.ceil(min(len(images), options.num_images) / share.num) if todo else 0
    total = disk_bytes(teacher, sites, sample, num_images=num_read, options=options)
    _check_disk(folder, total)
    title, quiet = f"block by block, {total / 10**9:.1f} GB of activations", context.quiet or not todo or not is_main()
    with (
        _interruptible(errors, parts, folder),
        _offloading(folder) as offload,
        progress(title, len(todo) * options.steps, quiet=quiet) as bar,
    ):
        if todo:
            given = {"options": options, "seed": seed, "share": share, "offload": offload}
            data = BlockData(student, teacher, list(parts), sites, images, **given)
        for index in todo:
            block, task = list(parts)[index], data.enter(index)
            errors[block] = _train_(submodule(student, block), parts[block], sites, task, options, (seed, index), bar)
            finished.keep(index, parts[block], errors[block], spread)
    if spread:
        exchange_(parts, errors, spread)
    notes = [f"{block}: shares all of its tensors with others; left as it is." for block in parts if not parts[block]]
    found, said = whole.settle_()
    errors = {block: errors[block] for block in parts if block in errors}
    return Blockwise(errors=errors, relative_error=found, notes=(*notes, *said))


def follow_cut_(
    student: nn.Module,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    recipe: Recipe,
    split: Split | None,
    *,
    context: RunContext,
) -> Blockwise | None:
    """Train block by block behind the cut, where the recipe asks for it and there are images; else return None.

    Without a work folder, activations lie in a temporary one. Args, Returns and Raises are those of `recover_blocks_`.
    """
    if recipe.blockwise is None or split is None:
        return None
    with nullcontext(context.work) if context.work else TemporaryDirectory(prefix="vitrim-") as folder:
        return recover_blocks_(
            student,
            teacher,
            sites,
            split.train,
            held_out=[batch.images_BCHW for batch in split.held_out],
            options=recipe.blockwise,
            context=replace(context, work=Path(folder)),
        )


def _trained(student: nn.Module, block: str, sites: Sequence[MlpSite], train: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that are trained, by full name; those shared with other blocks are left out."""
    paths = [block]
    if train == "mlp":
        here = [site for site in sites if site.block == block]
        paths = [path for s in here for path in (s.gate, s.value, s.norm, s.output) if path is not None]
    named = list(student.named_parameters(remove_duplicate=False))
    elsewhere = {id(p) for name, p in named if not name.startswith(f"{block}.")}
    inside = tuple(f"{path}." for path in paths)
    return {name: p for name, p in named if name.startswith(inside) and id(p) not in elsewhere}


def _train_(
    block: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    sites: Sequence[MlpSite],
    task: BlockTask,
    options: BlockwiseOptions,
    seed: tuple[int, int],
    bar: Progress,
) -> dict[str, float]:
    """Train one block in place; returns its held-out error `before` and `after`."""
    end = bar.done + options.steps
    with closing(task.losses(seed[0] * 1_000_003 + seed[1])) as losses:

        def drawn() -> list[Tensor]:
            bar.advance(1)
            return [next(losses) / task.share.num]

        before, after = improve_(
            block,
            list(parameters.values()),
            losses=drawn,
            judge=task.judge,
            num_steps=options.steps,
            lr=options.lr,
            where=next(iter(parameters), "").rpartition(".")[0],
            gated=gated_weights(sites, parameters),
            share=task.share,
        )
    bar.done = end  # also where there was nothing to do
    return {"before": before, "after": after}


@contextmanager
def _interruptible(errors: Errors, parts: Parts, folder: Path | None) -> Iterator[None]:
    """Turn Ctrl-C into an error that says how many blocks are done; a half-trained block is undone."""
    try:
        yield
    except KeyboardInterrupt:
        where = f"; continue with --resume (finished blocks in {folder})" if folder else ""
        raise Interrupted(f"block by block stopped with {len(errors)} of {len(parts)} blocks done{where}.") from None


@contextmanager
def _offloading(folder: Path | None) -> Iterator[Path | None]:
    """Yield a folder for this process's activations, removed afterwards; None where they stay in memory."""
    offload = folder and folder / f"activations-{rank()}"
    try:
        yield offload
    finally:
        if offload is not None:
            shutil.rmtree(offload, ignore_errors=True)


def _check_disk(folder: Path | None, total: int) -> None:
    """Raise an OutputError on all processes at once if the disk has no room for this many bytes from each process."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / f"activations-{rank()}", ignore_errors=True)  # left by a run that was killed
    needed, free = total * int(os.environ.get("LOCAL_WORLD_SIZE", "1")), shutil.disk_usage(folder).free
    if any_process(needed > free):
        raise OutputError(
            f"{folder}: block by block puts {needed / 10**9:.2f} GB of activations there and {free / 10**9:.2f} GB are "
            "free; lower blockwise.num_images, or write the output to a larger disk."
        )


class _Whole:
    """Copy of the student's weights at the start, and the relative error of its features then."""

    def __init__(self, student: nn.Module, teacher: nn.Module, held_out: Sequence[Tensor]) -> None:
        self.student, self.start = student, copy.deepcopy(student.state_dict())
        self.judged = [(batch, features_on_cpu(teacher, batch, "final")) for batch in held_out]
        self.before = relative_error(student, self.judged, "final")

    def settle_(self) -> tuple[tuple[float, float], list[str]]:
        """Put the student back if it has become worse; returns its error before and after, and notes for the user."""
        before, after = self.before, relative_error(self.student, self.judged, "final")
        if after <= before:
            return (before, after), []
        self.student.load_state_dict(self.start)
        said = f"block by block: the whole came out worse ({before:.4g} to {after:.4g}) and was put back; {ADVICE}"
        return (before, before), [said]
