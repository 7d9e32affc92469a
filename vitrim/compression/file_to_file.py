"""Prunes a checkpoint file to file: one layer in memory at a time, the model itself never built.

Told in order: find the MLPs on the meta device, pick the units of each (and repair, given images, with the blocks read
as they are needed), then pass every tensor from the source to the output, cut where it must be. What is picked and
what is written is remembered as it happens, so a killed run goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitrim.compression.cut import with_stock_width
from vitrim.compression.estimate import check_space, estimate_run, output_bytes
from vitrim.compression.selection import (
    Journal,
    looks_at_images,
    needs_for,
    pick_and_repair,
    pick_on_weights,
    placement_within,
)
from vitrim.compression.source import Job, check_tensors, open_job
from vitrim.config.recipe import Recipe
from vitrim.cost.memory import parse_bytes
from vitrim.data import ImageStream, first_images
from vitrim.data.inputs import check_inputs, open_inputs
from vitrim.errors import CheckpointError, OutputError, RecipeError, VitrimError
from vitrim.methods import SiteMethod, find_method, make_method
from vitrim.models.load import build_empty
from vitrim.models.stock import loads_with, stock_origin, why_not_stock
from vitrim.output.load import read_about
from vitrim.output.provenance import environment, versions
from vitrim.output.save import write_configs
from vitrim.output.stage import PICKS, staged_output
from vitrim.progress import progress
from vitrim.storage.documents import write_json
from vitrim.storage.tensor_files import TensorFiles, open_tensors, tensor_bytes
from vitrim.storage.tensor_writer import TensorWriter
from vitrim.surgery import Edit, KeepUnits, Plan, edit_of, reshape_, transform

SHARD_BYTES = 2 * 10**9
Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune_checkpoint` did; the plan is without repaired tensors, which stand in the output."""

    out: Path
    plan: Plan
    metrics: Mapping[str, Any]


def prune_checkpoint(
    source: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    data: Any = None,
    memory_budget: str | int | None = None,
    shard_size: str | int = SHARD_BYTES,
    resume: bool = False,
    quiet: bool = False,
) -> Pruned:
    """Prune a checkpoint that need not fit in memory.

    Args:
        source: a folder of timm, transformers or open_clip (one file, or shards with an index), `timm/NAME@FILE`, or
            `hf/ORG/NAME` (its files are downloaded first).
        out: folder to write; it must not exist.
        recipe: method, width, seed, repair; recovery is not possible here.
        data: images for selection and repair; without, units are picked on weights alone.
        memory_budget: bytes, or such as "4GB", that calibration may use; what is over goes to disk.
        shard_size: largest size of a file, for libraries that read shards; others get one file.
        resume: go on with a run into this folder that was killed.
        quiet: show no progress.

    Returns:
        The plan, and sizes and errors.

    Raises:
        VitrimError: the input is wrong or damaged; nothing is written.
    """
    started, recipe, out = time.monotonic(), recipe or Recipe(), Path(out)
    if recipe.recover is not None:
        raise RecipeError("recover: a checkpoint pruned file to file is not distilled; drop it, or use compress.")
    if recipe.then or not issubclass(find_method(recipe.method), SiteMethod):
        raise RecipeError(
            "method: file to file only single methods that cut hidden units MLP by MLP run; use compress."
        )
    if recipe.allocate is not None:
        raise RecipeError("allocate: error curves need the whole model in memory; use compress, or give its widths.")
    job = open_job(source, recipe)
    recipe.check_widths(job.sites)
    recipe = with_stock_width(recipe, job.origin, job.sites)
    check_tensors(job)
    data = recipe.data if data is None else data
    task = _Task(
        job=job,
        recipe=recipe,
        batches=None if data is None or not looks_at_images(recipe) else _batches(job, recipe, data),
        memory_budget=memory_budget,
        shard_bytes=parse_bytes(shard_size),
        resume=resume,
        quiet=quiet,
    )
    with staged_output(out, resume=resume) as (folder, work):
        journal = Journal(work, task.fingerprint(), job.sites, resume=resume)
        try:
            plan, metrics = _produce(task, journal, folder, work)
        except (VitrimError, OSError, SafetensorError):
            if not journal.resumed:  # what a killed run has left is worth more than a wrong option now
                (work / PICKS).unlink(missing_ok=True)
            raise
    metrics["loads_with"] = loads_with(job.origin, out, stock=metrics["stock"])
    metrics["seconds"] = round(time.monotonic() - started, 1)
    return Pruned(out=out, plan=plan.without_tensors(), metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What was asked for; `batches` are calibration images, None where nothing looks at any."""

    job: Job
    recipe: Recipe
    batches: Sequence[Tensor] | None
    memory_budget: str | int | None
    shard_bytes: int
    resume: bool
    quiet: bool

    def fingerprint(self) -> dict[str, Any]:
        """What decides about the picks, so that a run is only gone on with by the same one."""
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


def _batches(job: Job, recipe: Recipe, data: Any) -> list[Tensor]:
    """Calibration images, drawn as `compress` draws them."""
    options = recipe.calibrate
    images = open_inputs(data, job.origin)
    if isinstance(images, ImageStream):
        images, _ = images.take(options.num_images, seed=recipe.seed)
    return first_images(images, options.num_images, seed=recipe.seed, batch_size=options.batch_size)[0]


def _produce(task: _Task, journal: Journal, folder: Path, work: Path) -> tuple[Plan, dict[str, Any]]:
    """Fill the folder of the output; the plan and what was measured."""
    job, recipe = task.job, task.recipe
    notes = _decide(task, journal, work)
    plan = _plan(job, recipe, journal.edits)
    written = _write(task, plan, folder, work)
    metrics = {
        "model": job.origin.name,
        "method": recipe.method,
        **plan.describe(),
        "cut_errors": {path: errors for path, errors in journal.errors.items() if errors},
        **written,
        "notes": [*notes, *([] if written["stock"] else [why_not_stock(job.origin, plan.edits)])],
        "environment": environment(),
    }
    (folder / "recipe.yaml").write_text(recipe.dump())
    write_json(folder / "metrics.json", metrics)
    return plan, metrics


def _decide(task: _Task, journal: Journal, work: Path) -> list[str]:
    """Say what the run will need, then pick the units of every MLP, and repair where there are images; notes."""
    job, recipe, batches = task.job, task.recipe, task.batches
    if not journal.resumed:  # a part of it may be there already
        check_space(work, output_bytes(job, recipe))
    if batches is None:
        if not task.quiet:
            _announce(job, estimate_run(job, recipe).line(images=False))
        pick_on_weights(job, recipe, journal, quiet=task.quiet)
        missed = "no images given: units were picked on weights alone, and nothing was repaired; pass data for that."
        return [missed] if looks_at_images(recipe) else []
    encoder = job.model.get_submodule(job.origin.encoder)
    check_inputs(copy.deepcopy(encoder).to("meta"), job.origin, batches)
    needs = needs_for(job, recipe, batches)
    way = placement_within(needs, task.memory_budget, work)
    if not task.quiet:
        _announce(job, estimate_run(job, recipe, needs, num_images=sum(map(len, batches))).line(images=True))
    return pick_and_repair(job, recipe, batches, way, journal, quiet=task.quiet)


def _announce(job: Job, line: str) -> None:
    """One line up front."""
    print(f"{job.origin.name}: {line}", file=sys.stderr)


def _plan(job: Job, recipe: Recipe, edits: Sequence[KeepUnits]) -> Plan:
    """The plan, its edits in the order of the sites."""
    options = make_method(recipe.method, recipe.options).model_dump(mode="json")
    order = {site.path: index for index, site in enumerate(job.sites)}
    ordered = tuple(sorted(edits, key=lambda edit: order[edit.site.path]))
    return Plan(edits=ordered, method=recipe.method, options=options, seed=recipe.seed, versions=versions())


def _shard_bytes(task: _Task, plan: Plan) -> int | None:
    """Size of a shard; None for one file, where the library reads no shards and shall load the result."""
    job = task.job
    return task.shard_bytes if job.backend.SHARDED or stock_origin(job.origin, plan.edits) is None else None


def _write(task: _Task, plan: Plan, folder: Path, work: Path) -> dict[str, Any]:
    """Config and tensors, checked as they stand on disk, in the folder of the output."""
    job = task.job
    touched = edit_of(plan.edits)
    student = build_empty(job.origin)
    reshape_(student, plan.edits)
    dtype = job.files.infos[next(name for name in job.names if job.names[name] in touched)].dtype
    expected = write_configs(folder, student.to(dtype), origin=job.origin, plan=plan)
    weights, layout = work / "weights", _layout(job, plan)
    _check_shapes(job, layout, student)
    weights.mkdir(exist_ok=True)
    writer = TensorWriter(
        weights,
        layout,
        stem=expected.removesuffix(".safetensors"),
        shard_bytes=_shard_bytes(task, plan),
        journal=work / "written.jsonl",
        resume=task.resume,
    )
    check_space(work, writer.total_bytes - sum(writer.places[name].num_bytes for name in writer.digests))
    _pass_through(job, plan, writer, quiet=task.quiet)
    _check_written(weights, layout, writer)
    for path in weights.iterdir():
        path.rename(folder / path.name)
    sizes = [info.num_bytes for info in job.files.infos.values()]
    return {
        "parameters": [sum(t.numel() for t in model.parameters()) for model in (job.model, student)],
        "bytes": [sum(sizes), writer.total_bytes],
        "stock": bool(read_about(folder)["stock"]),
    }


def _layout(job: Job, plan: Plan) -> Layout:
    """Names, types and shapes of the output, in the order of the source."""
    fakes = {job.names.get(name, name): tensor for name, tensor in job.files.fakes().items()}
    shapes = [tuple(tensor.shape) for _, tensor in transform(fakes, _shapes_alone(plan))]
    return [(name, info.dtype, shape) for (name, info), shape in zip(job.files.infos.items(), shapes, strict=True)]


def _check_shapes(job: Job, layout: Layout, student: nn.Module) -> None:
    """Hold the output's shapes to those of the cut architecture.

    Raises:
        CheckpointError: one differs.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    for name, _, shape in layout:
        if shape != wanted.get(job.names.get(name, ""), shape):
            raise CheckpointError(f"{name}: would be {shape}, the cut architecture has {wanted[job.names[name]]}.")


def _pass_through(job: Job, plan: Plan, writer: TensorWriter, *, quiet: bool) -> None:
    """Pass every tensor that is not there yet from the source to the output; what no edit touches by its bytes."""
    touched = edit_of(plan.edits)
    try:
        with progress("write", len(writer.places), quiet=quiet) as bar:
            bar.done = len(writer.digests)
            for name in [name for name in job.files if name not in writer.digests]:
                edit = touched.get(job.names.get(name, ""))
                if edit is None:
                    writer.write(name, job.files.chunks(name))
                else:
                    ((_, tensor),) = transform({job.names[name]: job.files[name]}, [edit])
                    writer.write(name, [tensor_bytes(tensor)])
                bar.advance(1, name)
        writer.close()
    finally:
        writer.abandon()


def _check_written(weights: Path, layout: Layout, writer: TensorWriter) -> None:
    """Read the output back: names, types, shapes, and the checksum of every tensor as it was read or made.

    Raises:
        OutputError: something differs.
    """
    written = open_tensors(weights)
    found = {name: (info.dtype, info.shape) for name, info in written.infos.items()}
    wrong = next(writer.wrong(written), None) if found == {name: (d, s) for name, d, s in layout} else "a header"
    if wrong is not None:
        raise OutputError(f"{weights}: {wrong} reads back otherwise than it was written; the disk may be failing.")


def _shapes_alone(plan: Plan) -> list[Edit]:
    """Edits whose repaired tensors are empty ones of the right shape, so that shapes are known without reading."""
    return [
        replace(edit, tensors=edit.tensors.fakes()) if isinstance(edit.tensors, TensorFiles) else edit
        for edit in plan.edits
    ]
