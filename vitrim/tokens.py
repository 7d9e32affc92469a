"""What is read of images: pooled vector, patch tokens, and tokens of further layers where a model's users read these.

One description serves what reads, compares, distils, exports and prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Pooled vector, patches and further maps, as a tuple.
Parts = tuple[Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Output of a vision encoder: B images, N patch tokens, D width.

    `pooled_BD` is the CLS token, or the mean of the patch tokens if a model has none. `patches_BND` is None for a model
    that returns one vector per image. `maps` are tokens (B, N, D) of further layers, each with a number and a width of
    its own: those of a backbone that gives several stages, or what a VLM reads beside the last layer. `taken` says in
    words where in the model all of these were read. `token_positions` are those of the patches in the image's grid,
    where a model keeps some of them; None for all. `num_prefix` tokens (CLS, registers) stood in front of the patches.
    """

    pooled_BD: Tensor
    patches_BND: Tensor | None = None
    maps: tuple[Tensor, ...] = ()
    taken: str = ""
    token_positions: tuple[int, ...] | None = None
    num_prefix: int = 0

    @property
    def parts(self) -> Parts:
        """Pooled vector, patches or None, and maps."""
        return (self.pooled_BD, self.patches_BND, *self.maps)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is read: what is to be kept equal."""
        return [part for part in self.parts if part is not None]

    def with_parts(self, parts: Sequence[Tensor | None]) -> Features:
        """Return features with other tensors, in the order of `parts`."""
        pooled_BD, patches_BND, *maps = parts
        assert pooled_BD is not None
        return replace(self, pooled_BD=pooled_BD, patches_BND=patches_BND, maps=tuple(t for t in maps if t is not None))

    def each(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Return features with all tensors changed."""
        return self.with_parts([None if part is None else change(part) for part in self.parts])


def features_of(parts: Sequence[Tensor | None], **known: Any) -> Features:
    """Return features made of tensors in the order of `Features.parts`."""
    first = parts[0]
    assert first is not None
    return Features(pooled_BD=first, **known).with_parts(parts)


def one_below_the_other(several: Sequence[Parts]) -> Parts:
    """Return the parts of several features of the same images as one, the first features' images first."""
    columns = zip(*several, strict=True)
    return tuple(None if column[0] is None else torch.cat([t for t in column if t is not None]) for column in columns)
