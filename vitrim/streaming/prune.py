"""Prunes a checkpoint file to file: one layer in memory at a time, the model itself never built.

Told in order: find the MLPs on the meta device, pick the units of each (and repair, given images, with the blocks read
as they are needed), then pass every tensor from the source to the output, cut where it must be. What is picked and
what is written is remembered as it happens, so a killed run goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrim.budget import parse_bytes, show_bytes
from vitrim.checkpoint import PICKS, staged_output, versions, write_configs, write_json
from vitrim.cut import with_stock_width
from vitrim.errors import OutputError, RecipeError, VitrimError
from vitrim.evaluation import environment
from vitrim.methods import find_method
from vitrim.models.load import build_empty
from vitrim.models.stock import loads_with, stock_origin, why_not_stock
from vitrim.progress import progress
from vitrim.recipe import Recipe
from vitrim.streaming.picks import decide
from vitrim.streaming.source import Job, check_tensors, open_job
from vitrim.surgery import edit_of, reshape_, transform
from vitrim.tensor_files import TensorFiles, open_tensors, tensor_bytes
from vitrim.tensor_writer import TensorWriter
from vitrim.types import KeepUnits, Plan

SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune_checkpoint` did."""

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
    job = open_job(source, recipe)
    recipe = with_stock_width(recipe, job.origin, job.sites)
    check_tensors(job)
    with staged_output(out, resume=resume) as (folder, work):
        try:
            edits, errors = decide(job, recipe, data, work, memory_budget, resume=resume, quiet=quiet)
            plan = _plan(job, recipe, edits)
            metrics = _write(job, plan, folder, work, _shard_bytes(job, plan, shard_size), resume=resume, quiet=quiet)
        except (VitrimError, OSError):
            (work / PICKS).unlink(missing_ok=True)  # what is wrong with the input stays wrong: nothing to go on from
            raise
        about = {
            "model": job.origin.name,
            "method": recipe.method,
            "widths": {edit.site.path: [edit.site.d_hidden, edit.width] for edit in plan.edits},
            "cut_errors": errors,
            **metrics,
            "environment": environment(),
        }
        (folder / "recipe.yaml").write_text(recipe.dump())
        write_json(folder / "metrics.json", about)
    about["loads_with"] = loads_with(job.origin, out, stock=about["stock"])
    return Pruned(out=out, plan=plan, metrics={**about, "seconds": round(time.monotonic() - started, 1)})


def _plan(job: Job, recipe: Recipe, edits: Sequence[KeepUnits]) -> Plan:
    """The plan, its edits in the order of the sites."""
    options = find_method(recipe.method).parse_options(recipe.options).model_dump(mode="json")
    order = {site.path: index for index, site in enumerate(job.sites)}
    ordered = tuple(sorted(edits, key=lambda edit: order[edit.site.path]))
    return Plan(edits=ordered, method=recipe.method, options=options, seed=recipe.seed, versions=versions())


def _shard_bytes(job: Job, plan: Plan, shard_size: str | int) -> int | None:
    """Size of a shard; None for one file, where the library reads no shards and shall load the result."""
    if not job.reader.SHARDED and stock_origin(job.origin, plan.edits) is not None:
        return None
    return parse_bytes(shard_size)


def _write(
    job: Job, plan: Plan, folder: Path, work: Path, shard_bytes: int | None, *, resume: bool, quiet: bool
) -> dict[str, Any]:
    """Pass every tensor from the source to the output, check what was written, and put it in its place."""
    touched = edit_of(plan.edits)
    fakes = {job.names.get(name, name): tensor for name, tensor in job.files.fakes().items()}
    shapes = [tuple(tensor.shape) for _, tensor in transform(fakes, _shapes_alone(plan))]
    layout = [(name, info.dtype, shape) for (name, info), shape in zip(job.files.infos.items(), shapes, strict=True)]
    student = build_empty(job.origin)
    reshape_(student, plan.edits)
    dtype = job.files.infos[next(name for name in job.names if job.names[name] in touched)].dtype
    expected = write_configs(folder, student.to(dtype), origin=job.origin, plan=plan)
    weights = work / "weights"
    weights.mkdir(exist_ok=True)
    writer = TensorWriter(
        weights,
        layout,
        stem=expected.removesuffix(".safetensors"),
        shard_bytes=shard_bytes,
        journal=work / "written.jsonl",
        resume=resume,
    )
    _check_space(work, writer)
    try:
        with progress("write", len(layout), quiet=quiet) as bar:
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
    wrong = next(writer.wrong(open_tensors(weights)), None)
    if wrong is not None:
        raise OutputError(f"{weights}: {wrong} reads back otherwise than it was written; the disk may be failing.")
    for path in weights.iterdir():
        path.rename(folder / path.name)
    stock = json.loads((folder / "vitrim.json").read_text())["stock"]
    sizes = [info.num_bytes for info in job.files.infos.values()]
    return {
        "parameters": [sum(t.numel() for t in model.parameters()) for model in (job.model, student)],
        "bytes": [sum(sizes), writer.total_bytes],
        "stock": stock,
        "notes": [] if stock else [why_not_stock(job.origin, plan.edits)],
    }


def _shapes_alone(plan: Plan) -> list[KeepUnits]:
    """Edits whose repaired tensors are empty ones of the right shape, so that shapes are known without reading."""
    return [
        replace(edit, repaired=edit.repaired.fakes()) if isinstance(edit.repaired, TensorFiles) else edit
        for edit in plan.edits
    ]


def _check_space(work: Path, writer: TensorWriter) -> None:
    """Refuse before the first byte where the disk can't hold the output.

    Raises:
        OutputError: it can't.
    """
    missing = writer.total_bytes - sum(writer.places[name].num_bytes for name in writer.digests)
    free = shutil.disk_usage(work).free
    if missing > free:
        raise OutputError(f"{work}: needs {show_bytes(missing)}, the disk has {show_bytes(free)} left; make room.")
