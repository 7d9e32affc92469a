"""A linear layer whose matrix is a dense basis, one for several layers, times sparse coefficients of its own.

The basis is a parameter of one of them, its owner; the others reach it there, so that it stands once among parameters
and in a file, and every user adds to its gradient. Of the coefficients those that are not zero are stored, and one bit
each that says where they stand: what is not stored can't come back in training. Dense kernels multiply: with 75%
zeros torch's sparse ones are slower (docs/methods/fips.md). How the values come about is not decided here.

Shapes: D rows of the basis, R rank, C columns of the layer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from vitrim.errors import RecipeError

Role = Literal["input", "output"]  # what of the layer is in the space of the basis: its inputs, or its outputs


class SharedBasisLinear(nn.Module):
    """Linear by the matrix U V (its transpose where `role` is input), U (D, R) shared; tensors are uninitialised.

    `owner` None makes the layer the owner of a basis.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        role: Role,
        num_values: int,
        owner: SharedBasisLinear | None = None,
        bias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.role = in_features, out_features, rank, role
        self.num_rows, self.num_cols = (in_features, out_features) if role == "input" else (out_features, in_features)
        self.others = () if owner is None else (owner,)  # in a tuple, so that it is no submodule
        if owner is None:
            self.basis = nn.Parameter(torch.empty(self.num_rows, rank, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(num_values, device=device, dtype=dtype))
        self.places: Tensor
        self.register_buffer("places", torch.empty(-(-rank * self.num_cols // 8), device=device, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def basis_DR(self) -> Tensor:
        """The shared basis, wherever it stands.

        Raises:
            RecipeError: its owner's block is in shards, and gathered only while that block runs.
        """
        basis_DR = (self.others or (self,))[0].basis
        if isinstance(basis_DR, DTensor):
            raise RecipeError("recover.fsdp: blocks that share a basis can't be gathered one at a time; drop fsdp.")
        return basis_DR

    @property
    def coeff_RC(self) -> Tensor:
        """The coefficients with their zeros."""
        mask_RC = unpack(self.places, (self.rank, self.num_cols))
        return self.values.new_zeros(mask_RC.shape).masked_scatter(mask_RC, self.values)

    @property
    def weight(self) -> Tensor:
        """The matrix that basis and coefficients stand for, (out, in)."""
        weight_DC = self.basis_DR @ self.coeff_RC
        return weight_DC.T if self.role == "input" else weight_DC

    def forward(self, inputs: Tensor) -> Tensor:
        """The product, in the order that takes fewer multiplications for this number of tokens."""
        num_tokens, size = inputs.numel() // self.in_features, self.num_rows * self.num_cols
        in_turn = num_tokens * self.rank * (self.num_rows + self.num_cols)
        if in_turn > size * (self.rank + num_tokens):
            return functional.linear(inputs, self.weight, self.bias)
        if self.role == "input":
            return functional.linear(functional.linear(inputs, self.basis_DR.T), self.coeff_RC.T, self.bias)
        return functional.linear(functional.linear(inputs, self.coeff_RC), self.basis_DR, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as torch's own layers show theirs."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"num_values={len(self.values)}, {'shares a basis' if self.others else 'owns its basis'}"
        )


def pack(mask: Tensor) -> Tensor:
    """A mask as bytes (uint8), eight entries each, row after row, the first in the lowest bit."""
    flat = functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, device=mask.device)).sum(1).to(torch.uint8)


def unpack(places: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask that `pack` has packed."""
    bits = places[:, None] >> torch.arange(8, device=places.device, dtype=torch.uint8)
    return (bits & 1).bool().flatten()[: shape[0] * shape[1]].view(shape)
