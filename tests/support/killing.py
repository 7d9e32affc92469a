"""A run that is killed again and again, and each time goes on where it was."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.distillation import HELD_OUT, make_student, make_teacher, weights
from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for, open_images
from vitrim.recover import state_file as state_module
from vitrim.recover.distill import recover_
from vitrim.recover.files import RECOVERY_LOG, RECOVERY_STATE
from vitrim.recover.state import has_state, load_state

DIGITS_16 = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
KILLED = {"steps": 40, "batch_size": 8, "num_validations": 2, "save_every": 2, "ema": 0.9}


def killed_run(folder: Path, prepare: Callable[[], None] = lambda: None) -> None:
    """A run over digits that goes on where the last one was killed; its weights in the end."""
    torch.set_num_threads(1)
    prepare()
    teacher = make_teacher()
    student = make_student(teacher)
    images = open_images("digits", limit=64).augmented(augment_for(DIGITS_16, "light"), seed=0)
    recover_(
        student,
        teacher,
        images,
        held_out=HELD_OUT,
        options=RecoverOptions(**KILLED),
        context=RunContext(work=folder, resume=True, quiet=True),
    )
    torch.save(weights(student), folder / "weights.pt")


def start(folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """The run in a process of its own, by its id; forked, because importing torch takes longer than the run."""
    folder.mkdir(exist_ok=True)
    if process := os.fork():
        return process
    try:
        killed_run(folder, prepare)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def last_step(log: Path) -> int:
    """The last step that a log has whole."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("\n") else 0


def kill_ten_times(folder: Path) -> None:
    """Kill the run at seeded moments, go on with it each time, and see that little was lost."""
    draw = random.Random(0)
    for goal in sorted(draw.sample(range(1, KILLED["steps"] - 6), 10)):
        process = start(folder)
        while last_step(folder / RECOVERY_LOG) < goal and os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.01))
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        reached = last_step(folder / RECOVERY_LOG)
        kept = load_state(folder / RECOVERY_STATE)["step"]
        assert goal <= reached and kept >= reached - KILLED["save_every"], (goal, reached, kept)


def kill_at(moment: str) -> Callable[[], None]:
    """Kill the process itself when it has kept some states and is about to keep another."""
    name, count = moment.split(" ")
    seen = [0]

    def prepare() -> None:
        owner: Any = Path if name == "replace" else state_module
        real = getattr(owner, name)

        def killing(*args, **kwargs):
            seen[0] += 1
            if seen[0] == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, killing)

    return prepare


# Among the tensors of the first state and of a later one, before the first is in place, before and between renamings.
MOMENTS = ("tensor_bytes 60", "tensor_bytes 600", "replace 1", "replace 8", "replace 9")


def unkillable(folder: Path) -> None:
    """What runs in a process of its own: the run as it is, killed ten times, and killed while its state is written."""
    import sklearn.datasets  # noqa: F401 -- before the forks, not in each

    torch.set_num_threads(1)
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    (folder / "ten").mkdir()
    kill_ten_times(folder / "ten")
    assert os.waitpid(start(folder / "ten"), 0)[1] == 0
    for moment in MOMENTS:
        place = folder / moment
        assert os.WTERMSIG(os.waitpid(start(place, kill_at(moment)), 0)[1]) == signal.SIGKILL
        assert has_state(place / RECOVERY_STATE) == (moment != MOMENTS[0])
        assert os.waitpid(start(place), 0)[1] == 0


if __name__ == "__main__":
    unkillable(Path(sys.argv[1]))
