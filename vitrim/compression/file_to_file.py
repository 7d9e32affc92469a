"""Prunes a checkpoint file to file: one layer in memory at a time, the model itself never built.

In order: find the MLPs on the meta device, pick the units of each (and, given images, repair, with blocks read when
needed), then copy every tensor from the source to the output, cut where needed. What is picked and what is written is
recorded at once, so that a killed run can be resumed.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vitrim.checked import NOT_GIVEN, NotGiven
from vitrim.compression.budget import near_stock, solve_widths
from vitrim.compression.checkpoint_files import Written, write_checkpoint
from vitrim.compression.estimate import check_space, estimate_run, output_bytes
from vitrim.compression.selection import (
    Journal,
    estimate_calibration,
    looks_at_images,
    placement_within,
    select_and_repair,
    select_on_weights,
)
from vitrim.compression.source import CheckpointJob, check_tensors, check_values, open_checkpoint
from vitrim.compression.write import Place
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.memory import parse_bytes
from vitrim.data import ImageStream
from vitrim.data.inputs import check_inputs, open_inputs, random_inputs
from vitrim.data.split import Calibration, draw_calibration, on_copies
from vitrim.errors import OutputError, RecipeError, VitrimError
from vitrim.methods import Method, SiteMethod, find_method
from vitrim.metrics.record import Metrics
from vitrim.models.stock import loads_with, why_not_stock
from vitrim.output.card import write_card
from vitrim.output.provenance import environment, versions
from vitrim.output.result import Result
from vitrim.output.stage import PICKS, check_place, staged_output
from vitrim.stopping import stoppable
from vitrim.storage.documents import write_json
from vitrim.storage.tensor_files import tensor_bytes
from vitrim.storage.training_files import Which
from vitrim.surgery import KeepUnits, Plan
from vitrim.torch_state import own_torch_state

SHARD_BYTES = 2 * 10**9
log = logging.getLogger("vitrim")


@own_torch_state()
@stoppable()
def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    data: Any = NOT_GIVEN,
    method: str | Method | NotGiven = NOT_GIVEN,
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    mlp_ratio: float | None = None,
    keep_ratio: float | None = None,
    hidden_dim: int | None = None,
    memory_budget: str | int | None = None,
    shard_size: str | int = SHARD_BYTES,
    model_args: Mapping[str, Any] | None = None,
    weights: Which | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Result:
    """Prune a checkpoint that need not fit in memory.

    At most one of `params_ratio`, `macs_ratio`, `mlp_ratio`, `keep_ratio` and `hidden_dim` sets the size; by default
    half of the encoder's parameters stay. Every argument that is given overrides the recipe.

    Args:
        source: a folder of timm, transformers or open_clip (one file, or shards with an index), `timm/NAME@FILE`, or
            `hf/ORG/NAME` (its files are downloaded first).
        out: folder to write; it must not exist, unless `overwrite`.
        recipe: a Recipe, a mapping of its keys, or a YAML file; recovery is not possible here.
        data: images for selection and repair; by default units are picked from weights alone.
        method: name of a method that cuts hidden units of each MLP, or an instance of a class in `vitrim.methods`.
        params_ratio: share of the encoder's parameters that stays.
        macs_ratio: share of the encoder's multiply-accumulates that stays.
        mlp_ratio: hidden width as a multiple of the model width, as in timm.
        keep_ratio: share of each MLP's hidden units that stays.
        hidden_dim: hidden units that stay in each MLP.
        memory_budget: memory that calibration may use, in bytes or as text such as "4GB"; the rest goes to disk.
        shard_size: largest size of a file, for libraries that read shards; others get one file.
        model_args: arguments of the architecture of `timm/NAME@FILE`, where its tensors don't fix them.
        weights: which weights of a training checkpoint: "auto" takes averaged ones (EMA) where there are any, "raw" the
            trained ones.
        resume: continue a killed run that was writing this folder.
        overwrite: replace an output of vitrim at `out`, at the end; without `resume`, delete a stopped run's state.
        quiet: show no progress.

    Returns:
        The plan, sizes and errors; the model itself is never built.

    Raises:
        VitrimError: the input is wrong or damaged; nothing is written.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> import tempfile
        >>> from pathlib import Path
        >>> out = Path(tempfile.mkdtemp()) / "small"
        >>> result = vitrim.prune_checkpoint(digits.removeprefix("local-dir:"), out, method="magnitude", quiet=True)
        >>> result.metrics.after.parameters <= 0.5 * result.metrics.before.parameters
        True
    """
    asked = {
        "method": method,
        "params_ratio": params_ratio,
        "macs_ratio": macs_ratio,
        "mlp_ratio": mlp_ratio,
        "keep_ratio": keep_ratio,
        "hidden_dim": hidden_dim,
        "model_args": model_args,
        "weights": weights,
    }
    given = {key: value for key, value in asked.items() if value is not None and value is not NOT_GIVEN}
    chosen = Recipe.of(recipe).updated(given)
    _check_possible(chosen)
    check_place(Path(out), resume=resume, overwrite=overwrite)
    task = _open_task(
        str(source),
        chosen,
        chosen.data if data is NOT_GIVEN else data,
        memory_budget=memory_budget,
        shard_size=shard_size,
    )
    context = RunContext(resume=resume, quiet=quiet, device=chosen.device, seed=chosen.seed)
    with staged_output(Path(out), resume=resume, overwrite=overwrite) as (folder, work):
        return _run(task, replace(context, work=work), Place(folder=folder, out=Path(out)))


def _check_possible(recipe: Recipe) -> None:
    """Refuse recipes that need the whole model in memory.

    Raises:
        RecipeError: the recipe asks for recovery, a modeling file, several steps or allocation, or for a method that
            needs the whole model.
    """
    if recipe.recover is not None:
        raise RecipeError("recover: a checkpoint pruned file to file is not distilled; drop it, or use compress.")
    if recipe.remote_code:
        raise RecipeError(
            "remote_code: its file is only written where the whole model can be loaded to check it; use compress."
        )
    step = recipe.steps[0]
    if len(recipe.steps) > 1 or not issubclass(find_method(step.method), SiteMethod):
        raise RecipeError(
            "method: file to file only single methods that cut hidden units MLP by MLP run; use compress."
        )
    if step.make_method().goes_by() != "widths":
        raise RecipeError("options.parts: attention is cut in memory alone; use compress, or parts='mlp'.")
    method = step.make_method()
    if isinstance(method, SiteMethod) and method.weighs_by_features():
        raise RecipeError("options.select_on: 'features' needs the whole model in memory; use compress, or 'outputs'.")
    if step.allocate is not None:
        raise RecipeError("allocate: error curves need the whole model in memory; use compress, or give its widths.")


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A checked request.

    `widths` are hidden units that stay, by path; `batches` are calibration images, None if nothing uses any.
    """

    job: CheckpointJob
    recipe: Recipe
    widths: Mapping[str, int]
    notes: tuple[str, ...]
    batches: Sequence[Tensor] | None
    images: Mapping[str, int]
    memory_budget: str | int | None
    shard_bytes: int

    def fingerprint(self) -> dict[str, Any]:
        """Return what the selection depends on, so that a run is resumed only with the same inputs."""
        origin, images = self.job.origin, None
        stats = {info.file.resolve(): info.file.stat() for info in self.job.files.infos.values()}
        if self.batches is not None:
            images = [sum(map(len, self.batches)), hashlib.blake2b(tensor_bytes(self.batches[0])).hexdigest()]
        return {
            "architecture": [origin.library, origin.architecture, dict(origin.model_args)],
            "files": {str(file): [stat.st_size, stat.st_mtime_ns] for file, stat in sorted(stats.items())},
            "recipe": self.recipe.model_copy(update={"model": None}).dump(),
            "images": images,
        }


def _open_task(
    source: str, recipe: Recipe, data: Any, *, memory_budget: str | int | None, shard_size: str | int
) -> _Task:
    """Open the checkpoint and the images, and turn the budget into widths."""
    job = open_checkpoint(source, recipe)
    widths, notes = checkpoint_widths(job, recipe)
    check_tensors(job)
    calibrated = data is not None and looks_at_images(recipe)
    if calibrated:  # else each tensor is checked when it is read, to pick units or to be copied
        check_values(job)
    drawn, said = _drawn(job, recipe, data) if calibrated else (None, [])
    return _Task(
        job=job,
        recipe=recipe,
        widths=widths,
        notes=(*job.notes, *notes, *said),
        batches=None if drawn is None else drawn.batches,
        images={} if drawn is None else drawn.counts(),
        memory_budget=memory_budget,
        shard_bytes=parse_bytes(shard_size),
    )


def checkpoint_widths(job: CheckpointJob, recipe: Recipe) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the hidden units that stay in each MLP of a checkpoint, by path, and notes.

    Raises:
        BudgetError: the MLPs can't meet the budget.
    """
    sites, step, note = job.sites_in_encoder, recipe.steps[0], None
    units: Mapping[str, int] = solve_widths(recipe.width(), sites, job.encoder, _meta_inputs(job))
    if not step.exact and step.widths is None:
        units, note = near_stock(recipe.width(), units, job.origin, sites)
    widths = {site.path: units[inner.path] for site, inner in zip(job.sites, sites, strict=True)}
    return widths, () if note is None else (note,)


def _meta_inputs(job: CheckpointJob) -> Tensor | None:
    """Return inputs of the model's input size on the meta device, or None if the size is unknown."""
    inputs = random_inputs(job.origin, 1)
    return None if inputs is None else inputs.to("meta")


def _drawn(job: CheckpointJob, recipe: Recipe, data: Any) -> tuple[Calibration, list[str]]:
    """Draw calibration images in the same way as `compress`; return them, and notes on them."""
    options = recipe.calibrate
    images = open_inputs(data, job.origin)
    if isinstance(images, ImageStream):
        images, _ = images.take(options.num_images, seed=recipe.seed)
    drawn = draw_calibration(images, options, recipe.seed, max(site.d_hidden for site in job.sites_in_encoder))
    return drawn, [*images.remarks(), *on_copies(drawn.num_repeated, 0)]


def _run(task: _Task, context: RunContext, place: Place) -> Result:
    """Decide, write and measure; the state of a killed run is kept if this run resumes it."""
    started, work = time.monotonic(), context.work
    assert work is not None
    journal = Journal(work, task.fingerprint(), task.job.sites, resume=context.resume)
    try:
        notes = _decide(task, journal, work, quiet=context.quiet)
        plan = _plan(task, journal.edits)
        written = write_checkpoint(task.job, plan, place.folder, work, shard_bytes=task.shard_bytes, context=context)
        metrics = _metrics(task, plan, journal, written, (*task.notes, *notes), place)
        metrics = replace(metrics, seconds=round(time.monotonic() - started, 1))
        (place.folder / "recipe.yaml").write_text(task.recipe.dump(), encoding="utf-8")
        write_json(place.folder / "metrics.json", metrics.to_json())
        write_card(place.folder, task.job.origin, task.recipe, metrics)
    except (VitrimError, OSError, SafetensorError) as error:
        # After an error of the input the next run starts from another one; a full disk costs no picks.
        of_input = isinstance(error, VitrimError) and not isinstance(error, OutputError)
        if not journal.resumed and (of_input or not journal.edits):
            (work / PICKS).unlink(missing_ok=True)
        raise
    return Result(model=None, plan=plan.without_tensors(), metrics=metrics, out=place.out)


def _metrics(
    task: _Task, plan: Plan, journal: Journal, written: Written, notes: Sequence[str], place: Place
) -> Metrics:
    """Combine everything that was measured into one record."""
    origin = task.job.origin
    return Metrics(
        model=origin.name,
        method=plan.method,
        encoder=origin.encoder,
        before=written.before,
        after=written.after,
        images=task.images,
        cut_errors={path: errors for path, errors in journal.errors.items() if errors},
        stock=written.stock,
        loads_with=loads_with(origin, place.out, stock=written.stock),
        notes=(*notes, *written.notes, *([] if written.stock else [why_not_stock(origin, plan.edits)])),
        environment=environment(),
        **plan.describe(),
    )


def _decide(task: _Task, journal: Journal, work: Path, *, quiet: bool) -> list[str]:
    """Log what the run will need, select the units of every MLP, and repair if there are images; return notes."""
    job, recipe, widths, batches = task.job, task.recipe, task.widths, task.batches
    if not journal.resumed:  # a resumed run may have written a part of it already
        check_space(work, output_bytes(job, widths))
    if batches is None:
        log.info("%s: %s", job.origin.name, estimate_run(job, recipe, widths).line(images=False))
        notes = select_on_weights(job, recipe, widths, journal, quiet=quiet)
        missed = "no images given: units were picked on weights alone, and nothing was repaired; pass data for that."
        return notes or ([missed] if looks_at_images(recipe) else [])
    check_inputs(copy.deepcopy(job.encoder).to("meta"), job.origin, batches)
    needs = estimate_calibration(job, recipe, widths, batches)
    placement = placement_within(needs, task.memory_budget, work)
    said = estimate_run(job, recipe, widths, needs, num_images=sum(map(len, batches)))
    log.info("%s: %s", job.origin.name, said.line(images=True))
    return select_and_repair(job, recipe, widths, batches, placement, journal, quiet=quiet)


def _plan(task: _Task, edits: Sequence[KeepUnits]) -> Plan:
    """Return the plan, with edits in the order of the MLPs."""
    method = task.recipe.steps[0].make_method()
    of_path = {edit.site.path: edit for edit in edits}
    return Plan(
        edits=tuple(of_path[site.path] for site in task.job.sites),
        method=method.name,
        options=method.model_dump(mode="json"),
        seed=task.recipe.seed,
        versions=versions(),
    )
