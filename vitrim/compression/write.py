"""Assembles the small model and writes an output: weights, plan, metrics, recipe, report and card."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from vitrim.compression.cut import CutReport
from vitrim.compression.dtypes import typed_as
from vitrim.compression.job import Job, Models
from vitrim.compression.training import Trained
from vitrim.config.run_context import RunContext
from vitrim.data.inputs import random_inputs
from vitrim.distributed.processes import on_main
from vitrim.metrics.record import Metrics
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin
from vitrim.models.stock import loads_with
from vitrim.output.card import write_card
from vitrim.output.save import save_checked
from vitrim.progress import progress
from vitrim.recover.elastic_files import save_widths
from vitrim.recover.files import RECOVERY_LOG, TRACKER_LOGS
from vitrim.report.collect import NOTHING, Seen, collect, look
from vitrim.storage.documents import write_json
from vitrim.surgery import Plan


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folder in which an output is written, and its final place."""

    folder: Path
    out: Path


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Everything that a finished run produced.

    `whole` is the small model, assembled, and `plan` has paths from its root; those of `cut` are from the encoder.
    """

    job: Job
    models: Models
    whole: nn.Module
    cut: CutReport
    plan: Plan
    metrics: Metrics
    trained: Trained
    seen: Seen


def look_at_both(models: Models, job: Job, context: RunContext) -> Seen:
    """Gather what the report shows of both models, on the main process; others get nothing, since it is large."""
    found: list[Seen] = []
    held_out = None if models.split is None else models.split.held_out or None

    def see() -> None:
        with progress("report", 0, quiet=context.quiet) as bar:
            bar.say("what both models see in the held-out images")
            found.append(look(models.teacher, models.student, job.origin, held_out))

    on_main(see)
    return found[0] if found else NOTHING


def put_together(job: Job, models: Models, stock: Origin | None, *, widened: bool) -> nn.Module:
    """Return the whole model on the CPU, with the student as its encoder and the original's tensor types.

    The original encoder is never copied.

    Args:
        job: holds the original.
        models: hold the student.
        stock: describes the new widths if the library can express them.
        widened: all of it is in float32, since the original's types can't hold it.
    """
    original, student = job.encoder, models.student.cpu()
    student = student if widened else typed_as(original, student)
    whole = student if job.whole is original else copy.deepcopy(job.whole, {id(original): student})
    whole = whole.float() if widened else whole
    backend = backend_of(job.origin.library)
    if stock is not None and backend is not None:
        backend.describe_(whole, stock)
    return whole


def write_output(done: Finished, place: Place, context: RunContext) -> Metrics:
    """Write everything into a folder on the main process, and verify it in a fresh process.

    Returns:
        The metrics as written to metrics.json.
    """
    return on_main(_write, done, place, context)


def _write(done: Finished, place: Place, context: RunContext) -> Metrics:
    """Write weights and plan, verify them, then write everything that describes them."""
    folder, models = place.folder, done.models
    probe = models.split.sample if models.split is not None else random_inputs(done.job.origin)
    inputs = None if probe is None else probe[:4]
    with progress("write", 0, quiet=context.quiet) as bar:
        bar.say("weights, loaded in a fresh process to compare outputs")
        form = {"inputs": inputs, "remote_code": done.job.recipe.remote_code}
        saved = save_checked(folder, done.whole, origin=done.job.origin, plan=done.plan, **form)
    origin = saved.origin
    metrics = replace(
        done.metrics,
        stock=saved.stock,
        remote_code=saved.remote_code,
        loads_with=loads_with(origin, place.out, stock=saved.stock, remote_code=saved.remote_code),
        reload_difference=saved.difference,
        notes=(*done.metrics.notes, *saved.notes),
    )
    if done.trained.slices:
        slices = {ratio: found.below(origin.encoder) for ratio, found in done.trained.slices.items()}
        save_widths(folder, done.whole, slices)
    if done.trained.recovery is not None and context.work is not None:
        _move_logs(context.work, folder)
    done = replace(done, job=replace(done.job, origin=origin), metrics=metrics)
    with progress("write", 0, quiet=context.quiet) as bar:
        bar.say("report and model card")
        _write_documents(done, folder, models.teacher.cpu())
    return metrics


def _move_logs(work: Path, folder: Path) -> None:
    """Move the log of distillation, and the files that trackers wrote, to the output."""
    for name in (RECOVERY_LOG, TRACKER_LOGS):
        if (work / name).exists():
            shutil.move(work / name, folder / name)


def _write_documents(done: Finished, folder: Path, teacher: nn.Module) -> None:
    """Write the recipe, the metrics, the report page, and the model card for a hub."""
    from vitrim.report.page import write_report  # draws with matplotlib, which is slow to import

    job, metrics, recipe = done.job, done.metrics, done.job.recipe
    (folder / "recipe.yaml").write_text(recipe.written_out().dump(), encoding="utf-8")
    write_json(folder / "metrics.json", metrics.to_json())
    page = collect(teacher, job.origin, done.cut.plan, recipe, metrics, done.seen)
    write_report(folder / "report.html", page)
    write_card(folder, job.origin, recipe, metrics)
