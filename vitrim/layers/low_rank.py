"""A linear or convolution layer as two smaller ones: `down` to a few channels, then `up` to all, with the bias.

Code that inspects the original layer (sizes, weight, bias) finds the same attributes here; `weight` is multiplied out
on each access. How the factors are computed is not decided here.

Shapes: G groups, M outputs and N inputs (times kernel positions) of a group, R rank of a group.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Factors(nn.Module):
    """Common part of both kinds: run `down`, then `up`, which has the bias."""

    down: nn.Linear | Conv
    up: nn.Linear | Conv

    @property
    def bias(self) -> Tensor | None:
        """The bias, which belongs to `up`."""
        return self.up.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to a few channels, and those to all outputs."""
        return self.up(self.down(inputs))


class LowRankLinear(_Factors):
    """A linear layer to `rank` channels without bias, then one to all outputs; parameters are uninitialised.

    `weight` is (out, in), as in a linear layer, also when it replaces a transformers `Conv1D`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        make = {"device": device, "dtype": dtype}
        self.down = cast(nn.Linear, skip_init(nn.Linear, in_features, rank, bias=False, **make))
        self.up = cast(nn.Linear, skip_init(nn.Linear, rank, out_features, bias=bias, **make))

    @property
    def weight(self) -> Tensor:
        """The product of both factors (out, in)."""
        return self.up.weight @ self.down.weight

    def extra_repr(self) -> str:
        """Return the sizes in the form of torch's own layers."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankConv(_Factors):
    """A convolution to `rank` channels per group without bias, then a 1x1 one with as many groups; uninitialised.

    `down` has the kernel, stride, padding and dilation of the layer that is replaced.
    """

    def __init__(self, conv: Conv, rank: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.rank = conv.dilation, rank
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(conv.kernel_size)]
        make = {"groups": conv.groups, "device": conv.weight.device, "dtype": conv.weight.dtype}
        down = skip_init(
            kind,
            conv.in_channels,
            conv.groups * rank,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            padding_mode=conv.padding_mode,
            bias=False,
            **make,
        )
        up = skip_init(kind, conv.groups * rank, conv.out_channels, 1, bias=conv.bias is not None, **make)
        self.down, self.up = cast(Conv, down), cast(Conv, up)

    @property
    def weight(self) -> Tensor:
        """The product of both factors, in the shape of the original kernels."""
        up_GMR = self.up.weight.reshape(self.groups, -1, self.rank)
        down_GRN = self.down.weight.reshape(self.groups, self.rank, -1)
        return (up_GMR @ down_GRN).reshape(self.out_channels, -1, *self.kernel_size)

    def extra_repr(self) -> str:
        """Return the sizes in the form of torch's own layers."""
        return f"{self.in_channels}, {self.out_channels}, groups={self.groups}, rank={self.rank}"
