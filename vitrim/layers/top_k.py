"""A linear layer that reads only the largest of its inputs, token by token.

Weight and names are unchanged. The selection is the same in training: there is no straight-through estimator, so
inputs that were dropped get no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Rank = Literal["magnitude", "value"]


class TopKLinear(nn.Linear):
    """A linear layer that sets all but the `num_active` largest entries of each token to zero before it multiplies.

    After `gather_()` it sums the picked columns of the weight instead of multiplying by a matrix that is mostly zeros.
    Whether that is faster depends on how many tokens come at once (measured by benchmarks/lazy_neuron.py, discussed in
    docs/methods/top-k.md), so it is off by default.
    """

    num_active: int
    by: Rank
    gather: bool = False

    @classmethod
    def of(cls, linear: nn.Linear, num_active: int, *, by: Rank) -> TopKLinear:
        """Make the layer from a linear layer, with the same parameters."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        new.num_active, new.by = num_active, by
        return new

    def gather_(self) -> TopKLinear:
        """Sum picked columns from now on; stores the weight column by column, with the same shape and values."""
        self.weight.data = self.weight.data.t().contiguous().t()
        self.gather = True
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the largest entries of each token by the weight."""
        if self.num_active >= self.in_features:
            return super().forward(input)
        if not self.gather:
            return super().forward(keep_top(input, self.num_active, by=self.by))
        values, places = top_entries(input, self.num_active, by=self.by)
        bags = functional.embedding_bag(
            places.reshape(-1, self.num_active),
            self.weight.t().contiguous(),  # no copy behind `gather_`; strided, the sum would take ten times as long
            per_sample_weights=values.reshape(-1, self.num_active),
            mode="sum",
        )
        output = bags.reshape(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        """Return the sizes as nn.Linear does, and how many entries are read."""
        return f"{super().extra_repr()}, num_active={self.num_active}, by={self.by}"


def top_entries(input: Tensor, num_active: int, *, by: Rank) -> tuple[Tensor, Tensor]:
    """Return the `num_active` largest entries along the last dimension and their positions.

    It is exactly that many, even in ties; with `by` "magnitude" the sign does not count.
    """
    scores = input.abs() if by == "magnitude" else input
    places = scores.topk(num_active, dim=-1, sorted=False).indices
    return input.gather(-1, places), places


def keep_top(input: Tensor, num_active: int, *, by: Rank = "magnitude") -> Tensor:
    """Return the input with all but its `num_active` largest entries along the last dimension set to zero."""
    if num_active >= input.shape[-1]:
        return input
    values, places = top_entries(input, num_active, by=by)
    return torch.zeros_like(input).scatter(-1, places, values)
