"""The edit after which a block merges some of its patches into others; see `layers.merged_tokens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vitrim.errors import BudgetError
from vitrim.layers.kept_tokens import BlockNames
from vitrim.layers.merged_tokens import MergedTokens
from vitrim.surgery.split_block import SplitBlockEdit


@dataclass(frozen=True, kw_only=True)
class MergeTokens(SplitBlockEdit):
    """Merge `num_merged` of the `num_given` patches that come into a block, of `num_patches` in the image."""

    KIND: ClassVar[str] = "merge_tokens"
    MAKES: ClassVar[str] = "merged tokens"
    ORDER: ClassVar[int] = 1

    num_prefix: int
    num_given: int
    num_merged: int
    num_patches: int

    def describe(self) -> str:
        """Return how many patches are merged."""
        return f"{self.num_merged} of {self.num_given} patches merged into others"

    def check(self, model: nn.Module) -> None:
        """Check that there are as many patches to merge, and that the block can be split."""
        most = -(-self.num_given // 2) if self.num_given > 1 else 0
        if not 0 <= self.num_merged <= most or self.num_given > self.num_patches:
            raise BudgetError(
                f"{self.site.block}: asked to merge {self.num_merged} of {self.num_given} patches; use 0..{most}, half."
            )
        super().check(model)

    def split(self, block: nn.Module, names: BlockNames) -> MergedTokens:
        """Return a `MergedTokens` of the block's own layers."""
        return MergedTokens(
            block,
            names,
            num_prefix=self.num_prefix,
            num_given=self.num_given + self.num_prefix,
            num_merged=self.num_merged,
            num_patches=self.num_patches,
        )
