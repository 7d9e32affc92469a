"""Projections of an attention whose heads lose dimensions while its own code, made for all of them, goes on running.

In front, the dimensions that are gone are put out as zeros, which add nothing to a dot product and nothing to a sum of
values; behind, they are left out. So positions, masks, gates and whatever else that code does stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PaddedHeads(nn.Module):
    """A linear layer to the first `kept` dimensions of each head, the others zeros; one such group after the other."""

    def __init__(
        self, in_features: int, num_heads: int, head_dim: int, kept: tuple[int, ...], *, bias: bool, **place: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, len(kept) * num_heads * head_dim
        self.num_heads, self.head_dim, self.kept = num_heads, head_dim, kept
        rows = num_heads * sum(kept)
        self.weight = nn.Parameter(torch.empty(rows, in_features, **place))
        self.bias = nn.Parameter(torch.empty(rows, **place)) if bias else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (..., D) to all dimensions of all heads."""
        groups = functional.linear(tokens, self.weight, self.bias).split(
            [self.num_heads * n for n in self.kept], dim=-1
        )
        padded = [
            functional.pad(group.unflatten(-1, (self.num_heads, num_kept)), (0, self.head_dim - num_kept)).flatten(-2)
            for group, num_kept in zip(groups, self.kept, strict=True)
        ]
        return padded[0] if len(padded) == 1 else torch.cat(padded, dim=-1)


class PickedHeads(nn.Module):
    """A linear layer from the first `kept` dimensions of each head."""

    def __init__(
        self, num_heads: int, head_dim: int, kept: int, out_features: int, *, bias: bool, **place: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = num_heads * head_dim, out_features
        self.num_heads, self.kept = num_heads, kept
        self.weight = nn.Parameter(torch.empty(out_features, num_heads * kept, **place))
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None

    def forward(self, mixed: Tensor) -> Tensor:
        """Map all dimensions of all heads to tokens (..., D)."""
        picked = mixed.unflatten(-1, (self.num_heads, -1))[..., : self.kept].flatten(-2)
        return functional.linear(picked, self.weight, self.bias)
