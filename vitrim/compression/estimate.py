"""What pruning a checkpoint will need, before any value is read: sizes from headers, memory and time by arithmetic.

The time is an estimate: a short matrix product measures the speed of this machine, and a slow disk is assumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitrim.compression.source import CheckpointJob
from vitrim.config.recipe import Recipe
from vitrim.cost.memory import (
    DISK_RATE,
    MemoryEstimate,
    copying_bytes,
    estimate_memory,
    program_bytes,
    selection_bytes,
    selection_seconds,
    show_bytes,
    show_seconds,
)
from vitrim.data.views import fitting_views
from vitrim.errors import OutputError
from vitrim.surgery import KeepUnits, edit_of, transform

FILES, MEMORY, TIME = "files", "peak memory without images", "time without images"
CALIBRATION, BUDGETED = "memory with images, on top", "the least with --memory-budget"


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Estimate of what a run will need; sizes in bytes.

    `memory` is the peak without images, and `program` is the part of it in use before the first tensor is read.
    `seconds` is an estimate, also without images. `calibration` is what selection and repair on images need in
    addition, None if the size of the images is not known: `memory` with everything in memory, and `least` with
    activations on `disk` and, where that helps, moments in float32.
    """

    source: int
    dtypes: tuple[str, ...]
    output: int
    program: int
    memory: int
    seconds: float
    calibration: dict[str, int] | None

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON-ready values."""
        return asdict(self)

    def line(self, *, images: bool) -> str:
        """Return the estimate as one line of text, for a run with or without images."""
        rows = dict(self.rows())
        wanted = (FILES, CALIBRATION, BUDGETED) if images and self.calibration else (FILES, MEMORY, TIME)
        return "; ".join(f"{name} {rows[name]}" for name in wanted) + "."

    def rows(self) -> list[tuple[str, str]]:
        """Return the estimate as rows of a table for people."""
        found = [
            (FILES, f"{show_bytes(self.source)} of {'/'.join(self.dtypes)} -> {show_bytes(self.output)}"),
            (MEMORY, f"{show_bytes(self.memory)}, {show_bytes(self.program)} of it the program"),
            (TIME, f"about {show_seconds(self.seconds)} (an estimate)"),
        ]
        if self.calibration is not None:
            needs = {key: show_bytes(value) for key, value in self.calibration.items() if key != "images"}
            found += [
                (CALIBRATION, f"{needs['memory']}, for {self.calibration['images']:,} images"),
                (BUDGETED, f"{needs['least']}, with {needs['disk']} on disk"),
            ]
        return found


def estimate_run(
    job: CheckpointJob,
    recipe: Recipe,
    widths: Mapping[str, int],
    needs: MemoryEstimate | None = None,
    *,
    num_images: int | None = None,
) -> RunEstimate:
    """Estimate what a run will need.

    Args:
        job: the checkpoint and its architecture.
        recipe: the recipe; its calibration options are used.
        widths: hidden units that stay in each MLP, by path.
        needs: what calibration needs, if that is known already.
        num_images: number of calibration images; by default the recipe's.
    """
    edits = _first_units(job, widths)
    cut, names = edit_of(edits), job.names
    fakes = {names.get(name, name): tensor for name, tensor in job.files.fakes().items()}
    before = {name: tensor.nbytes for name, tensor in fakes.items()}
    touched = sum(size for name, size in before.items() if name in cut)
    by_dtype = {t.dtype: sum(b.nbytes for b in fakes.values() if b.dtype == t.dtype) for t in fakes.values()}
    itemsize = max(fakes[name].dtype.itemsize for name in fakes if name in cut)
    picking = max(selection_bytes(edit.site, edit.width, itemsize) for edit in edits)
    passing = copying_bytes(max(size for name, size in before.items() if name in cut))
    output = output_bytes(job, widths)
    program, num_images = program_bytes(), num_images or recipe.calibrate.num_images
    needs = needs or _needs(job, recipe, widths, num_images)
    # Read for selection, for copying and for the final check; written once.
    moved = touched + sum(before.values()) + 2 * output
    return RunEstimate(
        source=sum(before.values()),
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in sorted(by_dtype, key=lambda d: -by_dtype[d])),
        output=output,
        program=program,
        memory=program + max(picking, passing),
        seconds=round(selection_seconds(job.sites, [edit.width for edit in edits]) + moved / DISK_RATE, 1),
        calibration=None if needs is None else _calibration(needs, num_images),
    )


def _first_units(job: CheckpointJob, widths: Mapping[str, int]) -> list[KeepUnits]:
    """Return edits that keep the first units of each MLP, as stand-ins for any edits of these widths."""
    return [KeepUnits.first(site, widths[site.path]) for site in job.sites]


def output_bytes(job: CheckpointJob, widths: Mapping[str, int]) -> int:
    """Return the size of the output's tensors in bytes."""
    edits = _first_units(job, widths)
    fakes = {job.names.get(name, name): tensor for name, tensor in job.files.fakes().items()}
    return sum(tensor.nbytes for _, tensor in transform(fakes, edits))


def check_space(folder: Path, num_bytes: int, what: str = "the output") -> None:
    """Check that the disk has room, before the first byte is written.

    Raises:
        OutputError: the free space is too small.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OutputError(
            f"{folder}: needs {show_bytes(num_bytes)} for {what}, the disk has {show_bytes(free)} left; make room."
        )


def _needs(job: CheckpointJob, recipe: Recipe, widths: Mapping[str, int], num_images: int) -> MemoryEstimate | None:
    """Return what calibration needs with the recipe's images, at the model's input size; None if that is unknown."""
    known = job.origin.preprocessing
    if "input_size" in known:
        inputs = torch.empty(known["input_size"], device="meta")
    elif "num_tokens" in known:
        inputs = torch.empty(known["num_tokens"], dtype=torch.int64, device="meta")
    else:
        return None
    views = recipe.calibrate.views or fitting_views(num_images, max(site.d_hidden for site in job.sites_in_encoder))
    return estimate_memory(
        job.sites_in_encoder,
        widths.values(),
        recipe.steps[0].repair_options(),
        job.encoder,
        inputs,
        num_images=num_images * views,
        batch_size=recipe.calibrate.batch_size,
    )


def _calibration(needs: MemoryEstimate, num_images: int) -> dict[str, int]:
    """Return a memory estimate as plain numbers."""
    offloaded, moments = needs.choices[0]
    return {
        "images": num_images,
        "memory": needs.bytes(offloaded=offloaded, moments=moments),
        "least": needs.least,
        "disk": needs.activations,
    }
