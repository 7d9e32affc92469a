"""The edit that replaces a linear or convolution layer by two factors (`layers.low_rank`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError
from vitrim.layers.low_rank import Conv, LowRankConv, LowRankLinear
from vitrim.ops.low_rank import truncate
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import check_layer, check_weight, submodule
from vitrim.types import LayerSite

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ToLowRank(Edit):
    """A layer becomes two: `down` to `rank` channels a group, then `up`, which has the bias.

    Without `tensors` the factors are the nearest of that rank to the weight; `ToLowRank.by` sets others.
    """

    KIND: ClassVar[str] = "low_rank"
    MAKES: ClassVar[str] = "low-rank layers"
    ORDER: ClassVar[int] = 1

    layer: LayerSite
    rank: int

    @classmethod
    def by(cls, layer: LayerSite, factors: Sequence[Factors], *, bias: Tensor | None = None) -> ToLowRank:
        """Make the edit from given factors, `up` (M, R) and `down` (R, N) of each group, and optionally a new bias."""
        tensors = {name: factor.float() for name, factor in _named(layer, factors).items()}
        if bias is not None:
            tensors[f"{layer.path}.up.bias"] = bias
        return cls(layer=layer, rank=len(factors[0][1]), tensors=tensors)

    def describe(self) -> str:
        """Return the rank before and after, and the share of the weight's numbers that is left."""
        layer = self.layer
        rows, cols = layer.num_rows, layer.num_cols
        each = f" in each of {layer.groups} groups" if layer.groups > 1 else ""
        left = self.rank * (rows + cols) / (rows * cols)
        return f"rank {self.rank} of {min(rows, cols)}{each}, {left:.0%} of its values"

    def affected_tensors(self) -> list[str]:
        """Return the names of the layer's weight and bias."""
        return [f"{self.layer.path}.weight", f"{self.layer.path}.bias"]

    def check(self, model: nn.Module) -> None:
        """Check that the rank is possible and the layer is there and of the right kind."""
        layer = self.layer
        full = min(layer.num_rows, layer.num_cols)
        if not 1 <= self.rank <= full:
            raise BudgetError(f"{layer.path}: asked for rank {self.rank} of a layer of rank {full}; use 1..{full}.")
        check_layer(model, layer)

    def reshape_(self, model: nn.Module) -> None:
        """Replace the layer by its two factors."""
        old = submodule(model, self.layer.path)
        weight = cast(nn.Parameter, old.weight)
        if self.layer.kind == "conv":
            new: nn.Module = LowRankConv(cast(Conv, old), self.rank)
        else:
            new = LowRankLinear(
                self.layer.num_in,
                self.layer.num_out,
                self.rank,
                bias=self.layer.has_bias,
                device=weight.device,
                dtype=weight.dtype,
            )
        replace_(model, self.layer.path, new.requires_grad_(weight.requires_grad))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield two factors for the weight; for the bias a copy under its new name."""
        path = self.layer.path
        if name == f"{path}.bias":
            new = f"{path}.up.bias"
            yield new, self.given(new, tensor) if new in self.tensors else tensor.clone()
            return
        if f"{path}.up.weight" in self.tensors:
            for new in (f"{path}.down.weight", f"{path}.up.weight"):
                yield new, self.given(new, tensor)
            return
        check_weight(self.layer, tensor.shape)
        factors = [truncate(matrix, self.rank) for matrix in self.layer.matrices(tensor)]
        for new, factor in _named(self.layer, factors).items():
            yield new, factor.to(tensor.dtype).contiguous()


def _named(layer: LayerSite, factors: Sequence[Factors]) -> dict[str, Tensor]:
    """Return the factors of all groups under the names and in the shapes of the modules' parameters."""
    ups, downs = zip(*factors, strict=True)
    down = torch.cat(downs).reshape(-1, layer.num_in // layer.groups, *layer.kernel)
    up = torch.cat(ups).reshape(layer.num_out, -1, *[1] * len(layer.kernel))
    return {f"{layer.path}.down.weight": down, f"{layer.path}.up.weight": up}
