"""The edit after which a block puts out some of its tokens; see `layers.kept_tokens`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError
from vitrim.layers.kept_tokens import KeptTokens, block_names
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.keep_head_dims import check_rows, slim_, slim_tensors
from vitrim.surgery.modules import submodule, weight_of
from vitrim.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class KeepTokens(Edit):
    """Keep the tokens `keep` of those that a block is given, `among`; both are positions in the model's whole sequence.

    The attention gets projections `q`, `k`, `v` and `proj` of its own, so that queries are those of kept tokens alone.
    """

    KIND: ClassVar[str] = "keep_tokens"
    ORDER: ClassVar[int] = 1

    site: AttentionSite
    keep: tuple[int, ...]
    among: tuple[int, ...]

    def describe(self) -> str:
        """Return how many tokens stay."""
        return f"{len(self.keep)} of {len(self.among)} tokens go on"

    @property
    def where(self) -> str:
        """Path of the block."""
        return self.site.block

    def affected_tensors(self) -> list[str]:
        """Return the names of the attention's tensors."""
        return self.site.tensors

    def check(self, model: nn.Module) -> None:
        """Check that the kept tokens are some of those given, in order, and that the block can be split."""
        for kept in (self.keep, self.among):
            if not kept or kept != tuple(sorted(set(kept))) or not set(kept) <= set(self.among):
                raise BudgetError(
                    f"{self.site.block}: keep some of the {len(self.among)} tokens that come in, in order, each once."
                )
        check_rows(model, self.site)
        block_names(submodule(model, self.site.block), self.site.block)

    def reshape_(self, model: nn.Module) -> None:
        """Put a `KeptTokens` in the place of the block, with the block's own layers."""
        site, block = self.site, submodule(model, self.site.block)
        device = weight_of(model, site.query).device
        slim_(model, site, site.num_heads, site.head_dim, site.head_dim)
        names = block_names(block, site.block)
        replace_(model, site.block, KeptTokens(block, names, positions=self.keep, given=self.among, device=device))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the attention's tensors under their new names, and beside the query's weight the index of tokens."""
        every = (tuple(range(self.site.head_dim)),) * self.site.num_heads
        yield from slim_tensors(self.site, every, every, name, tensor)
        if name == f"{self.site.query}.weight":
            index = [self.among.index(position) for position in self.keep]
            yield f"{self.site.block}.kept_tokens", torch.tensor(index, device=tensor.device)
