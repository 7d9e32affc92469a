"""Putting a basis that several linear layers share in the place of their matrices. See `layers.shared_basis`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError, CheckpointError, SiteNotFoundError
from vitrim.layers.fips import Role, SharedBasisLinear, pack
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import submodule


@dataclass(frozen=True, kw_only=True)
class ToFips(Edit):
    """Linear layers share a basis (D, `rank`), which the first of them owns; each has sparse coefficients of its own.

    Of each layer: its path, its role, its columns C (the side that is not in the space of the basis), and how many
    coefficients it has. `tensors` hold all that, and may hold biases; `ToFips.by` brings them.
    """

    KIND: ClassVar[str] = "fips"
    ORDER: ClassVar[int] = 1

    paths: tuple[str, ...]
    roles: tuple[Role, ...]
    columns: tuple[int, ...]
    counts: tuple[int, ...]
    d_model: int
    rank: int

    @classmethod
    def by(
        cls,
        basis_DR: Tensor,
        parts: Mapping[str, tuple[Role, Tensor, Tensor]],
        *,
        biases: Mapping[str, Tensor] | None = None,
    ) -> ToFips:
        """The edit that puts a basis in place; of each layer its role, coefficients and their mask, both (R, C)."""
        paths = tuple(parts)
        tensors = {f"{paths[0]}.basis": basis_DR, **(biases or {})}
        for path, (_, coeff_RC, mask_RC) in parts.items():
            tensors |= {f"{path}.values": coeff_RC[mask_RC], f"{path}.places": pack(mask_RC)}
        return cls(
            paths=paths,
            roles=tuple(role for role, _, _ in parts.values()),
            columns=tuple(coeff_RC.shape[1] for _, coeff_RC, _ in parts.values()),
            counts=tuple(len(tensors[f"{path}.values"]) for path in paths),
            d_model=basis_DR.shape[0],
            rank=basis_DR.shape[1],
            tensors=tensors,
        )

    @property
    def num_stored(self) -> int:
        """Numbers of basis and coefficients, with the bits of the masks counted as numbers of 32."""
        bits = sum(8 * -(-self.rank * columns // 8) for columns in self.columns)
        return self.d_model * self.rank + sum(self.counts) + bits // 32

    def describe(self) -> str:
        """The rank, how many share it, and what is left of their values."""
        num_cols = sum(self.columns)
        kept, left = sum(self.counts) / (self.rank * num_cols), self.num_stored / (self.d_model * num_cols)
        return (
            f"{len(self.paths)} matrices share a basis of rank {self.rank}, with {kept:.0%} of the coefficients: "
            f"{left:.0%} of their values, masks counted"
        )

    def affected_tensors(self) -> list[str]:
        """Weight and bias of each layer."""
        return [f"{path}.{name}" for path in self.paths for name in ("weight", "bias")]

    def check(self, model: nn.Module) -> None:
        """Refuse lists that don't fit each other, and layers that are not linear or of other sizes."""
        per_layer = (self.roles, self.columns, self.counts)
        if not self.paths or len(set(self.paths)) < len(self.paths) or {*map(len, per_layer)} != {len(self.paths)}:
            raise BudgetError(
                f"{self.where}: a shared basis needs different layers, with role, columns and count each."
            )
        if self.rank < 1 or any(not 0 <= n <= self.rank * c for n, c in zip(self.counts, self.columns, strict=True)):
            raise BudgetError(
                f"{self.where}: rank {self.rank} with {self.counts} coefficients for {self.columns} columns."
            )
        for path, role, columns in zip(self.paths, self.roles, self.columns, strict=True):
            layer = submodule(model, path)
            num_in, num_out = (self.d_model, columns) if role == "input" else (columns, self.d_model)
            if type(layer) is not nn.Linear or (layer.in_features, layer.out_features) != (num_in, num_out):
                raise SiteNotFoundError(
                    f"{path}: is {type(layer).__name__}; a shared basis takes a linear layer of {num_in} to {num_out}."
                )

    def reshape_(self, model: nn.Module) -> None:
        """Put layers that share a basis in the place of the linear ones."""
        owner: SharedBasisLinear | None = None
        for path, role, count in zip(self.paths, self.roles, self.counts, strict=True):
            old = cast(nn.Linear, submodule(model, path))
            new = SharedBasisLinear(
                old.in_features,
                old.out_features,
                self.rank,
                role=role,
                num_values=count,
                owner=owner,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            replace_(model, path, new.requires_grad_(old.weight.requires_grad))
            owner = owner or new

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """For a weight coefficients and places, with the first the basis; a bias as it is, or the one that is brought.

        All in memory of their own, since the model's may be trained.
        """
        path, _, kind = name.rpartition(".")
        if kind == "bias":
            yield name, self.given(name, tensor).clone() if name in self.tensors else tensor
            return
        owned = [f"{path}.basis"] if path == self.paths[0] else []
        for new in (*owned, f"{path}.values", f"{path}.places"):
            if new not in self.tensors:
                raise CheckpointError(f"{new}: the plan does not hold it; load the saved model, or compress again.")
            like = tensor if not new.endswith(".places") else torch.empty(0, dtype=torch.uint8, device=tensor.device)
            yield new, self.given(new, like).clone()
