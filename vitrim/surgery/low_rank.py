"""Putting two factors in the place of a linear or convolution layer: `layers.low_rank` modules and their tensors."""

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

    Without `tensors` the factors are those of that rank that are nearest to the weight; `ToLowRank.by` brings others.
    """

    KIND: ClassVar[str] = "low_rank"
    ORDER: ClassVar[int] = 1

    layer: LayerSite
    rank: int

    @classmethod
    def by(cls, layer: LayerSite, factors: Sequence[Factors], *, bias: Tensor | None = None) -> ToLowRank:
        """The edit that puts given factors, `up` (M, R) and `down` (R, N) of each group, and with one another bias."""
        tensors = {name: factor.float() for name, factor in _named(layer, factors).items()}
        if bias is not None:
            tensors[f"{layer.path}.up.bias"] = bias
        return cls(layer=layer, rank=len(factors[0][1]), tensors=tensors)

    def describe(self) -> str:
        """Rank after of before, and what is left of the weight's values."""
        layer = self.layer
        rows, cols = layer.num_rows, layer.num_cols
        each = f" in each of {layer.groups} groups" if layer.groups > 1 else ""
        left = self.rank * (rows + cols) / (rows * cols)
        return f"rank {self.rank} of {min(rows, cols)}{each}, {left:.0%} of its values"

    def affected_tensors(self) -> list[str]:
        """The layer's weight and bias."""
        return [f"{self.layer.path}.weight", f"{self.layer.path}.bias"]

    def check(self, model: nn.Module) -> None:
        """Refuse a rank that there is not, and a module that is not the layer."""
        layer = self.layer
        full = min(layer.num_rows, layer.num_cols)
        if not 1 <= self.rank <= full:
            raise BudgetError(f"{layer.path}: asked for rank {self.rank} of a layer of rank {full}; use 1..{full}.")
        check_layer(model, layer)

    def reshape_(self, model: nn.Module) -> None:
        """Put the two factors in the layer's place."""
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
        """The weight as two factors; the bias under its new name, in memory of its own."""
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
    """The factors of all groups in the shapes and under the names that the modules have for them."""
    ups, downs = zip(*factors, strict=True)
    down = torch.cat(downs).reshape(-1, layer.num_in // layer.groups, *layer.kernel)
    up = torch.cat(ups).reshape(layer.num_out, -1, *[1] * len(layer.kernel))
    return {f"{layer.path}.down.weight": down, f"{layer.path}.up.weight": up}
