"""Recovery block by block on small batches."""

from __future__ import annotations

import torch

from vitrim.config.options import BlockwiseOptions
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


def run(case, student, *, folder=None, images=IMAGES, **values):
    """Block by block on small batches."""
    known = {"seed", "resume", "held_out"}
    rest = {key: values.pop(key) for key in known & values.keys()}
    options = BlockwiseOptions(**{"num_images": 30, "batch_size": 3, "steps": 12, **values})
    rest = {"held_out": [], "options": options, "folder": folder, "quiet": True, **rest}
    return recover_blocks_(student, case.model, case.sites, images, **rest)
