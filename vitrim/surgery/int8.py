"""The edit that replaces a linear layer by an int8 one (`layers.int8`), and rounds its weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from vitrim.layers.int8 import Int8Linear, rounded
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import check_layer, check_weight, submodule
from vitrim.types import LayerSite


@dataclass(frozen=True, kw_only=True)
class ToInt8(Edit):
    """A linear layer's weight becomes int8 with a scale per output; with `activations` its inputs are rounded too."""

    KIND: ClassVar[str] = "int8"
    MAKES: ClassVar[str] = "int8 layers"
    ORDER: ClassVar[int] = 3

    layer: LayerSite
    activations: bool = False

    def describe(self) -> str:
        """Return what is rounded, in a few words."""
        return "weight and activations in int8" if self.activations else "weight in int8"

    def affected_tensors(self) -> list[str]:
        """Return the names of the layer's weight and bias."""
        return [f"{self.layer.path}.weight", f"{self.layer.path}.bias"]

    def check(self, model: nn.Module) -> None:
        """Check that the layer is there and of the right kind."""
        check_layer(model, self.layer)

    def reshape_(self, model: nn.Module) -> None:
        """Replace the layer by an int8 layer."""
        old = submodule(model, self.layer.path)
        weight = cast(nn.Parameter, old.weight)
        new = Int8Linear(
            self.layer.num_in,
            self.layer.num_out,
            activations=self.activations,
            bias=self.layer.has_bias,
            device=weight.device,
            dtype=weight.dtype,
        )
        replace_(model, self.layer.path, new)

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield int8 values and scales for the weight; the bias is unchanged."""
        if name == f"{self.layer.path}.bias":
            yield name, tensor
            return
        check_weight(self.layer, tensor.shape)
        values, scale = rounded(self.layer.matrices(tensor)[0])
        yield name, values
        yield f"{self.layer.path}.scale", scale
