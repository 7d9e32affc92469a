"""Letting only the most active hidden units of each token through to an MLP's output projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vitrim.errors import BudgetError, SiteNotFoundError
from vitrim.layers.top_k import Rank, TopKLinear
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import submodule
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class TopKActivation(Edit):
    """An MLP's output projection reads the `num_active` largest of a token's hidden activations. No tensor changes."""

    KIND: ClassVar[str] = "top_k"
    ORDER: ClassVar[int] = 2

    site: MlpSite
    num_active: int
    by: Rank = "magnitude"

    def describe(self) -> str:
        """Active units of all."""
        return f"{self.num_active} of {self.site.d_hidden} units active a token"

    def affected_tensors(self) -> list[str]:
        """The weight whose layer it wraps, though not a value of it changes."""
        return [f"{self.site.output}.weight"]

    def check(self, model: nn.Module) -> None:
        """Refuse a count that is not there, and an output that is no plain linear layer any more."""
        total = self.site.d_hidden
        if not 1 <= self.num_active <= total:
            raise BudgetError(f"{self.site.path}: asked for {self.num_active} active of {total} units; use 1..{total}.")
        output = submodule(model, self.site.output)
        if type(output) is not nn.Linear or output.in_features != total:
            raise SiteNotFoundError(
                f"{self.site.output}: is {type(output).__name__}; top-k needs a linear layer of {total} inputs there."
            )

    def reshape_(self, model: nn.Module) -> None:
        """Put the layer in the output projection's place, around the same parameters."""
        output = submodule(model, self.site.output)
        assert isinstance(output, nn.Linear)
        replace_(model, self.site.output, TopKLinear.of(output, self.num_active, by=self.by))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """As it was."""
        yield name, tensor
