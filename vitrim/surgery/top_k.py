"""The edit that lets only the most active hidden units of each token through to an MLP's output projection."""

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
    """An MLP's output projection reads only a token's `num_active` largest hidden activations. No tensor changes."""

    KIND: ClassVar[str] = "top_k"
    MAKES: ClassVar[str] = "activations of which the largest stay"
    ORDER: ClassVar[int] = 2

    site: MlpSite
    num_active: int
    by: Rank = "magnitude"

    def describe(self) -> str:
        """Return how many units are active."""
        return f"{self.num_active} of {self.site.d_hidden} units active a token"

    def affected_tensors(self) -> list[str]:
        """Return the weight of the layer that is wrapped, though its values don't change."""
        return [f"{self.site.output}.weight"]

    def check(self, model: nn.Module) -> None:
        """Check that the count is possible and the output projection is still a plain linear layer."""
        total = self.site.d_hidden
        if not 1 <= self.num_active <= total:
            raise BudgetError(f"{self.site.path}: asked for {self.num_active} active of {total} units; use 1..{total}.")
        output = submodule(model, self.site.output)
        if type(output) is not nn.Linear or output.in_features != total:
            raise SiteNotFoundError(
                f"{self.site.output}: is {type(output).__name__}; top-k needs a linear layer of {total} inputs there."
            )

    def reshape_(self, model: nn.Module) -> None:
        """Replace the output projection by a `TopKLinear` with the same parameters."""
        output = submodule(model, self.site.output)
        assert isinstance(output, nn.Linear)
        replace_(model, self.site.output, TopKLinear.of(output, self.num_active, by=self.by))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensor unchanged."""
        yield name, tensor
