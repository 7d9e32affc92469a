"""Keeps a finished cut for a run that is stopped while it trains, and takes it up again.

Two files: `cut.json` with the plan and what made it, and the tensors. Both have a digest; the first holds that of the
second, too. A cut that can't be read is made again; what was trained behind it is kept only if the plan is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.compression.cut import CutReport
from vitrim.config.recipe import Recipe
from vitrim.errors import DAMAGED, CheckpointError, RecipeError, VitrimError
from vitrim.output.stage import CUT_STATE
from vitrim.recover.files import AT_ONCE, RECOVERY_STATE
from vitrim.repair.blockwise import FINISHED
from vitrim.storage.places import remove
from vitrim.storage.sealed import read_sealed, read_tensors, write_sealed, write_tensors
from vitrim.surgery import Plan, reshape_

CUT_TENSORS = "cut.safetensors"
CUT_FIELDS = {"plan": dict, "errors": dict, "notes": list, "tensors": str, "plan_sha256": str, "recipe": str}
log = logging.getLogger("vitrim")


def save_cut(student: nn.Module, cut: CutReport, recipe: Recipe, work: Path) -> None:
    """Save a finished cut, so that a run stopped during recovery can be resumed."""
    tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    for number, edit in enumerate(cut.plan.edits):  # the student no longer holds what a later edit has cut again
        changed = {name: t for name, t in edit.tensors.items() if not _holds(tensors, name, t)}
        tensors |= {_own_name(number, name): tensor.contiguous() for name, tensor in changed.items()}
    made = {"plan_sha256": cut.plan.sha256, "recipe": recipe.dump()}
    if _made(work) != made:  # training goes on behind this cut and no other
        states = f"{RECOVERY_STATE}*"
        for path in (*work.glob(states), *(work / AT_ONCE).glob(states), *(work / FINISHED).glob("*")):
            log.warning("%s: belongs to another cut than this one; it is made again.", path)
            remove(path)
    digest = write_tensors(work / CUT_TENSORS, tensors, made)
    about = {"plan": cut.plan.to_json(), "errors": cut.errors, "notes": list(cut.notes), "tensors": digest}
    write_sealed(work / CUT_STATE, {**made, **about})


def resume_cut_(student: nn.Module, recipe: Recipe, work: Path) -> CutReport | None:
    """Restore in place the cut that `save_cut` saved; return None if there is none, or a damaged one, which is said.

    Raises:
        RecipeError: the cut was made by another recipe.
        CheckpointError: the saved files are of another version or model.
    """
    if not (work / CUT_STATE).exists():
        return None
    try:
        about = read_sealed(work / CUT_STATE, CUT_FIELDS)
        tensors, _ = read_tensors(work / CUT_TENSORS, digest=about["tensors"])
    except CheckpointError as error:
        log.warning("%s The cut is made again.", error)
        return None
    if about["recipe"] != recipe.dump():
        raise RecipeError(f"resume: the run in {work} has another recipe; give that one again, or overwrite.")
    try:
        plan = Plan.from_json(about["plan"])
        reshape_(student, plan.edits)
        names = student.state_dict().keys()
        student.load_state_dict({name: tensors[name] for name in names}, assign=True)
        edits = [
            replace(edit, tensors={name: _tensor_of(tensors, number, name) for name in said["tensors"]})
            for number, (edit, said) in enumerate(zip(plan.edits, about["plan"]["edits"], strict=True))
        ]
    except (*DAMAGED, RuntimeError, VitrimError) as error:
        raise CheckpointError(f"{work}: the cut there does not fit the model ({error!r:.200}); overwrite it.") from None
    return CutReport(plan=replace(plan, edits=tuple(edits)), errors=about["errors"], notes=tuple(about["notes"]))


def _made(work: Path) -> dict[str, str] | None:
    """Return by which recipe the cut in a folder was made and what its plan is, from either of its files."""
    try:
        about: Mapping[str, Any] = read_sealed(work / CUT_STATE, CUT_FIELDS)
    except CheckpointError:
        try:
            _, about = read_tensors(work / CUT_TENSORS)
        except CheckpointError:
            return None
    return {name: str(about.get(name)) for name in ("plan_sha256", "recipe")}


def _holds(tensors: Mapping[str, Tensor], name: str, tensor: Tensor) -> bool:
    """Return whether a mapping holds exactly this tensor under a name."""
    return (
        name in tensors and tensors[name].shape == tensor.shape and torch.equal(tensors[name], tensor.to(tensors[name]))
    )


def _own_name(number: int, name: str) -> str:
    """Return the name under which an edit's own tensor is saved."""
    return f"edit {number}: {name}"


def _tensor_of(tensors: Mapping[str, Tensor], number: int, name: str) -> Tensor:
    """Return an edit's tensor: its own if saved, else a copy of the student's, since that one will be trained."""
    own = _own_name(number, name)
    return tensors[own] if own in tensors else tensors[name].clone()
