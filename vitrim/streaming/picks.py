"""Decides what stays of each MLP of a checkpoint, one at a time, and writes every decision down as it is made.

Without images a method sees one MLP's weights. With images the blocks of teacher and student are read as they run, and
each MLP is cut, repaired and refitted as `compress` does it in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitrim.budget import Needs, needs_of, parse_bytes, show_bytes
from vitrim.checkpoint import PICKS
from vitrim.cut import cut_, select
from vitrim.data import first_images
from vitrim.errors import CheckpointError, RecipeError
from vitrim.evaluation import open_inputs, resolve_device
from vitrim.methods import find_method
from vitrim.models.load import build_empty
from vitrim.models.streamed import StreamedModel
from vitrim.progress import progress
from vitrim.recipe import Recipe
from vitrim.streaming.source import Job
from vitrim.surgery import edit_of, reshape_, site_weights
from vitrim.tensor_files import TensorFiles, open_tensors
from vitrim.tensor_writer import append, read_journal
from vitrim.types import KeepUnits, MlpSite

SHARD_BYTES = 2 * 10**9


def decide(
    job: Job,
    recipe: Recipe,
    data: Any,
    work: Path,
    memory_budget: str | int | None,
    *,
    resume: bool,
    quiet: bool,
) -> tuple[list[KeepUnits], dict[str, Any]]:
    """What to keep of each MLP, by full paths, and the errors of its repair."""
    picks, repaired = work / PICKS, work / "repaired"
    run = {"recipe": recipe.dump(), "data": repr(data)[:200]}
    lines = read_journal(picks) if resume else []
    if lines and lines[0] != run:
        raise RecipeError(f"resume: the run in {work} was made with another recipe or data; run without resume.")
    if not lines:
        append(picks, json.dumps(run) + "\n")
    site_of = {site.path: site for site in job.sites}
    done = [_kept(site_of[line["site"]], line, repaired) for line in lines[1:]]
    errors = {line["site"]: line["errors"] for line in lines[1:]}

    def keep_edit(edit: KeepUnits, found: Mapping[str, float]) -> KeepUnits:
        """Write an edit down, its tensors to a file."""
        line = {"site": edit.site.path, "keep": list(edit.keep), "errors": dict(found), "repaired": bool(edit.repaired)}
        if edit.repaired:
            repaired.mkdir(exist_ok=True)
            save_file(
                {n: t.cpu().contiguous() for n, t in edit.repaired.items()}, repaired / f"{edit.site.path}.safetensors"
            )
        append(picks, json.dumps(line) + "\n")
        errors[edit.site.path] = dict(found)
        return _kept(edit.site, line, repaired)

    if data is None and recipe.data is None:
        return _picked_on_weights(job, recipe, done, keep_edit, quiet=quiet), {}
    batches = _batches(job, recipe, data)
    return _repaired(job, recipe, batches, work, memory_budget, done, keep_edit, quiet=quiet), errors


def _kept(site: MlpSite, line: Mapping[str, Any], repaired: Path) -> KeepUnits:
    """An edit as the journal has it; its tensors are read when they are needed."""
    tensors = open_tensors(repaired / f"{site.path}.safetensors") if line["repaired"] else {}
    return KeepUnits(site=site, keep=tuple(line["keep"]), repaired=tensors)


def _picked_on_weights(
    job: Job, recipe: Recipe, done: list[KeepUnits], keep_edit: Any, *, quiet: bool
) -> list[KeepUnits]:
    """Ask the method about one MLP after the other, with nothing else in memory."""
    method, tensors = find_method(recipe.method), job.by_model_name
    options, edits, behind = method.parse_options(recipe.options), list(done), {edit.site.path for edit in done}
    with progress("select", len(job.sites), quiet=quiet) as bar:
        bar.done = len(edits)
        for site in [site for site in job.sites if site.path not in behind]:
            names = edit_of([KeepUnits(site=site, keep=(0,))])
            own = {name: tensors[name] for name in names if name in tensors}
            _check_finite(own)
            seed = recipe.seed + len(edits)
            edit = select(site_weights(own, site), site, None, recipe.width_of(site), method, options, seed)
            edits.append(keep_edit(edit, {}))
            bar.advance(1, site.path)
    return edits


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that no selection can make sense of.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name}: holds NaN or infinite values; fetch the checkpoint again.")


def _batches(job: Job, recipe: Recipe, data: Any) -> list[Tensor]:
    """Calibration images, drawn as `compress` draws them."""
    images = open_inputs(data if data is not None else recipe.data, job.origin)
    options = recipe.calibrate
    return first_images(images, options.num_images, seed=recipe.seed, batch_size=options.batch_size)[0]


def _repaired(
    job: Job,
    recipe: Recipe,
    batches: Sequence[Tensor],
    work: Path,
    memory_budget: str | int | None,
    done: list[KeepUnits],
    keep_edit: Any,
    *,
    quiet: bool,
) -> list[KeepUnits]:
    """Cut and repair block after block, teacher's and student's blocks read as they come."""
    prefix = job.origin.encoder
    sites = [site.within(prefix) for site in job.sites]
    needs = needs_of(sites, recipe, batches, job.model.get_submodule(prefix))
    spill, moments = _within(needs, memory_budget, work)
    device = resolve_device(recipe.device)
    tensors = job.by_model_name
    inside = {
        name: name.removeprefix(f"{prefix}.") for name in tensors if name.startswith(f"{prefix}." if prefix else "")
    }
    own, blocks = tensors.renamed(inside), list(dict.fromkeys(site.block for site in sites))
    _check_complete(job, own)
    behind = [edit.within(prefix) for edit in done]
    teacher, student = (build_empty(job.origin).get_submodule(prefix).requires_grad_(False) for _ in range(2))
    reshape_(student, behind)
    held = StreamedModel(teacher, blocks, own, device=device), StreamedModel(student, blocks, own, device=device)
    held[1].edits += behind

    def keep(edit: KeepUnits, errors: Mapping[str, float]) -> KeepUnits:
        kept = keep_edit(edit.below(prefix), errors).within(prefix)
        held[1].edits.append(kept)
        return kept

    try:
        cut = cut_(
            student,
            teacher,
            sites,
            recipe,
            batches,
            quiet=quiet,
            done=behind,
            keep_edit=keep,
            spill=spill,
            moments=moments,
        )
    finally:
        for model in held:
            model.close()
        shutil.rmtree(work / "spill", ignore_errors=True)
    return [edit.below(prefix) for edit in cut.plan.edits]


def _check_complete(job: Job, own: TensorFiles) -> None:
    """Refuse to run an encoder of which the files lack a tensor.

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


def _within(needs: Needs, memory_budget: str | int | None, work: Path) -> tuple[Path | None, torch.dtype]:
    """Where activations go and how moments are stored, so that calibration stays within its budget.

    Raises:
        RecipeError: it can't.
    """
    if memory_budget is None:
        return None, torch.float64
    budget = parse_bytes(memory_budget)
    for spill in (None, work / "spill"):
        for moments in (torch.float64, torch.float32):
            if needs.bytes(spilled=spill is not None, moments=moments) <= budget:
                return spill, moments
    least = needs.bytes(spilled=True, moments=torch.float32)
    raise RecipeError(
        f"memory_budget: {show_bytes(budget)} is not enough, calibration needs {show_bytes(least)}; allow more, or "
        "lower calibrate.batch_size or repair.max_tokens."
    )
