"""Recovery block by block on small batches."""

from __future__ import annotations

import torch

from vitrim.config.options import BlockwiseOptions
from vitrim.config.run_context import RunContext
from vitrim.data import open_images
from vitrim.repair.blockwise import recover_blocks_
from vitrim.surgery import KeepUnits, apply_

IMAGES = open_images([(image, -1) for image in torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(1))])


def cut(case, share=0.5):
    """A student without half of its units."""
    student = case.copy()
    keeps = [KeepUnits(site=site, keep=tuple(range(int(share * site.d_hidden)))) for site in case.sites]
    apply_(student, keeps)
    return student


def run(case, student, *, folder=None, images=IMAGES, held_out=(), resume=False, seed=0, **values):
    """Block by block on small batches."""
    options = BlockwiseOptions(**{"num_images": 30, "batch_size": 3, "steps": 12, **values})
    context = RunContext(work=folder, resume=resume, quiet=True, seed=seed)
    given = {"held_out": held_out, "options": options, "context": context}
    return recover_blocks_(student, case.model, case.sites, images, **given)
