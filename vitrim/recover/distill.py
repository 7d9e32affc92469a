"""Recovers a cut model's features by distilling the original into it, on images without labels.

The loop is plain: step s sees the same images under the same augmentation for any number of processes, the learning
rate is a function of s, and everything else is in the saved state, so a stopped run continues bit for bit on one
process. What comes back is the best state on held-out images, the untrained start included: recovery never makes a
model worse.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrim.checkpoint import has_state, load_state, save_state
from vitrim.data import ImageSet
from vitrim.errors import Interrupted
from vitrim.progress import progress
from vitrim.recipe import RecoverOptions
from vitrim.recover.run import Recovery, Run
from vitrim.recover.schedule import stop_on_interrupt
from vitrim.tensor_writer import read_journal


def recover_(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet,
    *,
    held_out: Sequence[Tensor],
    options: RecoverOptions,
    seed: int = 0,
    state: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    quiet: bool = False,
    on_validation: Callable[[int, float], None] | None = None,
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
        quiet: show no progress.
        on_validation: called with step and relative error whenever held-out images are judged.

    Returns:
        The curve and what was chosen.

    Raises:
        Interrupted: stopped by Ctrl-C; with `state`, the run can be resumed.
        OutputError: the state could not be written; what was kept before is whole.
    """
    run = Run(student, teacher, images, held_out, options, seed)
    keeper = _Keeper(run, state, log)
    saved = load_state(state) if resume and state is not None and has_state(state) else None
    with run.trainable():
        if saved is not None:
            run.load(saved)
            keeper.keep(write=False)
        else:
            run.start(quiet)
            keeper.keep()
            if on_validation:
                on_validation(0, run.result.best_error)
        keeper.open_log()
        _loop(run, keeper, quiet, on_validation)
        run.student.load_state_dict(run.best)
    return run.result


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
                stopped = stop.is_set() and run.step < run.num_steps
                if due or stopped:
                    keeper.keep()
                if stopped:
                    where = f"; continue with --resume (state in {keeper.state})" if keeper.state else ""
                    raise Interrupted(f"distillation stopped at step {run.step} of {run.num_steps}{where}.")


class _Keeper:
    """Keeps good states, on disk or in memory, and the log."""

    def __init__(self, run: Run, state: Path | None, log: Path | None) -> None:
        self.run, self.state, self.log = run, state, log
        # Other processes may not see this one's disk, so with several each keeps a copy of its own for a roll-back.
        self.in_memory = state is None or run.accelerator.num_processes > 1
        self.copy: dict[str, Any] = {}

    def keep(self, *, write: bool = True) -> None:
        """Keep the run as it stands."""
        if self.in_memory:
            self.copy = _to_cpu(self.run.state())
        if write and self.state is not None and self.run.is_main:
            save_state(self.state, self.run.state())

    def last(self) -> dict[str, Any]:
        """The last good state."""
        if self.in_memory or self.state is None:
            return self.copy
        return load_state(self.state)

    def open_log(self) -> None:
        """Start the log, or cut off what a stopped run logged after its last state."""
        if self.log is None or not self.run.is_main:
            return
        kept = [line for line in read_journal(self.log) if line["step"] <= self.run.step] if self.run.step else []
        self.log.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def note(self, loss: float, error: float | None, speed: float) -> None:
        """Log a step."""
        if self.log is None or not self.run.is_main:
            return
        line = {"step": self.run.step, "loss": loss, "lr": self.run.current_rate, "images_per_s": round(speed, 1)}
        with self.log.open("a") as file:
            file.write(json.dumps(line if error is None else {**line, "relative_error": error}) + "\n")


def _to_cpu(value: Any) -> Any:
    """A copy of nested values, tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item) for item in value)
    return value
