"""The edit that loops a block: several blocks use the tensors of the first, each with thin factors of its own.

See `layers.recursive`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from vitrim.errors import BudgetError, CheckpointError, SiteNotFoundError
from vitrim.layers.recursive import RecursiveLinear, Shared
from vitrim.surgery.edits import Edit, replace_
from vitrim.surgery.modules import submodule


@dataclass(frozen=True, kw_only=True)
class ToRecursive(Edit):
    """The blocks at `paths` share the matrices of their linear `layers`, which the first of them owns.

    `sizes` are each layer's inputs and outputs; `ranks` are, for each block, those of the factors of each layer, 0 for
    none. `tied` names all other tensors, within a block, that stand once: biases of the layers, and norms. `tensors`
    holds what is shared and the factors.
    """

    KIND: ClassVar[str] = "recursive"
    MAKES: ClassVar[str] = "looped blocks"
    ORDER: ClassVar[int] = 1

    paths: tuple[str, ...]
    layers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    ranks: tuple[tuple[int, ...], ...]
    tied: tuple[str, ...] = ()

    @property
    def holders(self) -> list[str]:
        """Modules within a block, other than its linear layers, whose tensors stand once."""
        every = dict.fromkeys(name.rpartition(".")[0] for name in self.tied)
        return [holder for holder in every if holder not in self.layers]

    def describe(self) -> str:
        """Return which blocks loop, the ranks, and the share of their matrices' values that is left."""
        dense = sum(num_in * num_out for num_in, num_out in self.sizes)
        factors = sum(r * sum(size) for block in self.ranks for r, size in zip(block, self.sizes, strict=True))
        every = [rank for block in self.ranks for rank in block]
        left = (dense + factors) / (len(self.paths) * dense)
        return f"{', '.join(self.paths)} are one, with factors of rank {min(every)} to {max(every)}: {left:.0%} of them"

    def affected_tensors(self) -> list[str]:
        """Return the weights and biases of the layers, and all other tensors that stand once."""
        own = [f"{layer}.{name}" for layer in self.layers for name in ("weight", "bias")]
        return [f"{path}.{name}" for path in self.paths for name in dict.fromkeys((*own, *self.tied))]

    def check(self, model: nn.Module) -> None:
        """Check that the lists match each other, and that the blocks have such layers and tensors."""
        if len({*self.paths}) < max(2, len(self.paths)) or len(self.ranks) != len(self.paths):
            raise BudgetError(f"{self.where}: a loop needs two different blocks or more, with ranks each.")
        if {len(self.sizes), *map(len, self.ranks)} != {len(self.layers)}:
            raise BudgetError(f"{self.where}: a loop needs sizes and ranks for each of its layers.")
        for path, ranks in zip(self.paths, self.ranks, strict=True):
            for layer, size, rank in zip(self.layers, self.sizes, ranks, strict=True):
                if not 0 <= rank <= min(size):
                    raise BudgetError(f"{path}.{layer}: asked for rank {rank} beside it; use 0..{min(size)}.")
                weight = dict(submodule(model, f"{path}.{layer}").named_parameters(recurse=False)).get("weight")
                if weight is None or tuple(weight.shape) not in (size, size[::-1]):
                    raise SiteNotFoundError(f"{path}.{layer}: is no linear layer of {size[0]} to {size[1]}.")
            for holder in self.holders:
                if any(True for _ in submodule(model, f"{path}.{holder}").children()):
                    raise SiteNotFoundError(f"{path}.{holder}: has modules of its own, so no other can stand for it.")

    def reshape_(self, model: nn.Module) -> None:
        """Replace the linear layers by looped ones, and what is tied by stand-ins for the first block's."""
        owners: dict[str, RecursiveLinear] = {}
        for path, ranks in zip(self.paths, self.ranks, strict=True):
            for layer, (num_in, num_out), rank in zip(self.layers, self.sizes, ranks, strict=True):
                old = submodule(model, f"{path}.{layer}")
                weight = cast(nn.Parameter, old.weight)
                new = RecursiveLinear(
                    num_in,
                    num_out,
                    rank,
                    owner=owners.get(layer),
                    bias=getattr(old, "bias", None) is not None,
                    tied_bias=f"{layer}.bias" in self.tied,
                    device=weight.device,
                    dtype=weight.dtype,
                )
                replace_(model, f"{path}.{layer}", new.requires_grad_(weight.requires_grad))
                owners.setdefault(layer, new)
        for path in self.paths[1:]:
            for holder in self.holders:
                replace_(model, f"{path}.{holder}", Shared(submodule(model, f"{self.paths[0]}.{holder}")))

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the shared matrix and factors for a weight; what is tied for the first block, and nothing for others.

        New tensors are copies, since the model's may be trained.
        """
        number = next(n for n, path in enumerate(self.paths) if name.startswith(f"{path}."))
        within = name.removeprefix(f"{self.paths[number]}.")
        layer, _, kind = within.rpartition(".")
        if layer in self.layers and kind == "weight":
            rank = self.ranks[number][self.layers.index(layer)]
            path = f"{self.paths[number]}.{layer}"
            names = [*([] if number else ["shared"]), *(["up", "down"] if rank else [])]
            for new in (f"{path}.{each}" for each in names):
                if new not in self.tensors:
                    raise CheckpointError(f"{new}: the plan does not hold it; load the saved model, or compress again.")
                yield new, self.given(new, tensor).clone()
        elif within not in self.tied:
            yield name, tensor
        elif number == 0:
            yield name, self.given(name, tensor).clone() if name in self.tensors else tensor
