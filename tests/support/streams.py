"""Tar shards of images that follow from their numbers, and recovery on a stream of them."""

from __future__ import annotations

import copy
import io
import tarfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for
from vitrim.models.sites import find_mlps
from vitrim.recover.distill import recover_
from vitrim.surgery import KeepUnits, apply_

CFG = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, num_shards: int, per_shard: int) -> list[Path]:
    """Image n is picture(n), its label n."""
    folder.mkdir(exist_ok=True)
    return [
        write_tar(
            folder / f"{shard:03d}.tar",
            {
                f"{n:05d}.{kind}": data
                for n in range(shard * per_shard, (shard + 1) * per_shard)
                for kind, data in (("png", png(n)), ("cls", str(n).encode()))
            },
        )
        for shard in range(num_shards)
    ]


def piped(files: list[Path]) -> list[str]:
    """The same shards behind a command, so that they can only be read from the first byte on."""
    return [f"pipe:cat {file}" for file in files]


def make_teacher():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0
    ).eval()


def train(images, *, work=None, resume=False, on_validation=None, **options):
    """Weights after recovery of a student on some images, and what recovery says."""
    teacher = make_teacher()
    student = copy.deepcopy(teacher)
    apply_(student, [KeepUnits(site=site, keep=tuple(range(16))) for site in find_mlps(student)])
    options = {"steps": 6, "batch_size": 4, "lr": 1e-3, "num_validations": 3, "shuffle_buffer": 8, **options}
    images = images.augmented(augment_for(CFG, "light"), 0)
    held_out = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))]
    result = recover_(
        student,
        teacher,
        images,
        held_out=held_out,
        options=RecoverOptions(**options),
        context=RunContext(work=work, resume=resume, quiet=True),
        on_validation=on_validation,
    )
    return student.state_dict(), result
