"""A linear layer with its weight in int8 and one scale per output; kernels and rounding are torchao's.

The weight is kept as plain int8 values and scales, in files too; torchao's tensor type wraps them when the layer runs.
With `activations` each token is rounded to int8 as well and the product is one of integers. Without it only the weight
is int8, which saves memory, not time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrim.errors import MissingExtraError


class Int8Linear(nn.Module):
    """Linear layer with an int8 weight (out, in) and a scale per output (out, 1); parameters are uninitialised."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activations: bool,
        bias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        make = {"device": device, "dtype": dtype}
        weight = torch.empty(out_features, in_features, device=device, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)  # integers have no gradient
        self.scale = nn.Parameter(torch.empty(out_features, 1, **make), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **make)) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (..., in) to outputs (..., out); gradients ignore the rounding of activations."""
        if not self.activations:
            return self._product(inputs, None)
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            return self._product(inputs, _rounding_of_tokens())
        exact = self._product(inputs, None)  # torchao's product of integers has no gradient
        return exact + (self._product(inputs.detach(), _rounding_of_tokens()) - exact).detach()

    def _product(self, inputs: Tensor, rounding: Any) -> Tensor:
        weight = _torchao().Int8Tensor(
            self.weight.detach(), self.scale.detach(), [1, self.in_features], inputs.dtype, act_quant_kwargs=rounding
        )
        return functional.linear(inputs, weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes in the form of torch's own layers."""
        return f"in_features={self.in_features}, out_features={self.out_features}, activations={self.activations}"


def rounded(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight symmetrically to int8 values (M, N) and scales (M, 1), by torchao."""
    found = _torchao().Int8Tensor.from_hp(weight_MN.detach(), _per_row())
    return found.qdata, found.scale.reshape(-1, 1).to(weight_MN.dtype)


def _rounding_of_tokens() -> Any:
    """Return torchao's options for rounding activations, each token by itself."""
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    return QuantizeTensorToInt8Kwargs(_per_row())


def _per_row() -> Any:
    return _torchao().PerRow()


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError:
        raise MissingExtraError("torchao is not installed; pip install 'vitrim[int8]'.") from None
    return torchao.quantization
