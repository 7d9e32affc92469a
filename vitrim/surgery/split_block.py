"""The base of edits after which a block puts out fewer tokens: its attention gets projections of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from vitrim.layers.kept_tokens import BlockNames, SplitBlock, block_names
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.keep_head_dims import check_rows, slim_, slim_tensors
from vitrim.surgery.modules import submodule
from vitrim.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class SplitBlockEdit(Edit):
    """Run the block around `site` in parts, between which tokens can end.

    The attention gets projections `q`, `k`, `v` and `proj`, so that queries can be others than keys.
    """

    site: AttentionSite

    @property
    def where(self) -> str:
        """Path of the block."""
        return self.site.block

    def affected_tensors(self) -> list[str]:
        """Return the names of the attention's tensors."""
        return self.site.tensors

    def check(self, model: nn.Module) -> None:
        """Check that the attention has the tensors of its site, and that the block can be split."""
        check_rows(model, self.site)
        block_names(submodule(model, self.site.block), self.site.block)

    @abstractmethod
    def split(self, block: nn.Module, names: BlockNames) -> SplitBlock:
        """Return what runs a block's own layers."""

    def reshape_(self, model: nn.Module) -> None:
        """Put what runs the block's layers in its place."""
        site, block = self.site, submodule(model, self.site.block)
        slim_(model, site, site.num_heads, site.head_dim, site.head_dim)
        replace_(model, site.block, self.split(block, block_names(block, site.block)))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the attention's tensors under their new names."""
        every = (tuple(range(self.site.head_dim)),) * self.site.num_heads
        yield from slim_tensors(self.site, every, every, name, tensor)
