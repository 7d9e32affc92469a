"""What two processes do together, for tests/test_parallel.py; torchrun starts it with a folder for what comes of it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import vitrim
from tests.support.distillation import HELD_OUT, Broken, make_images, make_student, make_teacher, weights
from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import open_images
from vitrim.distributed.processes import is_main, join_, on_main, plan_from_main
from vitrim.errors import OutputError, VitrimError
from vitrim.recover import run as run_module
from vitrim.recover.distill import recover_
from vitrim.recover.result import Validation

DIGITS = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
SHARDED = {"fsdp": True}
# As many steps as the three ways are compared over.
LONG = {"steps": 50, "batch_size": 8, "lr": 3e-4, "num_validations": 5}
SHORT = {"steps": 9, "batch_size": 8, "lr": 1e-3, "num_validations": 3}
STOPPED_AT = 6


class Stop(Exception):
    """Ends a run as a crash would, on every process at the same step."""


def train(
    options: dict[str, Any], *, images=None, stop_at: int | None = None, work=None, resume=False
) -> dict[str, Any]:
    """A run from the same start; losses by step, weights, curve and notes."""
    teacher = make_teacher()
    student = make_student(teacher)
    before = weights(teacher)
    flags = [p.requires_grad for p in student.parameters()]

    def stop(found: Validation) -> None:
        if found.step == stop_at:
            raise Stop

    result = recover_(
        student,
        teacher,
        images or make_images(),
        held_out=HELD_OUT,
        options=RecoverOptions(**options),
        context=RunContext(work=work, resume=resume, quiet=True),
        on_validation=stop,
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert flags == [p.requires_grad for p in student.parameters()]
    assert all(type(module).__module__.startswith(("timm", "torch")) for module in student.modules())
    return {"weights": weights(student), **copy.deepcopy(result.__dict__)}


def losses_of(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def stopped(options: dict[str, Any], work: Path) -> None:
    """A run that dies between a validation and its state: the last state is that of the validation before."""
    try:
        train(options, stop_at=STOPPED_AT, work=work)
    except Stop:
        return
    raise AssertionError("the run was not stopped")


def unreadable(num_images: int = 20) -> Any:
    """Images of which every other one can't be read: those that the second process is dealt in the first epoch."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0)).tolist()
    return open_images(Broken(num_images, bad=set(order[1::2])))


def same_curve(folder: Path) -> dict[str, Any]:
    found = {}
    for name, options in (("ddp", {}), ("sharded", SHARDED)):
        found[name] = train({**LONG, **options}, work=folder / name)
        if is_main():
            found[name]["losses"] = losses_of(folder / name / "recovery.jsonl")
    return found


def extras(folder: Path) -> dict[str, Any]:
    """Everything that has a second way to go wrong under shards."""
    everything = {"ema": 0.8, "gradient_accumulation_steps": 2, "batch_size": 4, "weight_decay": (0.1, 0.0)}
    return {
        "everything": train({**SHORT, **everything, **SHARDED, "checkpoint_activations": True}),
        "range test": train({**SHORT, **SHARDED, "lr": None}),
        "bf16": train({**SHORT, **SHARDED, "precision": "bf16"}),
        "uneven": train({**SHORT, **SHARDED, "batch_size": 5, "gradient_accumulation_steps": 2}),
        "unreadable": train({**SHORT, **SHARDED, "steps": 3}, images=unreadable()),
        "before the norm": train({**SHORT, **SHARDED, "features_at": "pre_norm"}),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """States of one process taken up by two, and the other way round."""
    found = {}
    for name, options in (("ddp", {}), ("sharded", SHARDED)):
        work = folder / f"two-{name}"
        stopped({**SHORT, **options, "ema": 0.8}, work)
        if is_main():  # as it is now, for one process to go on from
            shutil.copytree(work, folder / f"left-{name}")
        found[name] = train({**SHORT, **options, "ema": 0.8}, work=work, resume=True)
        found[f"one to {name}"] = train({**SHORT, **options, "ema": 0.8}, work=folder / f"one-{name}", resume=True)
    return found


def diverging(folder: Path) -> dict[str, Any]:
    """A loss that is no number on the second process alone sends both back; a full disk ends both."""
    real, seen = run_module.feature_loss, [0]

    def poisoned(*args: Any) -> torch.Tensor:
        loss = real(*args)
        seen[0] += int(torch.is_grad_enabled() and loss.requires_grad)
        return loss * float("nan") if seen[0] == 6 and dist.get_rank() == 1 else loss

    found = {}
    for name, kwargs in (("on disk", {"work": folder / "nan"}), ("in memory", {})):
        seen[0] = 0
        run_module.feature_loss = poisoned
        found[name] = train({**SHORT, **SHARDED, "ema": 0.8}, **kwargs)
    run_module.feature_loss = real
    return found


def failing(folder: Path) -> dict[str, Any]:
    """Errors of one process reach both."""
    said = {}
    sync = os.fsync

    def full(number: int) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        sync(number)

    os.fsync = full
    try:
        train({**SHORT, **SHARDED}, work=folder / "full")
    except OutputError as error:
        said["full disk"] = str(error)
    finally:
        os.fsync = sync
    for name, error in (("for users", VitrimError("no such thing")), ("other", ZeroDivisionError("by nought"))):

        def fail(error: Exception = error) -> None:
            raise error

        try:
            on_main(fail)
        except (VitrimError, ZeroDivisionError) as caught:
            said[name] = f"{type(caught).__name__}: {caught}"
    try:
        vitrim.compress(DIGITS, hidden_dim=8, out=folder / "taken", quiet=True)
    except OutputError as error:
        said["taken"] = str(error)
    return said


def compressed(out: Path | None) -> dict[str, Any]:
    """The main job from start to end."""
    recipe = vitrim.Recipe.parse(
        {"mlp_ratio": 1, "calibrate": {"batch_size": 16}, "repair": {"refit_steps": 5, "max_tokens": 2048}}
    )
    recover = {"steps": 4, "batch_size": 16, "lr": 1e-4, "fsdp": True}
    images = [images for images, *_ in make_images(64).loader(batch_size=64)]
    result = vitrim.compress(make_teacher(), data=images, recipe=recipe, recover=recover, out=out, quiet=True)
    metrics = {name: value for name, value in result.metrics.to_json().items() if name != "seconds"}
    return {"sha256": result.plan.sha256, "weights": weights(result.model), "metrics": json.dumps(metrics)}


def taken_over(folder: Path) -> dict[str, Any]:
    """A process without a cut takes the main one's."""
    recipe = vitrim.Recipe.parse({"hidden_dim": 16})
    plan = vitrim.compress(make_teacher(), recipe=recipe, quiet=True).plan
    teacher = make_teacher()
    student = make_student(teacher, 16) if is_main() else make_teacher()
    got = plan_from_main(plan if is_main() else None, student)
    assert got is not None
    nothing = plan_from_main(None, student) is None
    return {"sha256": got.sha256, "weights": weights(student), "nothing": nothing}


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    join_("cpu")
    found = {}
    for work in (same_curve, extras, resumed, diverging, failing, taken_over):
        found[work.__name__] = work(folder)
    found["compressed"] = compressed(folder / "out")
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
