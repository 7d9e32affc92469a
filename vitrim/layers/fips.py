"""A linear layer whose matrix is a dense basis, shared with other layers, times its own sparse coefficients.

The basis is a parameter of one of the layers, its owner, and the others refer to it: so it appears once among the
parameters and in a file, and every user adds to its gradient. Only nonzero coefficients are stored, with one bit for
every coefficient that says whether it is; a coefficient that is not stored can't come back in training. The product
uses dense kernels: at 75% zeros torch's sparse ones are slower (docs/methods/fips.md). How the values are found is not
decided here.

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
    """Linear layer with the matrix U V, U (D, R) shared, or its transpose if `role` is "input"; uninitialised.

    With `owner` None the layer owns a basis; otherwise it uses the owner's.
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
        """The shared basis (D, R), the layer's own or its owner's."""
        return whole((self.others or (self,))[0].basis)

    @property
    def coeff_RC(self) -> Tensor:
        """The coefficients as a dense matrix (R, C), zeros included."""
        mask_RC = unpack(self.places, (self.rank, self.num_cols))
        return self.values.new_zeros(mask_RC.shape).masked_scatter(mask_RC, self.values)

    @property
    def weight(self) -> Tensor:
        """The matrix as a plain linear layer would hold it, (out, in)."""
        weight_DC = self.basis_DR @ self.coeff_RC
        return weight_DC.T if self.role == "input" else weight_DC

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply inputs (..., in) by the matrix, in the order that needs fewer products for this many tokens."""
        num_tokens, size = inputs.numel() // self.in_features, self.num_rows * self.num_cols
        in_turn = num_tokens * self.rank * (self.num_rows + self.num_cols)
        if in_turn > size * (self.rank + num_tokens):
            return functional.linear(inputs, self.weight, self.bias)
        if self.role == "input":
            return functional.linear(functional.linear(inputs, self.basis_DR.T), self.coeff_RC.T, self.bias)
        return functional.linear(functional.linear(inputs, self.coeff_RC), self.basis_DR, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes in the form of torch's own layers."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"num_values={len(self.values)}, {'shares a basis' if self.others else 'owns its basis'}"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that another block owns.

    Raises:
        RecipeError: that block is sharded (FSDP), so its tensors are complete only while it runs.
    """
    if isinstance(tensor, DTensor):
        raise RecipeError("recover.fsdp: blocks that share tensors can't be gathered one at a time; drop fsdp.")
    return tensor


def pack(mask: Tensor) -> Tensor:
    """Pack a mask into bytes (uint8), eight entries each, row after row, the first entry in the lowest bit."""
    flat = functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, device=mask.device)).sum(1).to(torch.uint8)


def unpack(places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the bool mask of this shape that `pack` packed."""
    bits = places[:, None] >> torch.arange(8, device=places.device, dtype=torch.uint8)
    return (bits & 1).bool().flatten()[: shape[0] * shape[1]].view(shape)
