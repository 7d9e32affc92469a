"""The edit after which a block merges some of its patches into others; see `layers.merged_tokens`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vitrim.errors import BudgetError
from vitrim.layers.kept_tokens import block_names
from vitrim.layers.merged_tokens import MergedTokens
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.keep_head_dims import check_rows, slim_, slim_tensors
from vitrim.surgery.modules import submodule
from vitrim.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class MergeTokens(Edit):
    """Merge `num_merged` of the `num_given` patches that come into a block, of `num_patches` in the image.

    The attention gets projections `q`, `k`, `v` and `proj` of its own.
    """

    KIND: ClassVar[str] = "merge_tokens"
    ORDER: ClassVar[int] = 1

    site: AttentionSite
    num_prefix: int
    num_given: int
    num_merged: int
    num_patches: int

    def describe(self) -> str:
        """Return how many patches are merged."""
        return f"{self.num_merged} of {self.num_given} patches merged into others"

    @property
    def where(self) -> str:
        """Path of the block."""
        return self.site.block

    def affected_tensors(self) -> list[str]:
        """Return the names of the attention's tensors."""
        return self.site.tensors

    def check(self, model: nn.Module) -> None:
        """Check that there are as many patches to merge, and that the block can be split."""
        most = -(-self.num_given // 2) if self.num_given > 1 else 0
        if not 0 <= self.num_merged <= most or self.num_given > self.num_patches:
            raise BudgetError(
                f"{self.site.block}: asked to merge {self.num_merged} of {self.num_given} patches; use 0..{most}, half."
            )
        check_rows(model, self.site)
        block_names(submodule(model, self.site.block), self.site.block)

    def reshape_(self, model: nn.Module) -> None:
        """Put a `MergedTokens` in the place of the block, with the block's own layers."""
        site, block = self.site, submodule(model, self.site.block)
        slim_(model, site, site.num_heads, site.head_dim, site.head_dim)
        new = MergedTokens(
            block,
            block_names(block, site.block),
            num_prefix=self.num_prefix,
            num_given=self.num_given + self.num_prefix,
            num_merged=self.num_merged,
            num_patches=self.num_patches,
        )
        replace_(model, site.block, new)

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the attention's tensors under their new names."""
        every = (tuple(range(self.site.head_dim)),) * self.site.num_heads
        yield from slim_tensors(self.site, every, every, name, tensor)
