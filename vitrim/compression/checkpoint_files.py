"""Copies every tensor of a checkpoint from the source to the output, cuts those that change, and reads them back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vitrim.compression.dtypes import too_large_in, wider
from vitrim.compression.estimate import check_space
from vitrim.compression.source import CheckpointJob
from vitrim.config.run_context import RunContext
from vitrim.cost.count import num_parameters
from vitrim.errors import CheckpointError, OutputError
from vitrim.metrics.record import ModelCost
from vitrim.models.load import build_empty
from vitrim.models.stock import stock_origin
from vitrim.output.load import read_about
from vitrim.output.save import write_configs
from vitrim.output.verify import verify_config
from vitrim.progress import progress
from vitrim.storage.tensor_files import TensorFiles, open_tensors, tensor_bytes
from vitrim.storage.tensor_writer import TensorWriter
from vitrim.surgery import Edit, Plan, edit_of, reshape_, transform

Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Written:
    """Sizes of source and output, whether the model's own library can load the output, and notes for the user."""

    before: ModelCost
    after: ModelCost
    stock: bool
    notes: tuple[str, ...] = ()


def _shard_bytes(job: CheckpointJob, plan: Plan, shard_bytes: int) -> int | None:
    """Return the size limit of a file; None for a single file, if the library to load the result reads no shards."""
    return shard_bytes if job.backend.SHARDED or stock_origin(job.origin, plan.edits) is None else None


def write_checkpoint(
    job: CheckpointJob, plan: Plan, folder: Path, work: Path, *, shard_bytes: int, context: RunContext
) -> Written:
    """Write config and tensors into an output folder, and check them as they are on disk.

    Args:
        job: the checkpoint.
        plan: the edits.
        folder: the folder of the output.
        work: folder for tensors until all are complete.
        shard_bytes: largest size of a file, for libraries that read shards.
        context: whether the run resumes, and whether it shows progress.

    Raises:
        CheckpointError: the tensors' shapes differ from those of the cut architecture.
        ModelError: a repaired tensor is not finite.
        OutputError: the disk is too small, or the bytes read back differ from those written.
    """
    touched = edit_of(plan.edits)
    student = build_empty(job.origin)
    reshape_(student, plan.edits)
    dtype = job.files.infos[next(name for name in job.names if job.names[name] in touched)].dtype
    why_wide = too_large_in(plan.edits, {job.names[name]: job.files.infos[name].dtype for name in job.names})
    wide = why_wide is not None
    expected = write_configs(folder, student.to(wider(dtype) if wide else dtype), origin=job.origin, plan=plan)
    weights, layout = work / "weights", _layout(job, plan, wide=wide)
    _check_shapes(job, layout, student)
    weights.mkdir(exist_ok=True)
    writer = TensorWriter(
        weights,
        layout,
        stem=expected.removesuffix(".safetensors"),
        shard_bytes=_shard_bytes(job, plan, shard_bytes),
        journal=work / "written.jsonl",
        resume=context.resume,
    )
    check_space(work, writer.total_bytes - sum(writer.places[name].num_bytes for name in writer.digests))
    _pass_through(job, plan, writer, wide=wide, quiet=context.quiet)
    _check_written(weights, layout, writer)
    for path in weights.iterdir():
        path.rename(folder / path.name)
    stock = bool(read_about(folder)["stock"])
    verify_config(folder, origin=job.origin, stock=stock)
    sizes = [info.num_bytes for info in job.files.infos.values()]
    before, after = (
        ModelCost(parameters=num_parameters(model), num_bytes=num_bytes)
        for model, num_bytes in ((job.model, sum(sizes)), (student, writer.total_bytes))
    )
    return Written(before=before, after=after, notes=() if why_wide is None else (why_wide,), stock=stock)


def _layout(job: CheckpointJob, plan: Plan, *, wide: bool) -> Layout:
    """Return names, types and shapes of the output, in the order of the source; `wide` makes short floats float32."""
    fakes = {job.names.get(name, name): tensor for name, tensor in job.files.fakes().items()}
    shapes = [tuple(tensor.shape) for _, tensor in transform(fakes, _shapes_alone(plan))]
    dtypes = [wider(info.dtype) if wide else info.dtype for info in job.files.infos.values()]
    return list(zip(job.files.infos, dtypes, shapes, strict=True))


def _check_shapes(job: CheckpointJob, layout: Layout, student: nn.Module) -> None:
    """Check the output's shapes against those of the cut architecture.

    Raises:
        CheckpointError: a shape differs.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    for name, _, shape in layout:
        if shape != wanted.get(job.names.get(name, ""), shape):
            raise CheckpointError(f"{name}: would be {shape}, the cut architecture has {wanted[job.names[name]]}.")


def _pass_through(job: CheckpointJob, plan: Plan, writer: TensorWriter, *, wide: bool, quiet: bool) -> None:
    """Copy every tensor that is not yet in the output; those that nothing changes are copied byte by byte."""
    touched = edit_of(plan.edits)
    try:
        with progress("write", len(writer.places), quiet=quiet) as bar:
            bar.done = len(writer.digests)
            for name in [name for name in job.files if name not in writer.digests]:
                edit, dtype = touched.get(job.names.get(name, "")), job.files.infos[name].dtype
                to = wider(dtype) if wide else dtype
                if edit is None and to == dtype:
                    writer.write(name, job.finite_chunks(name))
                else:
                    tensors = {job.names.get(name, name): job.files[name].to(to)}
                    ((_, tensor),) = transform(tensors, [] if edit is None else [edit])
                    writer.write(name, [tensor_bytes(tensor)])
                bar.advance(1, name)
        writer.close()
    finally:
        writer.abandon()


def _check_written(weights: Path, layout: Layout, writer: TensorWriter) -> None:
    """Read the output back and compare names, types, shapes and the checksum of every tensor.

    Raises:
        OutputError: something differs.
    """
    written = open_tensors(weights)
    found = {name: (info.dtype, info.shape) for name, info in written.infos.items()}
    wrong = next(writer.wrong(written), None) if found == {name: (d, s) for name, d, s in layout} else "a header"
    if wrong is not None:
        raise OutputError(f"{weights}: {wrong} reads back otherwise than it was written; the disk may be failing.")


def _shapes_alone(plan: Plan) -> list[Edit]:
    """Return the edits with empty tensors of the right shape, so that shapes are known without reading values."""
    return [
        replace(edit, tensors=edit.tensors.fakes()) if isinstance(edit.tensors, TensorFiles) else edit
        for edit in plan.edits
    ]
