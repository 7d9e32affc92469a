"""Decides which units of each MLP of a checkpoint stay, one MLP at a time, and records each decision at once.

Without images a method sees one MLP's weights. With images the blocks of teacher and student are read when they run,
and each MLP is cut, repaired and refitted as `compress` does in memory.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrim.compression.cut import WHOLE, cut_, keeps_all, select
from vitrim.compression.estimate import check_space
from vitrim.compression.source import CheckpointJob
from vitrim.config.recipe import Recipe
from vitrim.cost.memory import MemoryEstimate, estimate_memory, parse_bytes, show_bytes
from vitrim.data.inputs import check_repeatable
from vitrim.distributed.devices import resolve_device
from vitrim.errors import CheckpointError, RecipeError
from vitrim.methods import SiteMethod
from vitrim.models.file_backed import FileBackedModel
from vitrim.models.load import build_empty
from vitrim.models.sites import find_mlps
from vitrim.output.stage import PICKS
from vitrim.progress import progress
from vitrim.storage.sealed import append, keep_lines, line_of, read_journal, read_tensors, write_tensors
from vitrim.storage.tensor_files import TensorFiles, check_finite
from vitrim.surgery import KeepUnits, edit_of, reshape_, site_weights
from vitrim.types import MlpSite

Errors = dict[str, dict[str, float]]
log = logging.getLogger("vitrim")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How calibration runs: the folder for activations (None keeps them in memory), and the type of second moments."""

    offload: Path | None = None
    moments: torch.dtype = torch.float64


class Journal:
    """All decisions so far, each on disk before the next MLP is looked at.

    Args:
        work: folder of a run.
        run: everything that affects the picks; a journal with other values is refused.
        sites: every MLP of the job.
        resume: continue from an existing journal.

    Raises:
        RecipeError: the existing journal belongs to another run.
        CheckpointError: the journal is damaged.
    """

    def __init__(self, work: Path, run: Mapping[str, Any], sites: Sequence[MlpSite], *, resume: bool) -> None:
        self.path, self.tensors = work / PICKS, work / "repaired"
        self.edits: list[KeepUnits] = []
        self.errors: Errors = {}
        lines = read_journal(self.path) if resume else []
        if lines and lines[0] != run:
            raise RecipeError(
                f"resume: the run in {work} was made from another source, recipe or data; give those again, or run "
                "without resume."
            )
        self.resumed = bool(lines)
        if not lines:
            self.path.unlink(missing_ok=True)
            append(self.path, line_of(run))
        self._take_up(lines[1:], {site.path: site for site in sites})

    def _take_up(self, lines: Sequence[Mapping[str, Any]], of_path: Mapping[str, MlpSite]) -> None:
        """Take up what was decided before, up to the first decision whose tensors were changed."""
        for number, line in enumerate(lines):
            try:
                edit = self._edit(of_path[line["site"]], line)
            except CheckpointError as error:
                log.warning("%s It is made again, and so are the MLPs behind it.", error)
                keep_lines(self.path, 1 + number)
                return
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{self.path}: is of another version ({error!r}); overwrite it.") from None
            self.edits.append(edit)
            self.errors[line["site"]] = line["errors"]

    def add(self, edit: KeepUnits, errors: Mapping[str, float]) -> KeepUnits:
        """Record an edit, with its tensors in a file; return an edit that reads them when they are needed."""
        path = edit.site.path
        line: dict[str, Any] = {"site": path, "keep": list(edit.keep), "errors": dict(errors), "repaired": None}
        if edit.tensors:
            self.tensors.mkdir(exist_ok=True)
            line["repaired"] = write_tensors(self.tensors / f"{path}.safetensors", edit.tensors)
        append(self.path, line_of(line))
        kept = self._edit(edit.site, line)
        self.edits.append(kept)
        self.errors[path] = dict(errors)
        return kept

    def _edit(self, site: MlpSite, line: Mapping[str, Any]) -> KeepUnits:
        """Return the edit that a line of the journal describes."""
        file, digest = self.tensors / f"{site.path}.safetensors", line["repaired"]
        tensors = read_tensors(file, digest=digest)[0] if digest else {}
        return KeepUnits(site=site, keep=tuple(line["keep"]), tensors=tensors)


def select_on_weights(
    job: CheckpointJob, recipe: Recipe, widths: Mapping[str, int], journal: Journal, *, quiet: bool
) -> list[str]:
    """Ask the method about each MLP in turn, with only that MLP in memory; return notes for the user.

    Where `widths`, which are by path, keep everything, nothing is put in another order.
    """
    method, tensors = recipe.steps[0].make_method(), job.by_model_name
    assert isinstance(method, SiteMethod)
    behind, whole = {edit.site.path for edit in journal.edits}, keeps_all(job.sites, widths)
    with progress("select", len(job.sites), quiet=quiet) as bar:
        bar.done = len(behind)
        for site in [site for site in job.sites if site.path not in behind]:
            names = edit_of([KeepUnits(site=site, keep=(0,))])
            own = {name: tensors[name] for name in names if name in tensors}
            for name, tensor in own.items():
                check_finite(name, tensor)
            if whole:
                cut = KeepUnits.first(site, site.d_hidden)
            else:
                seed = recipe.seed + len(journal.edits)
                cut = select(site_weights(own, site), site, None, widths[site.path], method, seed)
            journal.add(cut, {})
            bar.advance(1, site.path)
    return [WHOLE] if whole else []


def looks_at_images(recipe: Recipe) -> bool:
    """Return whether selection or repair would use images, if there were any."""
    step = recipe.steps[0]
    return step.repair_options() is not None or step.make_method().needs == "images"


def estimate_calibration(
    job: CheckpointJob, recipe: Recipe, widths: Mapping[str, int], batches: Sequence[Tensor]
) -> MemoryEstimate:
    """Return how much memory calibration on these images will need."""
    return estimate_memory(
        job.sites_in_encoder,
        widths.values(),
        recipe.steps[0].repair_options(),
        job.encoder,
        batches[0][0],
        num_images=sum(map(len, batches)),
        batch_size=len(batches[0]),
    )


def placement_within(estimate: MemoryEstimate, memory_budget: str | int | None, work: Path) -> Placement:
    """Choose where activations go and how moments are stored, so that calibration stays within its budget.

    Raises:
        RecipeError: the budget is too small for any choice.
        OutputError: the disk is too small for the activations.
    """
    if memory_budget is None:
        return Placement()
    budget = parse_bytes(memory_budget)
    for offloaded, moments in estimate.choices:
        if estimate.bytes(offloaded=offloaded, moments=moments) <= budget:
            if offloaded:
                check_space(work, estimate.activations, "activations (fewer with calibrate.num_images, none in memory)")
            return Placement(offload=work / "offload" if offloaded else None, moments=moments)
    raise RecipeError(
        f"memory_budget: {show_bytes(budget)} is not enough, calibration needs {show_bytes(estimate.least)}; allow "
        "more, or lower calibrate.batch_size or repair.max_tokens."
    )


def select_and_repair(
    job: CheckpointJob,
    recipe: Recipe,
    widths: Mapping[str, int],
    batches: Sequence[Tensor],
    placement: Placement,
    journal: Journal,
    *,
    quiet: bool,
) -> list[str]:
    """Cut and repair block by block, with both models' blocks read when needed; return notes for the user."""
    prefix, tensors = job.origin.encoder, job.by_model_name
    sites = job.sites_in_encoder
    start = f"{prefix}." if prefix else ""
    own = tensors.renamed({name: name.removeprefix(start) for name in tensors if name.startswith(start)})
    _check_complete(job, own)
    device, behind = resolve_device(recipe.device), [_within(edit, prefix) for edit in journal.edits]
    teacher, student = (build_empty(job.origin).get_submodule(prefix).requires_grad_(False) for _ in range(2))
    blocks = list(dict.fromkeys(site.block for site in find_mlps(teacher)))  # blocks that are not cut also run
    reshape_(student, behind)
    held = FileBackedModel(teacher, blocks, own, device=device), FileBackedModel(student, blocks, own, device=device)
    held[1].edits += behind

    def keep(edit: KeepUnits, errors: Mapping[str, float]) -> KeepUnits:
        kept = _within(journal.add(edit.below(prefix), errors), prefix)
        held[1].edits.append(kept)
        return kept

    try:
        check_repeatable(teacher, job.origin, batches[0])
        cut = cut_(
            student,
            teacher,
            sites,
            recipe,
            batches,
            widths={inner.path: widths[site.path] for inner, site in zip(sites, job.sites, strict=True)},
            quiet=quiet,
            done=behind,
            keep_edit=keep,
            offload=placement.offload,
            moments=placement.moments,
        )
    finally:
        for model in held:
            model.close()
        if placement.offload is not None:
            shutil.rmtree(placement.offload, ignore_errors=True)
    return list(cut.notes)


def _within(edit: KeepUnits, prefix: str) -> KeepUnits:
    """Return an edit with paths from the encoder, its repaired tensors still in their file."""
    if not isinstance(edit.tensors, TensorFiles):
        return edit.within(prefix)
    start = f"{prefix}." if prefix else ""
    tensors = edit.tensors.renamed({name: name.removeprefix(start) for name in edit.tensors})
    return replace(replace(edit, tensors={}).within(prefix), tensors=tensors)


def _check_complete(job: CheckpointJob, own: TensorFiles) -> None:
    """Check that the files hold every tensor of the encoder that will be run.

    Raises:
        CheckpointError: a tensor is missing.
    """
    wanted = job.model.get_submodule(job.origin.encoder).state_dict()
    missing = [name for name in wanted if name not in own]
    if missing:
        raise CheckpointError(
            f"{job.origin.name}: holds no {missing[0]} (and {len(missing) - 1} more), or in a form that the library "
            "converts; prune it without data, or use compress."
        )
