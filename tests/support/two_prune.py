"""A training of factors by as many processes as there are, for tests/test_lora_prune.py; torchrun starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.support.distillation import make_images, make_teacher
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.distributed.processes import join_, num_processes, rank
from vitrim.models.sites import find_mlps
from vitrim.recover.factors import TrainingSource
from vitrim.surgery import Edit

OPTIONS = {"steps": 12, "batch_size": 8, "rank": 4, "every": 2, "parts": "both"}


def prune(work: Path | None = None, *, resume: bool = False, **options: object) -> tuple[list[Edit], dict[str, Tensor]]:
    """The edits and the weights of the tiny ViT pruned to half, with labels at hand."""
    teacher = make_teacher()
    student = make_teacher()
    recipe = Recipe.parse({"method": "lora-prune", "keep_ratio": 0.5, "exact": True, "options": {**OPTIONS, **options}})
    context = RunContext(work=work, resume=resume, quiet=True)
    source = TrainingSource(images=make_images(), context=context, rank=rank(), num_processes=num_processes())
    batches = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))]
    report = cut_(student, teacher, find_mlps(teacher), recipe, batches, quiet=True, source=source)
    return list(report.plan.edits), student.state_dict()


if __name__ == "__main__":
    join_("cpu")
    edits, weights = prune(Path(sys.argv[1]))
    kept = [edit.keep for edit in edits]  # type: ignore[attr-defined]
    torch.save({"kept": kept, "weights": weights}, Path(sys.argv[1]) / f"rank{rank()}.pt")
