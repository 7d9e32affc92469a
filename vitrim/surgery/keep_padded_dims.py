"""The edit that drops dimensions of heads in an attention whose own code stays: its projections pad what is gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError
from vitrim.layers.padded_heads import PaddedHeads, PickedHeads
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.keep_head_dims import check_rows
from vitrim.surgery.modules import submodule
from vitrim.types import AttentionSite


@dataclass(frozen=True, kw_only=True)
class KeepPaddedDims(Edit):
    """Keep the first dimensions of each head's queries and keys, and of its values, in an attention that is not plain.

    `tensors` may hold new values of the projections, under their old names: mixtures of all dimensions.
    """

    KIND: ClassVar[str] = "keep_padded_dims"
    MAKES: ClassVar[str] = "narrower heads"

    site: AttentionSite
    num_qk: int
    num_v: int

    @property
    def after(self) -> AttentionSite:
        """The attention as it is after the edit: its own code sees no change."""
        return self.site

    def describe(self) -> str:
        """Return how many dimensions of a head stay."""
        total = self.site.head_dim
        return f"{self.num_qk} of {total} query and key, {self.num_v} of {total} value dims a head, padded with zeros"

    def affected_tensors(self) -> list[str]:
        """Return the names of the projections' tensors."""
        return self.site.tensors

    def check(self, model: nn.Module) -> None:
        """Check that there are as many dimensions."""
        if not all(1 <= num <= self.site.head_dim for num in (self.num_qk, self.num_v)):
            raise BudgetError(f"{self.site.path}: keep 1..{self.site.head_dim} dimensions of each head.")
        check_rows(model, self.site)

    def reshape_(self, model: nn.Module) -> None:
        """Replace the projections."""
        site = self.site
        for path, kept in self._kept().items():
            old = cast(nn.Linear, submodule(model, path))
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            has_bias, trains = old.bias is not None, old.weight.requires_grad
            new = (
                PickedHeads(site.num_heads, site.head_dim, kept[0], old.weight.shape[0], bias=has_bias, **place)
                if path == site.output
                else PaddedHeads(site.d_model, site.num_heads, site.head_dim, kept, bias=has_bias, **place)
            )
            replace_(model, path, new.requires_grad_(trains))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield one projection's tensor without the rows or columns of the dimensions that are dropped."""
        path, _, part = name.rpartition(".")
        if name in self.tensors:
            yield name, self.given(name, tensor)
        elif path == self.site.output and part == "bias":
            yield name, tensor
        else:
            yield name, tensor.index_select(int(path == self.site.output), self._rows(path, tensor)).contiguous()

    def _kept(self) -> dict[str, tuple[int, ...]]:
        """Return for each projection how many dimensions of a head stay, for each of its groups of rows."""
        site = self.site
        if site.fused:
            return {site.query: (self.num_qk, self.num_qk, self.num_v), site.output: (self.num_v,)}
        both = {site.query: (self.num_qk,), site.key: (self.num_qk,)}
        return both | {site.value: (self.num_v,), site.output: (self.num_v,)}

    def _rows(self, path: str, like: Tensor) -> Tensor:
        """Return the rows of a projection that stay, or the columns of the output projection."""
        site = self.site
        rows = [
            (group * site.num_heads + head) * site.head_dim + dim
            for group, num_kept in enumerate(self._kept()[path])
            for head in range(site.num_heads)
            for dim in range(num_kept)
        ]
        return torch.tensor(rows, device=like.device)
