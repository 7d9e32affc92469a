"""The edit that replaces several linear layers by layers with one shared basis. See `layers.fips`."""

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
    """Linear layers get one basis (D, `rank`), owned by the first of them, and their own sparse coefficients.

    For each layer: its path, its role, its number of columns C (the side that is not multiplied by the basis), and its
    number of stored coefficients. `tensors` holds basis, coefficients and masks, and may hold biases; `ToFips.by` fills
    it in.
    """

    KIND: ClassVar[str] = "fips"
    MAKES: ClassVar[str] = "layers of a shared basis"
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
        """Make the edit from a basis (D, R) and, for each layer's path, its role, coefficients and mask, both (R, C).

        Args:
            basis_DR: the shared basis.
            parts: path to (role, coefficients, mask); the first layer owns the basis.
            biases: full names to values, for layers whose bias changes.
        """
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
        """How many numbers basis and coefficients take, with 32 bits of mask counted as one number."""
        bits = sum(8 * -(-self.rank * columns // 8) for columns in self.columns)
        return self.d_model * self.rank + sum(self.counts) + bits // 32

    def describe(self) -> str:
        """Return the rank, how many layers share it, and the share of numbers that is left."""
        num_cols = sum(self.columns)
        kept, left = sum(self.counts) / (self.rank * num_cols), self.num_stored / (self.d_model * num_cols)
        return (
            f"{len(self.paths)} matrices share a basis of rank {self.rank}, with {kept:.0%} of the coefficients: "
            f"{left:.0%} of their values, masks counted"
        )

    def affected_tensors(self) -> list[str]:
        """Return the weight and bias of each layer."""
        return [f"{path}.{name}" for path in self.paths for name in ("weight", "bias")]

    def check(self, model: nn.Module) -> None:
        """Check that the lists match each other and each layer is linear and of the right size."""
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
        """Replace the linear layers by layers that share a basis."""
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
        """Yield coefficients and mask for a weight, and the basis with the first; for a bias its new or old value.

        New tensors are copies, since the model's may be trained.
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
