"""The edit that drops whole heads of an attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from vitrim.errors import BudgetError
from vitrim.surgery.edits import Edit
from vitrim.surgery.keep_head_dims import check_rows, slim_, slim_tensors
from vitrim.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class KeepHeads(Edit):
    """Keep some heads of an attention, in ascending order, and drop the others.

    `tensors` may hold new values of the projections, under their new names `q`, `k`, `v` and `proj`.
    """

    KIND: ClassVar[str] = "keep_heads"
    MAKES: ClassVar[str] = "fewer heads in some blocks"

    site: AttentionSite
    keep: tuple[int, ...]

    def shape_only(self) -> KeepHeads:
        """Return an edit that keeps as many heads, without indices of its own or tensors."""
        return replace(self, keep=tuple(range(len(self.keep))), tensors={})

    def describe(self) -> str:
        """Return how many heads stay."""
        return f"{len(self.keep)} of {self.site.num_heads} heads"

    def affected_tensors(self) -> list[str]:
        """Return the names of the projections' tensors."""
        return self.site.tensors

    def check(self, model: nn.Module) -> None:
        """Check that the heads exist and stand in order, each once."""
        heads = range(self.site.num_heads)
        if not self.keep or self.keep != tuple(sorted(set(self.keep) & set(heads))):
            raise BudgetError(f"{self.site.path}: keep some of its heads 0..{heads[-1]}, in order and each once.")
        check_rows(model, self.site)

    def reshape_(self, model: nn.Module) -> None:
        """Replace the attention by a `SlimAttention` of fewer heads."""
        slim_(model, self.site, len(self.keep), self.site.head_dim, self.site.head_dim)

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the rows of the kept heads under their new names, or their columns of the output."""
        every = tuple(range(self.site.head_dim))
        kept = tuple(every if head in self.keep else () for head in range(self.site.num_heads))
        for new, sliced in slim_tensors(self.site, kept, kept, name, tensor):
            yield new, self.given(new, sliced) if new in self.tensors else sliced
