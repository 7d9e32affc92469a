"""The state of a run as nested tensors and plain values: taken, put back, and told how it is spread.

Tensors are stored under the names of their parameters, so any number of processes can restore them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitrim.recover.result import Recovery
from vitrim.recover.run import Run

# Factor on the rate after going back to an earlier state, and how often a run may do so.
SLOWER, MAX_ROLLBACKS = 0.5, 8
# The same for a run that gains nothing at a rate that was found.
LOWER, MAX_RESTARTS = 0.3, 2


def take_snapshot(run: Run) -> dict[str, Any]:
    """Return everything from which a run continues exactly, once the teacher's targets so far are on disk.

    The tensors are the run's own, not copies.
    """
    run.targets.flush()
    run.count_time()
    moments = {name: run.optimizer.state.get(p, {}) for name, p in run.named_parameters().items()}
    return {
        "student": run.trained.state_dict(),
        "optimizer": {name: dict(kept) for name, kept in moments.items()},
        "best": run.best,
        "ema": run.ema,
        "step": run.step,
        "usual": dict(run.usual),
        "best_score": run.best_score,
        "result": dict(run.result.__dict__),
    }


def restore_(run: Run, saved: Mapping[str, Any]) -> None:
    """Put a snapshot into a run; what changes in place is copied, so that the snapshot can be restored again."""
    run.trained.load_state_dict(saved["student"])
    run.optimizer.state.clear()
    for name, p in run.named_parameters().items():
        moments = saved["optimizer"][name].items()
        if moments:  # single numbers stay on the CPU, as with torch's count of steps
            run.optimizer.state[p] = {
                key: value.to(p.device if value.ndim else "cpu", copy=True) for key, value in moments
            }
    run.best, run.step, run.usual = dict(saved["best"]), saved["step"], dict(saved["usual"])
    run.best_score = saved["best_score"]
    run.ema = {name: average.to(run.device, copy=True) for name, average in saved["ema"].items()}
    kept = saved["result"]
    lists: dict[str, Any] = {name: list(value) for name, value in kept.items() if isinstance(value, list)}
    run.result = Recovery(**{**kept, **lists})


def roll_back_(run: Run, saved: Mapping[str, Any], loss: float) -> bool:
    """Go back to a saved state with a lower rate, and note it.

    Args:
        run: a run that has diverged.
        saved: a snapshot of an earlier step.
        loss: the loss that was too high, for the note.

    Returns:
        False where this has been done MAX_ROLLBACKS times already; then nothing is changed but the notes.
    """
    failed, rate, notes = run.step, run.result.lr * SLOWER, list(run.result.notes)
    run.count_time()
    num_images, seconds = run.result.num_images, run.result.seconds  # they stay spent
    if len(notes) >= MAX_ROLLBACKS:
        said = f"diverged again at step {failed}: distillation ended there with its best state; give a lower lr."
        run.result.notes = [*notes, said]
        return False
    restore_(run, saved)
    run.result.lr, run.result.num_images, run.result.seconds = rate, num_images, seconds
    said = f"loss {loss:.3g} at step {failed}: went back to step {run.step} with the rate lowered to {rate:.3g}."
    run.result.notes = [*notes, said]
    return True


def intervene_(run: Run) -> None:
    """Go back or end, where a run that has just been judged gains nothing or gains no more."""
    if run.gains_nothing():
        _restart_(run)
    elif run.gains_no_more():
        _end_(run)


def _restart_(run: Run) -> None:
    """Go back to the best state seen, with a lower rate and a schedule of its own for the steps left; or end the run.

    It is the found rate that was too high: a range test of few steps can't tell how noise adds up. After MAX_RESTARTS
    there is nothing to gain, and the run ends.
    """
    result = run.result
    if len(result.restarts) >= MAX_RESTARTS:
        result.ended_at = run.step
        left = run.num_steps - run.step
        said = f"no gain by step {run.step} at a rate of {result.lr:.3g} either: ended there, {left:,} steps early."
    else:
        run.start_over_(run.best, step=run.step)
        run.ema = {name: p.detach().clone() for name, p in run.named_parameters().items()} if run.ema else {}
        result.lr *= LOWER
        result.restarts.append(run.step)
        back = f"went back to step {result.best_step} with the rate lowered to {result.lr:.3g}."
        said = f"no gain by step {run.step}: {back}"
    result.notes = [*result.notes, said]


def _end_(run: Run) -> None:
    """End a run that gains no more, with the best state seen, and note what that saves."""
    result, left = run.result, run.num_steps - run.step
    result.ended_at = run.step
    saved = f"{left:,} of {run.num_steps:,} steps ({left * run.sampler.global_batch:,} images) were saved"
    said = f"no gain since step {result.best_step}: ended at step {run.step} with the state of that one; {saved}."
    result.notes = [*result.notes, said]


def held_like(run: Run, keys: Sequence[Any]) -> Tensor | None:
    """Return what a tensor of a saved state is to be spread like.

    Args:
        run: the run that will take it up.
        keys: the keys that lead to the tensor in the saved state; one of them may be the name of a parameter.

    Returns:
        What the run holds under that name; None if no key is a name.
    """
    held = run.trained.state_dict()
    return next((held[key] for key in keys if key in held), None)
