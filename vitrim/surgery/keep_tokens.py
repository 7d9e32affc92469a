"""The edit after which a block puts out some of its tokens; see `layers.kept_tokens`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError
from vitrim.layers.kept_tokens import BlockNames, KeptTokens
from vitrim.surgery.split_block import SplitBlockEdit


@dataclass(frozen=True, kw_only=True)
class KeepTokens(SplitBlockEdit):
    """Keep the tokens `keep` of those that a block is given, `among`; both are positions in the model's whole sequence.

    Queries are those of kept tokens alone.
    """

    KIND: ClassVar[str] = "keep_tokens"
    MAKES: ClassVar[str] = "tokens left out between blocks"
    ORDER: ClassVar[int] = 1

    keep: tuple[int, ...]
    among: tuple[int, ...]

    def describe(self) -> str:
        """Return how many tokens stay."""
        return f"{len(self.keep)} of {len(self.among)} tokens go on"

    def check(self, model: nn.Module) -> None:
        """Check that the kept tokens are some of those given, in order, and that the block can be split."""
        for kept in (self.keep, self.among):
            if not kept or kept != tuple(sorted(set(kept))) or not set(kept) <= set(self.among):
                raise BudgetError(
                    f"{self.site.block}: keep some of the {len(self.among)} tokens that come in, in order, each once."
                )
        super().check(model)

    def split(self, block: nn.Module, names: BlockNames) -> KeptTokens:
        """Return a `KeptTokens` of the block's own layers."""
        device = next(block.parameters()).device
        return KeptTokens(block, names, positions=self.keep, given=self.among, device=device)

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the attention's tensors under their new names, and beside the query's weight the index of tokens."""
        yield from super().map_tensor(name, tensor)
        if name == f"{self.site.query}.weight":
            index = [self.among.index(position) for position in self.keep]
            yield f"{self.site.block}.kept_tokens", torch.tensor(index, device=tensor.device)
