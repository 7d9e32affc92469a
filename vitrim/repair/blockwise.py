"""Trains a cut student block by block, each to put out what the teacher's block does, on images kept on disk.

The refit of `refit.py` without its bound: streams lie in files (`lessons.py`), so disk, not memory, bounds the number
of images. Inputs are the student's own, block after block, and processes share the images; or the teacher's, and then
blocks know nothing of each other and processes share the blocks. A block's result is taken only if it is better on
held-out images, and finished blocks survive a kill. Nothing is trained through more than one block: that is what
`distill.py` is for.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.calibrate.activations import forward_order
from vitrim.config.options import BlockwiseOptions
from vitrim.config.recipe import Recipe
from vitrim.data import ImageSet, ImageStream, Split, first_images
from vitrim.distributed.processes import any_process, from_process, is_main, join_, num_processes, rank
from vitrim.errors import CheckpointError, Interrupted, OutputError, RecipeError
from vitrim.metrics.judging import features_on_cpu, relative_error
from vitrim.models.features import device_of
from vitrim.progress import Progress, progress
from vitrim.repair.block_data import BlockData, BlockTask, Share, disk_bytes
from vitrim.repair.refit import improve_
from vitrim.surgery import submodule
from vitrim.types import MlpSite

# Peak rates of Adam where none is given: an MLP alone stands a higher one than attention does.
RATES = {"mlp": 1e-3, "block": 5e-4}

# Repair with feedback makes each block correct those before it; with the teacher's inputs it unlearns that.
ADVICE = "use inputs: student, or repair with feedback: 0."

Parts = Mapping[str, Mapping[str, nn.Parameter]]
Errors = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Blockwise:
    """What came of it: by block, the held-out squared error of a token before and after, and notes for the user.

    `relative_error` is that of the whole student's features, before and after.
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
    seed: int = 0,
    folder: Path | None,
    resume: bool = False,
    quiet: bool = False,
) -> Blockwise:
    """Train a cut student's blocks one by one, in place.

    Args:
        student: the cut model; neither a block nor the whole ends worse on held-out images than it was.
        teacher: the original; never changed.
        sites: the MLPs that were cut, by paths from the models' root; their blocks are trained.
        images: what to learn from, preprocessed; the last tenth of the batches judges the blocks. Of a stream, the
            first images of a seeded order are held in memory, encoded as they came.
        held_out: preprocessed images (B, C, H, W) that judge the whole.
        options: how many images, how long, and what of a block.
        seed: of the choice of images and the order of batches.
        folder: where streams lie while it runs, and finished blocks for a resumption; None keeps all in memory.
        resume: take up the blocks that a stopped run finished in `folder`.
        quiet: show no progress.

    Returns:
        The errors by block, the same on every process.

    Raises:
        CheckpointError: a finished block in `folder` is damaged.
        OutputError: the disk has not got the room that the streams will take.
        RecipeError: the finished blocks in `folder` were trained with other options.
        Interrupted: stopped by Ctrl-C; with `folder`, the run can be resumed.
    """
    join_(device_of(student).type)
    spread = options.inputs == "teacher"
    share = Share() if spread else Share(rank=rank(), num=num_processes())
    if isinstance(images, ImageStream):
        images, _ = images.take(options.num_images, seed=seed)
    sample = torch.cat(first_images(images, 2, seed=seed)[0])
    parts = {block: _trained(student, block, sites, options.train) for block in forward_order(teacher, sites, sample)}
    whole = _Whole(student, teacher, held_out)
    kept = _Kept(folder and folder / "blocks", {**options.model_dump(exclude={"num_workers"}), "seed": seed}, resume)
    errors = kept.take_up_(parts, spread)
    todo = [i for i, block in enumerate(parts) if parts[block] and block not in errors and _is_mine(i, spread)]
    num_read = math.ceil(min(len(images), options.num_images) / share.num) if todo else 0
    total = disk_bytes(teacher, sites, sample, num_images=num_read, options=options)
    _check_disk(folder, total)
    title, num_steps = f"block by block, {total / 10**9:.1f} GB of activations", len(todo) * options.steps
    with (
        _interruptible(errors, parts, folder),
        _offloading(folder) as offload,
        progress(title, num_steps, quiet=quiet or not todo or not is_main()) as bar,
    ):
        if todo:
            lessons = BlockData(
                student, teacher, list(parts), sites, images, options=options, seed=seed, share=share, offload=offload
            )
        for index in todo:
            block, lesson = list(parts)[index], lessons.enter(index)
            errors[block] = _train_(submodule(student, block), parts[block], lesson, options, (seed, index), bar)
            kept.keep(index, parts[block], errors[block], spread)
    if spread:
        _exchange_(parts, errors, spread)
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
    work: Path | None,
    *,
    resume: bool,
    quiet: bool,
) -> Blockwise | None:
    """The step of the main job behind the cut, where the recipe asks for it and there are images.

    Without a place to write, activations lie in a folder that goes with the run.
    """
    if recipe.blockwise is None or split is None:
        return None
    with nullcontext(work) if work is not None else TemporaryDirectory(prefix="vitrim-") as folder:
        return recover_blocks_(
            student,
            teacher,
            sites,
            split.train,
            held_out=[batch.images_BCHW for batch in split.held_out],
            options=recipe.blockwise,
            seed=recipe.seed,
            folder=Path(folder),
            resume=resume,
            quiet=quiet,
        )


def _trained(student: nn.Module, block: str, sites: Sequence[MlpSite], train: str) -> dict[str, nn.Parameter]:
    """What is trained of a block, by full name; what other parts of the model hold, too, is left as it is."""
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
    lesson: BlockTask,
    options: BlockwiseOptions,
    seed: tuple[int, int],
    bar: Progress,
) -> dict[str, float]:
    """Train one block in place; its held-out error before and after."""
    end = bar.done + options.steps
    with closing(lesson.losses(seed[0] * 1_000_003 + seed[1])) as losses:

        def loss() -> Tensor:
            bar.advance(1)
            return next(losses)

        before, after = improve_(
            block,
            list(parameters.values()),
            loss=loss,
            judge=lesson.judge,
            num_steps=options.steps,
            lr=options.lr or RATES[options.train],
            share=_average_ if lesson.share.num > 1 else None,
        )
    bar.done = end  # also where there was nothing to do
    return {"before": before, "after": after}


def _average_(parameters: Sequence[nn.Parameter]) -> None:
    """Make each gradient the mean over all processes."""
    for p in parameters:
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= num_processes()


def _owner(index: int, spread: bool) -> int:
    """The process that keeps a block."""
    return index % num_processes() if spread else 0


def _is_mine(index: int, spread: bool) -> bool:
    """Whether this process trains a block."""
    return not spread or _owner(index, spread) == rank()


def _exchange_(parts: Parts, errors: Errors, spread: bool) -> None:
    """Give every process the blocks that their owners have done, and their errors."""
    for index, (block, parameters) in enumerate(parts.items() if num_processes() > 1 else ()):
        done = (errors[block], [p.detach().cpu() for p in parameters.values()]) if block in errors else None
        found = from_process(_owner(index, spread), done)
        if found is not None:
            errors[block] = found[0]
            _fill_(parameters, dict(zip(parameters, found[1], strict=True)))


@torch.no_grad()
def _fill_(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Give parameters their values."""
    for name, p in parameters.items():
        p.copy_(tensors[name])


@contextmanager
def _interruptible(errors: Errors, parts: Parts, folder: Path | None) -> Iterator[None]:
    """Turn Ctrl-C into word of how far the run is; nothing that is half done stays."""
    try:
        yield
    except KeyboardInterrupt:
        where = f"; continue with --resume (finished blocks in {folder})" if folder else ""
        raise Interrupted(f"block by block stopped with {len(errors)} of {len(parts)} blocks done{where}.") from None


@contextmanager
def _offloading(folder: Path | None) -> Iterator[Path | None]:
    """A folder for this process's streams, which is gone afterwards; None where they stay in memory."""
    offload = folder and folder / f"streams-{rank()}"
    try:
        yield offload
    finally:
        if offload is not None:
            shutil.rmtree(offload, ignore_errors=True)


def _check_disk(folder: Path | None, total: int) -> None:
    """Refuse, on all processes at once, what a disk has no room for."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / f"streams-{rank()}", ignore_errors=True)  # left by a run that was killed
    needed, free = total * int(os.environ.get("LOCAL_WORLD_SIZE", "1")), shutil.disk_usage(folder).free
    if any_process(needed > free):
        raise OutputError(
            f"{folder}: block by block puts {needed / 10**9:.2f} GB of activations there and {free / 10**9:.2f} GB are "
            "free; lower blockwise.num_images, or write the output to a larger disk."
        )


class _Whole:
    """The student as it came, and how far its features are from the teacher's."""

    def __init__(self, student: nn.Module, teacher: nn.Module, held_out: Sequence[Tensor]) -> None:
        self.student, self.start = student, copy.deepcopy(student.state_dict())
        self.judged = [(batch, features_on_cpu(teacher, batch, "final")) for batch in held_out]
        self.before = relative_error(student, self.judged, "final")

    def settle_(self) -> tuple[tuple[float, float], list[str]]:
        """Put the student back where it is worse than it came; its error before and after, and what is to be said."""
        before, after = self.before, relative_error(self.student, self.judged, "final")
        if after <= before:
            return (before, after), []
        self.student.load_state_dict(self.start)
        said = f"block by block: the whole came out worse ({before:.4g} to {after:.4g}) and was put back; {ADVICE}"
        return (before, before), [said]


class _Kept:
    """Finished blocks in files, one a block, each written beside its place and renamed."""

    def __init__(self, folder: Path | None, made: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.made = folder, dict(made)
        if folder is not None and not resume:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(
        self, index: int, parameters: Mapping[str, nn.Parameter], errors: Mapping[str, float], spread: bool
    ) -> None:
        """Keep a block as it stands, on the process that owns it.

        Raises:
            OutputError: it could not be written, as on a full disk.
        """
        if self.folder is None or _owner(index, spread) != rank():
            return
        path, beside = self._path(index), self._path(index).with_suffix(".new")
        about = {"made": json.dumps(self.made, sort_keys=True), "errors": json.dumps(errors)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, beside, metadata=about)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path}: can't be written ({error}); make room and go on with resume.") from None

    def take_up_(self, parts: Parts, spread: bool) -> Errors:
        """Put kept blocks into the model; their errors.

        Raises:
            RecipeError: they were made with other options.
            CheckpointError: one is damaged.
        """
        errors: Errors = {}
        for index, (block, parameters) in enumerate(parts.items()):
            if self.folder is not None and self._path(index).exists() and _owner(index, spread) == rank():
                errors[block] = self._read_(index, parameters)
        if not spread:
            _exchange_(parts, errors, spread)
        return errors

    def _read_(self, index: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Give parameters the values of a kept block; its errors."""
        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as file:
                about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: can't be read ({error}); run without resume, or remove it.") from None
        if about.get("made") != json.dumps(self.made, sort_keys=True) or tensors.keys() != parameters.keys():
            raise RecipeError(f"{path}: was trained with other options than this run's; run without resume.")
        _fill_(parameters, tensors)
        return json.loads(about["errors"])

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index}.safetensors"
