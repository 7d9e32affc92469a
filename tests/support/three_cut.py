"""A cut by as many processes as torchrun starts, for tests/test_shared_cut.py."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.models import timm_vit
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.distributed.processes import join_
from vitrim.distributed.sharing import shared_on
from vitrim.models.sites import find_mlps

RECIPE = {"repair": {"refit_steps": 12, "max_tokens": 900}, "keep_ratio": 0.5, "exact": True}


def images(num: int = 10, size: int = 4, seed: int = 5) -> list[Tensor]:
    return list(torch.randn(num, size, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


def vit(depth: int) -> nn.Module:
    torch.manual_seed(depth)
    return timm_vit(depth=depth, init_values=0.2).eval().requires_grad_(False)


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    join_("cpu")
    share, found = shared_on(torch.device("cpu")), {}
    for depth in (1, 2, 3):
        teacher = vit(depth)
        student = copy.deepcopy(teacher)
        report = cut_(student, teacher, find_mlps(teacher), Recipe.parse(RECIPE), images(), quiet=True, share=share)
        found[depth] = {"edits": report.plan.without_tensors().edits, "weights": student.state_dict()}
    torch.save(found, Path(sys.argv[1]) / f"rank{share.rank}.pt")
    dist.destroy_process_group()
