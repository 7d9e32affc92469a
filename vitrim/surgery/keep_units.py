"""The edit that cuts hidden units out of an MLP: rows of its input projections, columns of its output projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError
from vitrim.surgery.edits import Edit, resize_
from vitrim.surgery.modules import submodule
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class KeepUnits(Edit):
    """Keep these hidden units of an MLP, in this order, and cut the others.

    `tensors` may hold values that replace the sliced originals: the output projection after least squares, or all the
    tensors of the MLP after a refit.
    """

    KIND: ClassVar[str] = "keep_units"
    MAKES: ClassVar[str] = "narrower MLPs"

    site: MlpSite
    keep: tuple[int, ...]

    @classmethod
    def first(cls, site: MlpSite, width: int) -> KeepUnits:
        """Return the cut that keeps the first `width` units."""
        return cls(site=site, keep=tuple(range(width)))

    @property
    def width(self) -> int:
        """How many hidden units stay."""
        return len(self.keep)

    @property
    def is_whole(self) -> bool:
        """Whether every unit stays where it is and no tensor changes: the cut does nothing."""
        return self.keep == tuple(range(self.site.d_hidden)) and not self.tensors

    def with_output(self, weight_DK: Tensor, bias_D: Tensor | None) -> KeepUnits:
        """Return the same cut with these values for the output projection instead of the sliced ones."""
        tensors = {f"{self.site.output}.weight": weight_DK}
        return replace(self, tensors=tensors | ({} if bias_D is None else {f"{self.site.output}.bias": bias_D}))

    def shape_only(self) -> KeepUnits:
        """Return a cut to the same width, without indices of its own or tensors."""
        return replace(self, keep=tuple(range(self.width)), tensors={})

    def describe(self) -> str:
        """Return the widths before and after."""
        return f"{self.width} of {self.site.d_hidden} units"

    def affected_tensors(self) -> list[str]:
        """Return the names of the tensors of the MLP's layers, and of any that the edit replaces."""
        site = self.site
        rows = [name for name in (site.value, site.gate, site.norm) if name is not None]
        names = [f"{name}.{part}" for name in rows for part in ("weight", "bias")] + [f"{site.output}.weight"]
        return names + [name for name in self.tensors if name not in names]

    def check(self, model: nn.Module) -> None:
        """Check that the units exist and none is kept twice."""
        self._check_units()
        for name in (self.site.value, self.site.gate, self.site.output, self.site.norm):
            if name is not None:
                submodule(model, name)

    def reshape_(self, model: nn.Module) -> None:
        """Resize the MLP's layers."""
        site = self.site
        for name in (site.value, site.gate):
            if name is not None:
                size = self.width * site.num_groups
                resize_(submodule(model, name), dim=0, size=size, attributes=("out_features", "out_channels"))
        resize_(submodule(model, site.output), dim=1, size=self.width, attributes=("in_features", "in_channels"))
        if site.norm is not None:
            resize_(submodule(model, site.norm), dim=-1, size=self.width, attributes=["normalized_shape"])

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield one tensor of the MLP without the removed units.

        A matrix that is given for a 1x1 convolution gets the two dimensions that it lacks, of size 1.
        """
        if name not in self.tensors:
            yield name, self._cut(name, tensor)
            return
        given = self.given(name, tensor)
        yield name, given.reshape(*given.shape, *tensor.shape[given.ndim :])

    def _check_units(self) -> None:
        total = self.site.d_hidden
        if not self.keep or len(set(self.keep)) != len(self.keep) or not 0 <= min(self.keep) <= max(self.keep) < total:
            raise BudgetError(f"{self.site.path}: indices must be unique, at least one, within 0..{total - 1}.")

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        self._check_units()
        site = self.site
        is_value, is_norm = (path is not None and name.startswith(f"{path}.") for path in (site.value, site.norm))
        dim, num_groups = -1 if is_norm else int(name == f"{site.output}.weight"), site.num_groups if is_value else 1
        if tensor.shape[dim] != num_groups * site.d_hidden:
            units = tensor.shape[dim] // num_groups
            raise BudgetError(
                f"{name}: has {units} hidden units, the plan was made for {site.d_hidden}; use its own model."
            )
        keep = torch.tensor(self.keep, device=tensor.device)
        keep = torch.cat([keep + group * site.d_hidden for group in range(num_groups)])
        return tensor.index_select(dim, keep).contiguous()
