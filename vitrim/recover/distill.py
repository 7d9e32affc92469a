"""Recovers a cut model's features by distilling the original into it, on images without labels.

The loop is plain: step s sees the same images under the same augmentation for any number of processes, the learning
rate is a function of s, and everything else is in the saved state, so a stopped run continues bit for bit on one
process. What comes back is the best state on held-out images, the untrained start included: recovery never makes a
model worse.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, ImageStream
from vitrim.distributed.processes import any_process
from vitrim.errors import Interrupted, OutputError, RecipeError
from vitrim.progress import progress
from vitrim.recover.cycles import CycleRun
from vitrim.recover.elastic import Widths
from vitrim.recover.files import RECOVERY_LOG, RECOVERY_STATE, TRACKER_LOGS
from vitrim.recover.losses import EmbeddingSpace
from vitrim.recover.range_test import start_
from vitrim.recover.result import Recovery, Validation
from vitrim.recover.run import Run
from vitrim.recover.sampler import StreamSampler
from vitrim.recover.schedule import stop_on_interrupt
from vitrim.recover.snapshot import held_like, intervene_, restore_, roll_back_, take_snapshot
from vitrim.recover.state import Saving, clear_state, load_state, resumed_state, start_saving
from vitrim.recover.trackers import Trackers

LOG = logging.getLogger("vitrim")

OnValidation = Callable[[Validation], None]


def recover_(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet | ImageStream,
    *,
    held_out: Sequence[Tensor],
    options: RecoverOptions,
    context: RunContext | None = None,
    on_validation: OnValidation | None = None,
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
        context: the seed of the order of images, the folder for state, log and tracker files (see `files.py`), whether
            to continue from the state there, and whether progress is shown. Without it: seed 0, no files.
        on_validation: called with a `Validation` before the first step and whenever held-out images are judged, on
            every process; an exception that it raises ends the run. Not called again for the start of a resumed run.
        widths: with `options.elastic`, the widths that the student serves.
        space: for the image tower of a pair, where pooled vectors are compared; see `clip.embedding_space`.

    Returns:
        The curve of held-out errors and what was chosen.

    Raises:
        Interrupted: stopped by Ctrl-C; with a work folder, the run can be resumed.
        OutputError: the state or the teacher cache could not be written; the state before it is whole.
        CheckpointError: the teacher cache in its folder is of another teacher, other data or other options.
        RecipeError: `options.elastic` was given without widths, a tracker is unknown or has no folder, or an option
            does not work with a stream.
        MissingExtraError: a tracker is not installed.
    """
    context = context or RunContext()
    if options.elastic is not None and widths is None:
        raise RecipeError("recover.elastic: recover_ needs its widths; pass widths=Widths.of(recipe, sites).")
    if not options.has_length:
        raise RecipeError("recover.schedule: not filled in yet; pass options.as_published(family), or give steps.")
    given = {"images": images, "held_out": held_out, "options": options, "context": context}
    kind = CycleRun if options.cycles > 1 else Run
    return distil_(kind(student, teacher, **given, widths=widths, space=space), on_validation)


def distil_(run: Run, on_validation: OnValidation | None = None) -> Recovery:
    """Take a run from its start, or from the state in its work folder, to its end; see `recover_`."""
    if run.is_main and not run.context.quiet:
        for note in run.targets.notes:
            LOG.info(note)
    keeper = _Keeper(run)
    with run.trainable():
        _start(run, keeper, on_validation)
        keeper.open_log()
        try:
            _loop(run, keeper, on_validation)
            keeper.settle()
        finally:
            keeper.close()
        run.finish()
    said = run.result.verdict(sum(len(images) for images, _ in run.judge.held_out), run.result_name)
    run.result.notes = [*run.notes, *run.targets.notes, *run.result.notes, *_left_out(run), *said]
    return run.result


def _start(run: Run, keeper: _Keeper, on_validation: OnValidation | None) -> None:
    """Take up the state of a stopped run, or judge the untrained student and keep it."""
    kept = keeper.resumed()
    if kept is not None:
        restore_(run, kept)
        LOG.info("%s: goes on from step %d of %d", run.title, run.step, run.num_steps)
        return
    if keeper.state is not None:
        clear_state(keeper.state)
    first = start_(run)
    keeper.keep()
    if on_validation:
        on_validation(first)


def _left_out(run: Run) -> list[str]:
    """Note how many images could not be read, over all processes."""
    from accelerate.utils import gather_object

    num_images = len(set(gather_object(sorted(run.sampler.unreadable))))
    what = "stream" if isinstance(run.sampler, StreamSampler) else "training set"
    return [f"{num_images} images of the {what} could not be read and were left out."] if num_images else []


def _loop(run: Run, keeper: _Keeper, on_validation: OnValidation | None) -> None:
    """Take steps from where the run is to its end, with validation, state, Ctrl-C, and a way back from divergence."""
    quiet = run.context.quiet or not run.is_main
    with stop_on_interrupt() as stop, progress(run.title, run.num_steps, quiet=quiet) as bar:
        first = run.step
        while run.step < run.num_steps and run.result.ended_at is None:
            bar.done = run.step
            for batches in run.batches(run.step):
                loss = run.train_step(batches)
                judged = run.validate(loss) if run.is_due() and not run.diverged else None
                if run.diverged or (judged is not None and not math.isfinite(judged.held_out_error)):
                    if not roll_back_(run, keeper.last(), loss):
                        return
                    break
                if judged is not None and on_validation:
                    on_validation(judged)
                if judged is not None:
                    intervene_(run)
                speed = (run.step - first) * run.sampler.global_batch / max(1e-9, time.monotonic() - bar.started)
                bar.advance(1, f"error {run.result.curve[-1]['relative_error']:.4f}, {speed:.0f} images/s")
                keeper.note(loss, judged, speed)
                stopped = any_process(stop.is_set()) and run.step < run.num_steps
                if stopped or run.is_kept():
                    keeper.keep()
                if stopped:
                    keeper.settle()
                    where = f"; continue with --resume (state in {keeper.state})" if keeper.state else ""
                    raise Interrupted(f"{run.name} stopped at step {run.step} of {run.num_steps}{where}.")
                if run.result.ended_at is not None:
                    break


class _Keeper:
    """Good states of a run, on disk or in memory, and its log."""

    def __init__(self, run: Run) -> None:
        work = run.context.work
        self.run = run
        self.state = None if work is None else work / RECOVERY_STATE
        self.log = None if work is None else work / RECOVERY_LOG
        self.trackers = Trackers(run.accelerator, run.options, work and work / TRACKER_LOGS)
        self.copy: dict[str, Any] = {}
        self.saving: Saving | None = None

    def keep(self) -> None:
        """Keep the run as it is now; several processes write the state while the next steps are taken."""
        if self.state is None:
            self.copy = _copied(take_snapshot(self.run))
        else:
            self.settle()
            self.saving = start_saving(self.state, take_snapshot(self.run))

    def settle(self) -> None:
        """Return once the state that was kept last is on disk."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.wait()

    def close(self) -> None:
        """Close the trackers, and let a state be written that is still on its way when a run ends by an error."""
        self.trackers.close()
        try:
            self.settle()
        except OutputError as error:
            LOG.warning("%s", error)

    def last(self) -> dict[str, Any]:
        """Return the last good state."""
        self.settle()
        if self.state is None:
            return self.copy
        return load_state(self.state, partial(held_like, self.run))

    def resumed(self) -> dict[str, Any] | None:
        """Return the state of a stopped run, if the run is to continue and there is a whole one."""
        if self.state is None or not self.run.context.resume:
            return None
        return resumed_state(self.state, partial(held_like, self.run))

    def open_log(self) -> None:
        """Start the log and the trackers, or cut off what a stopped run logged after its last state."""
        self.trackers.open(self.run.step)
        if self.log is None or not self.run.is_main:
            return
        kept = [line for line in _logged(self.log) if line["step"] <= self.run.step] if self.run.step else []
        self.log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def note(self, loss: float, judged: Validation | None, speed: float) -> None:
        """Log a step: its loss, its rate, images per second, and the held-out error where it was judged."""
        values = {"loss": loss, "lr": self.run.current_rate, "images_per_s": round(speed, 1)}
        values |= {} if judged is None else {"relative_error": judged.held_out_error}
        self.trackers.note(self.run.step, values)
        if self.log is None or not self.run.is_main:
            return
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.run.step, **values}) + "\n")


def _logged(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log that are whole; a log is for people, and nothing depends on it."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                yield found


def _copied(value: Any) -> Any:
    """Copy nested values; whole tensors go to the CPU, shards are small and stay where they are."""
    if isinstance(value, Tensor):
        return value.detach().clone() if isinstance(value, DTensor) else value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
