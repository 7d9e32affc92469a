"""What the teacher cache keeps of an image, in which types, and how values are rounded to them.

Positions of patches are not stored: they follow from the seed.

Shapes: B images, N patch tokens, P of them kept, D width.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitrim.config.options import CacheOptions
from vitrim.errors import RecipeError
from vitrim.tokens import Features

# A scale of zero, of a vector of zeros, would give 0 / 0.
TINY = torch.finfo(torch.float32).tiny

CacheType = Literal["bf16", "int8", "float32"]
STORED: dict[CacheType, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of a cached image: its pooled vector, and some of its patch tokens.

    Attributes:
        dtype: type in which values are kept.
        pooled: width of the pooled vector.
        patches: number and width (N, D) of the model's patch tokens; None for a model without any.
        num_kept: P, how many patch tokens are kept.
    """

    dtype: CacheType
    pooled: int
    patches: tuple[int, int] | None
    num_kept: int

    @classmethod
    def of(cls, found: Features, options: CacheOptions) -> Layout:
        """Build the layout for features of these sizes.

        Raises:
            RecipeError: more patches are asked for than the model has, or it has tokens of several layers.
        """
        if found.maps:
            raise RecipeError(
                f"recover.cache_teacher: keeps tokens of one layer, and {1 + len(found.maps)} are compared; drop it."
            )
        pooled = found.pooled_BD.shape[-1]
        if found.patches_BND is None:
            return cls(dtype=options.dtype, pooled=pooled, patches=None, num_kept=0)
        num_patches, width = found.patches_BND.shape[1:]
        num_kept = options.num_patches or max(1, round((options.patch_ratio or 1.0) * num_patches))
        if num_kept > num_patches:
            raise RecipeError(f"recover.cache_teacher.num_patches: {num_kept} asked; the model has {num_patches}.")
        return cls(dtype=options.dtype, pooled=pooled, patches=(num_patches, width), num_kept=num_kept)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the tensors of a shard: type, and shape without the first dimension, which counts images."""
        values = {"pooled": (self.pooled,)} | ({"patches": (self.num_kept, self.patches[1])} if self.patches else {})
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"row": (torch.int64, ()), "view": (torch.int64, ())}
        for name, shape in values.items():
            found[name] = (STORED[self.dtype], shape)
            if self.dtype == "int8":
                found[f"{name}_scale"] = (torch.float32, shape[:-1])
        return found

    @property
    def image_bytes(self) -> int:
        """Bytes of one view of one image."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors().values())


def cache_bytes(layout: Layout, num_images: int, num_views: int = 1) -> int:
    """Return the bytes of a full cache on disk, without the header of under 1 kB in each shard."""
    return layout.image_bytes * num_images * num_views


def encode(values: Tensor, dtype: CacheType) -> tuple[Tensor, Tensor | None]:
    """Round values (..., D) to the type in which they are kept.

    The error of a value is at most 2^-8 of it in bf16, and 1/254 of the largest value of its vector in int8. A value
    that is no number makes its whole vector so.

    Returns:
        The rounded values, and for int8 a scale (...) for each vector; else None.
    """
    if dtype != "int8":
        return values.to(STORED[dtype]), None
    values = values.float()
    scale = values.abs().amax(-1) / 127
    return (values / scale.clamp_min(TINY)[..., None]).round().to(torch.int8), scale


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Turn stored values and their scales back into float32: the inverse of `encode`."""
    return stored.float() if scale is None else stored.float() * scale[..., None]


def draw_positions(seed: int, row: int, view: int, *, num_kept: int, num_patches: int) -> Tensor:
    """Draw which patches of a view of an image are kept: sorted positions (P,) that follow from the arguments alone."""
    digest = hashlib.blake2b(f"{seed},{row},{view}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(num_patches, generator=generator)[:num_kept].sort().values
