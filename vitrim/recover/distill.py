"""Recovers a cut model's features by distilling the original into it, on images without labels.

The loop is plain: step s sees the same images under the same augmentation for any number of processes, the learning
rate is a function of s, and everything else is in the saved state, so a stopped run continues bit for bit on one
process. What comes back is the best state on held-out images, the untrained start included: recovery never makes a
model worse.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vitrim.config.options import RecoverOptions
from vitrim.data import ImageSet, ImageStream
from vitrim.distributed.processes import any_process
from vitrim.errors import Interrupted, RecipeError
from vitrim.progress import progress
from vitrim.recover.elastic import Widths
from vitrim.recover.losses import EmbeddingSpace
from vitrim.recover.run import Recovery, Run
from vitrim.recover.sampler import StreamSampler
from vitrim.recover.schedule import stop_on_interrupt
from vitrim.recover.state import clear_state, has_state, load_state, save_state
from vitrim.recover.targets import cache_folder
from vitrim.recover.trackers import Trackers
from vitrim.storage.tensor_writer import read_journal

OnValidation = Callable[[int, float], None]


def recover_(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet | ImageStream,
    *,
    held_out: Sequence[Tensor],
    options: RecoverOptions,
    seed: int = 0,
    state: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    logs: Path | None = None,
    quiet: bool = False,
    on_validation: Callable[[int, float], None] | None = None,
    widths: Widths | None = None,
    space: EmbeddingSpace | None = None,
) -> Recovery:
    """Distil a teacher into a student, in place.

    Args:
        student: the cut model; ends with the best state seen.
        teacher: the original; never changed, never given a gradient.
        images: what to train on, augmented already; labels are not read.
        held_out: preprocessed images (B, C, H, W) that judge which state is best.
        options: length, batch, rate and the rest.
        seed: of the order of images.
        state: where to keep a resumable state; None keeps none.
        resume: continue from `state` where it exists, or from the one before where it is damaged.
        log: file that gets one JSON line a step; None writes none.
        logs: folder for the files of `options.report_to`.
        quiet: show no progress.
        on_validation: called with step and relative error whenever held-out images are judged.
        widths: with `options.elastic`, the widths that the student is to serve.
        space: for the image tower of a pair, where the pooled vector is compared; see `text_bank.embedding_space_of`.

    Returns:
        The curve and what was chosen.

    Raises:
        Interrupted: stopped by Ctrl-C; with `state`, the run can be resumed.
        OutputError: the state or the teacher cache could not be written; what was kept before is whole.
        CheckpointError: the folder of the teacher cache holds that of another teacher, other data or options.
        RecipeError: `options.elastic` was given without widths, a tracker is unknown or has no folder, or what is asked
            for can't be done with a stream.
        MissingExtraError: a tracker is not installed.
    """
    if options.elastic is not None and widths is None:
        raise RecipeError("recover.elastic: recover_ needs its widths; pass widths=Widths.of(recipe, sites).")
    run = Run(student, teacher, images, held_out, options, seed, widths, cache_folder(options, state), space)
    if not quiet and run.is_main:
        for note in run.targets.notes:
            print(note, file=sys.stderr)
    keeper = _Keeper(run, state, log, Trackers(run.accelerator, options, logs))
    with run.trainable():
        if resume and state is not None and has_state(state):
            run.load(keeper.last())
        else:
            if state is not None:
                clear_state(state)
            run.start(quiet)
            keeper.keep()
            if on_validation:
                on_validation(0, run.result.best_error)
        keeper.open_log()
        try:
            _loop(run, keeper, quiet, on_validation)
        finally:
            keeper.trackers.close()
        run.finish()
    run.result.notes = [*run.notes, *run.targets.notes, *run.result.notes, *_left_out(run)]
    return run.result


def _left_out(run: Run) -> list[str]:
    """How many images of a stream could not be read, over all processes."""
    if not isinstance(run.order, StreamSampler):
        return []
    mine = torch.tensor(len(run.order.unreadable), device=run.device)
    num_images = int(run.accelerator.reduce(mine, reduction="sum"))  # type: ignore[arg-type]
    return [f"{num_images} images of the stream could not be read and were left out."] if num_images else []


def _loop(run: Run, keeper: _Keeper, quiet: bool, on_validation: Callable[[int, float], None] | None) -> None:
    """Steps from where the run stands to its end, with validation, state, Ctrl-C, and a way back from divergence."""
    with stop_on_interrupt() as stop, progress("distil", run.num_steps, quiet=quiet or not run.is_main) as bar:
        first = run.step
        while run.step < run.num_steps:
            bar.done = run.step
            for batches in run.batches(run.step):
                loss = run.train_step(batches)
                due = run.is_due()
                error = run.validate(loss) if due and not run.diverged else None
                if run.diverged or (error is not None and not math.isfinite(error)):
                    if not run.roll_back(keeper.last(), loss):
                        return
                    break
                if error is not None and on_validation:
                    on_validation(run.step, error)
                speed = (run.step - first) * run.order.global_batch / max(1e-9, time.monotonic() - bar.started)
                bar.advance(1, f"error {run.result.curve[-1]['relative_error']:.4f}, {speed:.0f} images/s")
                keeper.note(loss, error, speed)
                stopped = any_process(stop.is_set()) and run.step < run.num_steps
                if stopped or run.is_kept():
                    keeper.keep()
                if stopped:
                    where = f"; continue with --resume (state in {keeper.state})" if keeper.state else ""
                    raise Interrupted(f"distillation stopped at step {run.step} of {run.num_steps}{where}.")


class _Keeper:
    """Keeps good states, on disk or in memory, and the log."""

    def __init__(self, run: Run, state: Path | None, log: Path | None, trackers: Trackers) -> None:
        self.run, self.state, self.log, self.trackers = run, state, log, trackers
        self.copy: dict[str, Any] = {}

    def keep(self) -> None:
        """Keep the run as it stands."""
        if self.state is None:
            self.copy = _copied(self.run.state())
        else:
            save_state(self.state, self.run.state())

    def last(self) -> dict[str, Any]:
        """The last good state."""
        return self.copy if self.state is None else load_state(self.state, self.run.place)

    def open_log(self) -> None:
        """Start the log and the trackers, or cut off what a stopped run logged after its last state."""
        self.trackers.open(self.run.step)
        if self.log is None or not self.run.is_main:
            return
        kept = [line for line in read_journal(self.log) if line["step"] <= self.run.step] if self.run.step else []
        self.log.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def note(self, loss: float, error: float | None, speed: float) -> None:
        """Log a step."""
        values = {"loss": loss, "lr": self.run.current_rate, "images_per_s": round(speed, 1)}
        values |= {} if error is None else {"relative_error": error}
        self.trackers.note(self.run.step, values)
        if self.log is None or not self.run.is_main:
            return
        with self.log.open("a") as file:
            file.write(json.dumps({"step": self.run.step, **values}) + "\n")


def _copied(value: Any) -> Any:
    """A copy of nested values; whole tensors go to the CPU, shards are small and stay."""
    if isinstance(value, Tensor):
        return value.detach().clone() if isinstance(value, DTensor) else value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
