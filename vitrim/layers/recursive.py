"""Layers of blocks that are looped: one matrix for several depths, with two thin factors of its own for each depth.

The first block of a loop owns what is shared, and the others refer to it. So it appears once among the parameters and
in a file, and every depth adds to its gradient. Each block stays a module of its own: code that counts blocks, hooks
them or reads features behind one finds what it did before. How the values are found is not decided here.

Shapes: M outputs, N inputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitrim.layers.fips import whole


class RecursiveLinear(nn.Module):
    """Linear layer with the matrix W + B A: W (M, N) shared, B `up` (M, R) and A `down` (R, N) its own; uninitialised.

    With `owner` None the layer owns W; otherwise it uses the owner's. At rank 0 there are no factors. A bias is the
    layer's own, or with `tied_bias` the owner's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        owner: RecursiveLinear | None = None,
        bias: bool = True,
        tied_bias: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.others: tuple[RecursiveLinear, ...] = ()
        sizes = {"shared": (out_features, in_features)} if owner is None else {}
        sizes |= {"up": (out_features, rank), "down": (rank, in_features)} if rank else {}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        if owner is None or not (bias and tied_bias):
            own = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
            self.register_parameter("bias", own)
        self.others = () if owner is None else (owner,)  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        """Return one of torch's own attributes, or the owner's where the tensor is shared."""
        if name in ("shared", "bias") and name not in self._parameters and self.others:
            found = getattr(self.others[0], name)
            return found if found is None else whole(found)
        return super().__getattr__(name)

    @property
    def weight(self) -> Tensor:
        """The matrix as a plain linear layer would hold it, (out, in)."""
        return self.shared + self.up @ self.down if self.rank else self.shared

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply inputs (..., in) by the shared matrix and by the factors, in turn."""
        outputs = functional.linear(inputs, self.shared, self.bias)
        if self.rank:
            outputs = outputs + functional.linear(functional.linear(inputs, self.down), self.up)
        return outputs

    def norms(self) -> dict[nn.Parameter, float]:
        """Return `up` with the norm of which a training step is a share, since its own may be zero.

        It makes a step of B A as large along each direction as the same share makes one of W, however A is scaled.
        """
        if not self.rank:
            return {}
        down = max(float(self.down.detach().norm()), torch.finfo(torch.float32).tiny)
        most = min(self.in_features, self.out_features)
        return {self.up: float(self.shared.detach().norm()) * self.rank / (most**0.5 * down)}

    def extra_repr(self) -> str:
        """Return the sizes in the form of torch's own layers."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"{'shares its matrix' if self.others else 'owns its matrix'}"
        )


class Shared(nn.Module):
    """Stands for a module of an earlier block, such as a norm, and does what that one does, with its tensors."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.others = (owner,)  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        """Return one of torch's own attributes, or else the owner's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["others"][0], name)
            return whole(found) if isinstance(found, Tensor) else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the owner."""
        for parameter in self.others[0].parameters():
            whole(parameter)
        return self.others[0](*args, **kwargs)
