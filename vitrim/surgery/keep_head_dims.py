"""The edit that drops dimensions of attention heads: of queries and keys together, and of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError, SiteNotFoundError
from vitrim.layers.attention import SlimAttention
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import submodule
from vitrim.types import AttentionSite

Dims = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class KeepHeadDims(Edit):
    """Keep some dimensions of each head's queries and keys, and of its values; equally many in every head.

    `tensors` may hold new values of the projections, under their new names `q`, `k`, `v` and `proj`: kept dimensions
    with the others folded into them, or mixtures of all dimensions, of which only the number counts.
    """

    KIND: ClassVar[str] = "keep_head_dims"
    MAKES: ClassVar[str] = "narrower heads"

    site: AttentionSite
    keep_qk: Dims
    keep_v: Dims

    @property
    def after(self) -> AttentionSite:
        """The attention as it is after the edit; its `head_dim` is that of the values."""
        site = self.site
        paths = {role: f"{site.path}.{name}" for role, name in (("query", "q"), ("key", "k"), ("value", "v"))}
        return replace(site, **paths, output=f"{site.path}.proj", fused=False, head_dim=len(self.keep_v[0]))

    def shape_only(self) -> KeepHeadDims:
        """Return an edit with the same counts, without indices of its own or tensors."""
        first = [tuple(tuple(range(len(dims))) for dims in kept) for kept in (self.keep_qk, self.keep_v)]
        return replace(self, keep_qk=first[0], keep_v=first[1], tensors={})

    def describe(self) -> str:
        """Return how many dimensions of a head stay."""
        total = self.site.head_dim
        return f"{len(self.keep_qk[0])} of {total} query and key, {len(self.keep_v[0])} of {total} value dims a head"

    def affected_tensors(self) -> list[str]:
        """Return the names of the projections' tensors."""
        return self.site.tensors

    def check(self, model: nn.Module) -> None:
        """Check that the dimensions exist and every head keeps equally many."""
        site = self.site
        for kept in (self.keep_qk, self.keep_v):
            sizes = {len(dims) for dims in kept}
            good = all(len(set(dims)) == len(dims) and set(dims) <= set(range(site.head_dim)) for dims in kept)
            if len(kept) != site.num_heads or len(sizes) != 1 or 0 in sizes or not good:
                raise BudgetError(
                    f"{site.path}: keep as many of 0..{site.head_dim - 1} in each of {site.num_heads} heads, "
                    "at least one."
                )
        check_rows(model, site)

    def reshape_(self, model: nn.Module) -> None:
        """Replace the attention by a `SlimAttention`."""
        slim_(model, self.site, self.site.num_heads, len(self.keep_qk[0]), len(self.keep_v[0]))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the kept rows of queries, keys and values under their new names, or the kept columns of the output."""
        for new, sliced in slim_tensors(self.site, self.keep_qk, self.keep_v, name, tensor):
            yield new, self.given(new, sliced) if new in self.tensors else sliced


def check_rows(model: nn.Module, site: AttentionSite) -> None:
    """Check that a model has the attention that a site describes.

    Raises:
        SiteNotFoundError: it has other sizes.
    """
    rows = site.num_heads * site.head_dim * (3 if site.fused else 1)
    if cast(nn.Linear, submodule(model, site.query)).weight.shape[0] != rows:
        raise SiteNotFoundError(f"{site.query}: has not {rows} rows; the plan was made for another model.")


def slim_(model: nn.Module, site: AttentionSite, num_heads: int, num_qk: int, num_v: int) -> None:
    """Replace an attention by a `SlimAttention` of these sizes, uninitialised."""
    query, output = (cast(nn.Linear, submodule(model, path)) for path in (site.query, site.output))
    new = SlimAttention(
        site.d_model,
        num_heads=num_heads,
        num_qk=num_qk,
        num_v=num_v,
        scale=site.scale,
        qkv_bias=query.bias is not None,
        proj_bias=output.bias is not None,
        as_tuple=site.as_tuple,
        device=query.weight.device,
        dtype=query.weight.dtype,
    ).requires_grad_(query.weight.requires_grad)
    replace_(model, site.path, new)


def slim_tensors(
    site: AttentionSite, keep_qk: Dims, keep_v: Dims, name: str, tensor: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield what becomes of one tensor if these dimensions of each head stay: its new name, and its kept part."""
    layer, _, part = name.rpartition(".")
    if layer == site.output:
        value = tensor if part == "bias" else tensor.index_select(1, _flat(site, keep_v, tensor)).contiguous()
        yield f"{site.path}.proj.{part}", value
        return
    roles = [("q", site.query, keep_qk), ("k", site.key, keep_qk), ("v", site.value, keep_v)]
    for number, (role, path, kept) in enumerate(roles):
        if path == layer:
            offset = number * site.num_heads * site.head_dim if site.fused else 0
            rows = _flat(site, kept, tensor) + offset
            yield f"{site.path}.{role}.{part}", tensor.index_select(0, rows).contiguous()


def _flat(site: AttentionSite, kept: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Return the rows of a projection that hold the kept dimensions, head after head."""
    rows = [head * site.head_dim + dim for head, dims in enumerate(kept) for dim in dims]
    return torch.tensor(rows, device=like.device)
