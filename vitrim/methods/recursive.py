"""Relaxed Recursive Transformers (arXiv 2410.20672): a few blocks looped, with LoRA of its own for each depth.

Block l of L uses the matrices of block l mod K. What it was beyond them, W - W', is kept as a truncated SVD: B = U S
and A = V'. Where nothing is left, B is zero and A Gaussian, the usual start of LoRA. Nothing is trained here: `recover`
does that, on all weights. Ours are norms, biases and layer scales that may stay each block's own, a rank that follows
from the budget, and ranks allotted by singular values.

Shapes: M outputs, N inputs, K = min(M, N), R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vitrim.errors import BudgetError, RecipeError, SiteNotFoundError
from vitrim.methods.registry import BudgetUse, ModelMethod, register
from vitrim.ops.allocation import best_choices
from vitrim.surgery import ToRecursive
from vitrim.types import LayerSite, ModelView


@register
class Recursive(ModelMethod):
    """Relaxed Recursive Transformers: blocks looped, each depth with thin factors of its own.

    The budget is the share of the values of the blocks' matrices that stays. It sets the number of blocks, the largest
    that it pays for, and with the rest the rank.
    """

    name = "recursive"
    paper = "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA"
    arxiv = "2410.20672"
    summary = "a few blocks looped, with low-rank factors of its own for each depth"
    needs = "weights"
    repairs = False
    edits = (ToRecursive,)
    takes = "share"
    senseless = ("macs_ratio", "mlp_ratio", "hidden_dim", "widths")  # all blocks run, and MLPs stay as wide as they are

    num_blocks: int | None = Field(default=None, ge=1)
    """How many different blocks stay; it has to divide their number. None goes by the budget."""
    rank: int | None = Field(default=None, ge=0)
    """Rank of the factors beside each matrix; 0 for none. None goes by the budget."""
    start: Literal["stepwise", "average", "lower"] = "average"
    """What is looped: blocks at equal steps from the first to the last, the mean of those that become one, or the
    first blocks."""
    factors: Literal["svd", "zero"] = "svd"
    """How factors start: from what each block has beyond the shared matrices, or from zero."""
    ranks: Literal["equal", "singular"] = "equal"
    """Give every matrix one rank, or, for the same number of values, more to those with larger singular values."""
    norms: Literal["tied", "own"] = "tied"
    """Whether norms, biases and layer scales are shared, as in the paper, or stay each block's own."""

    def goes_by(self) -> BudgetUse:
        """Return which part of the budget the method uses: none if both sizes are given."""
        return "nothing" if self.num_blocks is not None and self.rank is not None else self.takes

    def check(self, view: ModelView) -> None:
        """Refuse blocks that can't be looped as they are asked to, and a share that pays for none."""
        loop = _Loop.of(view)
        if self.goes_by() == "share" and view.keep_ratio < 1:
            self._sizes(loop, view.keep_ratio)
        self._check(loop)

    def loops_blocks(self, view: ModelView) -> bool:
        """Return whether fewer blocks are left than there are; whether the budget pays for them shows in the cut.

        Raises:
            SiteNotFoundError, RecipeError, BudgetError: as `propose`.
        """
        loop = _Loop.of(view)
        self._check(loop)
        if self.goes_by() == "share" and view.keep_ratio >= 1:
            return False
        return self.num_blocks is None or self.num_blocks < len(loop.blocks)

    def propose(self, view: ModelView) -> Iterator[ToRecursive]:
        """Yield one edit for each block that is looped.

        Raises:
            SiteNotFoundError: there is no row of blocks of equal shapes.
            RecipeError: the number of blocks does not divide theirs.
            BudgetError: the budget is too small for any block, or a rank is too large.
        """
        loop = _Loop.of(view)
        if self.goes_by() == "share" and view.keep_ratio >= 1:
            view.note("recursive: the full budget pays for the blocks themselves, so they stay as they are.")
            return
        count, rank = self._sizes(loop, view.keep_ratio)
        if count == len(loop.blocks):
            view.note(f"recursive: all {count} blocks stay, so nothing is looped.")
            return
        left = (count * loop.cost + len(loop.blocks) * loop.factors(rank)) / (len(loop.blocks) * loop.cost)
        if left >= 1:
            view.note(
                f"recursive: {count} blocks with factors of rank {rank} are {left:.0%} of the original; lower rank."
            )
        shared = [_shared(view, loop, self.start, count, number) for number in range(count)]
        ranks = _ranks(view, loop, shared, rank, self.ranks)
        # Make all edits before carrying out the first, so that all are of the original blocks.
        yield from [self._edit(view, loop, number, shared, ranks) for number in range(count)]

    def _sizes(self, loop: _Loop, share: float) -> tuple[int, int]:
        """Return how many blocks are different and the rank: as given, or the largest that the share pays for."""
        self._check(loop)
        total, fullest, divisors = len(loop.blocks), loop.fullest, loop.divisors
        if self.num_blocks is not None and self.rank is not None:
            return self.num_blocks, self.rank
        for count in reversed(divisors[:-1]) if self.num_blocks is None else [self.num_blocks]:
            left = share * total * loop.cost - count * loop.cost
            paid = [r for r in range(fullest + 1) if total * loop.factors(r) <= left + 1e-9 * total * loop.cost]
            if paid and self.rank is None:
                return count, paid[-1]
            if self.rank is not None and self.rank in paid:
                return count, self.rank
        count, rank = self.num_blocks or 1, self.rank or 0
        least = -(-1000 * (count * loop.cost + total * loop.factors(rank)) // (total * loop.cost)) / 1000
        raise BudgetError(
            f"{loop.blocks[0]}: a share of {share:g} does not pay for {count} of {total} blocks with rank {rank}; "
            f"use {least:g} or more."
        )

    def _check(self, loop: _Loop) -> None:
        """Check that the number of blocks divides theirs, and that no matrix is smaller than the rank."""
        if self.num_blocks is not None and self.num_blocks not in loop.divisors:
            raise RecipeError(
                f"options.num_blocks: {self.num_blocks} does not divide {len(loop.blocks)} blocks; use one of "
                f"{', '.join(map(str, loop.divisors))}."
            )
        if self.rank is not None and self.rank > loop.fullest:
            raise BudgetError(
                f"options.rank: {self.rank} is above the {loop.fullest} of the blocks' matrices; use 0..{loop.fullest}."
            )

    def _edit(
        self, view: ModelView, loop: _Loop, number: int, shared: Sequence[dict[str, Tensor]], ranks: Ranks
    ) -> ToRecursive:
        """Return the edit that makes one block of every K-th from a number on."""
        paths, first = loop.blocks[number :: len(shared)], loop.blocks[number]
        tied = loop.others if self.norms == "tied" else ()
        tensors = {f"{first}.{name}": shared[number][name] for name in tied}
        for layer in loop.layers:
            common = shared[number][f"{layer.path}.weight"]
            tensors[f"{first}.{layer.path}.shared"] = common
            for path in paths:
                rank = ranks[path, layer.path]
                if rank:
                    up, down = _factors(view, _matrix(view, path, layer) - common, rank, self.factors)
                    tensors |= {f"{path}.{layer.path}.up": up, f"{path}.{layer.path}.down": down}
        return ToRecursive(
            paths=tuple(paths),
            layers=tuple(layer.path for layer in loop.layers),
            sizes=tuple((layer.num_in, layer.num_out) for layer in loop.layers),
            ranks=tuple(tuple(ranks[path, layer.path] for layer in loop.layers) for path in paths),
            tied=tuple(tied),
            tensors=tensors,
        )


Ranks = dict[tuple[str, str], int]  # of a block and a layer within it


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """The blocks; the linear layers of each, with paths within it; and the names of all that can stand once besides."""

    blocks: list[str]
    layers: list[LayerSite]
    others: list[str]

    @property
    def cost(self) -> int:
        """Values of one block's matrices."""
        return sum(layer.num_in * layer.num_out for layer in self.layers)

    @property
    def divisors(self) -> list[int]:
        """Numbers of different blocks that divide their number."""
        return [number for number in range(1, len(self.blocks) + 1) if len(self.blocks) % number == 0]

    @property
    def fullest(self) -> int:
        """The largest rank of any matrix."""
        return max(min(layer.num_in, layer.num_out) for layer in self.layers)

    def factors(self, rank: int) -> int:
        """Values of the factors of one block."""
        return sum(min(rank, n.num_in, n.num_out) * (n.num_in + n.num_out) for n in self.layers)

    @classmethod
    def of(cls, view: ModelView) -> _Loop:
        """Look at a model's blocks; note what can't be shared."""
        every = view.blocks()
        blocks = _row(view, list(every))
        first = every[blocks[0]]
        odd = next((path for path in blocks if every[path] != first), None)
        if odd is not None:
            raise SiteNotFoundError(
                f"{odd}: has other shapes than {blocks[0]}, so they can't be one; cut all alike, or use low-rank."
            )
        start = f"{blocks[0]}."
        inside = [n for n in view.layers() if n.path.startswith(start) and n.kind != "conv" and not n.fixed]
        layers = [layer.within(blocks[0]) for layer in inside]
        if not layers:
            raise SiteNotFoundError(
                f"{blocks[0]}: has no linear layer left to share; put recursive before what cut it."
            )
        weights = {f"{layer.path}.weight" for layer in layers}
        others = [name for name in first if name not in weights and _stands_alone(name, first)]
        own = [name for name in first if name not in weights and name not in others]
        if own:
            view.note(
                f"each block keeps its own {', '.join(own[:3])}{', …' if len(own) > 3 else ''}: no layer is there."
            )
        return cls(blocks=blocks, layers=layers, others=others)


def _row(view: ModelView, paths: Sequence[str]) -> list[str]:
    """Return the paths that stand in one list; note single ones beside it, such as a pool with an MLP of its own."""
    rows: dict[str, list[str]] = {}
    for path in filter(None, paths):
        rows.setdefault(path.rpartition(".")[0], []).append(path)
    long = [row for row in rows.values() if len(row) > 1]
    if len(long) != 1:
        found = f"{len(long)} lists of blocks" if long else f"{len(paths)} block" + "s" * (len(paths) != 1)
        raise SiteNotFoundError(
            f"recursive: {found}, and no one row to loop; use a model whose blocks stand in one list, or low-rank."
        )
    [row] = long
    if alone := [path for path in paths if path not in row]:
        view.note(
            f"recursive: {', '.join(alone)} stands outside of the row of {len(row)} blocks, so it was left alone."
        )
    return row


def _stands_alone(name: str, names: Iterable[str]) -> bool:
    """Return whether the module that holds a tensor holds no other module, so that another can stand for it."""
    holder = name.rpartition(".")[0]
    return bool(holder) and not any(
        "." in other.removeprefix(f"{holder}.") and other.startswith(f"{holder}.") for other in names
    )


def _shared(view: ModelView, loop: _Loop, start: str, count: int, number: int) -> dict[str, Tensor]:
    """Return the tensors of one looped block, by name within it, in the type in which they are stored."""
    total = len(loop.blocks)
    if start == "average":
        sources = loop.blocks[number::count]
    else:
        steps = [n * (total - 1) // max(1, count - 1) for n in range(count)]
        sources = [loop.blocks[number if start == "lower" else steps[number]]]
    found = {f"{n.path}.weight": torch.stack([_matrix(view, path, n) for path in sources]) for n in loop.layers}
    found |= {name: torch.stack([view.tensor(f"{path}.{name}") for path in sources]) for name in loop.others}
    return {
        name: tensors.double().mean(0).to(tensors.dtype) if tensors.is_floating_point() else tensors[0]
        for name, tensors in found.items()
    }


def _matrix(view: ModelView, block: str, layer: LayerSite) -> Tensor:
    """Return a layer's matrix (M, N)."""
    return layer.matrices(view.tensor(f"{block}.{layer.path}.weight"))[0]


def _ranks(view: ModelView, loop: _Loop, shared: Sequence[dict[str, Tensor]], rank: int, way: str) -> Ranks:
    """Return the rank of each block's each layer: one for all, or as much of each residual as the budget pays for.

    What is lost of a residual counts relative to the energy of its block's own matrix, so that no scale matters.
    """
    places = [(number, path, layer) for number, path in enumerate(loop.blocks) for layer in loop.layers]
    if way == "equal" or rank == 0:
        return {(path, layer.path): min(rank, layer.num_in, layer.num_out) for _, path, layer in places}
    errors, costs = [], []
    for number, path, layer in view.track(places, "singular values"):
        matrix_MN = _matrix(view, path, layer).double()
        residual_MN = matrix_MN - shared[number % len(shared)][f"{layer.path}.weight"]
        energy_K = torch.linalg.svdvals(residual_MN).square().cpu()
        lost = torch.cat([energy_K.flip(0).cumsum(0).flip(0), energy_K.new_zeros(1)])
        errors.append((lost / float(matrix_MN.square().sum().clamp(min=torch.finfo(lost.dtype).tiny))).numpy())
        costs.append(np.arange(len(lost), dtype=np.int64) * (layer.num_in + layer.num_out))
    chosen = best_choices(errors, costs, len(loop.blocks) * loop.factors(rank))
    return {(path, layer.path): choice for (_, path, layer), choice in zip(places, chosen, strict=True)}


def _factors(view: ModelView, residual_MN: Tensor, rank: int, way: str) -> tuple[Tensor, Tensor]:
    """Return `up` (M, R) and `down` (R, N) of a residual, or the usual start of LoRA where there is none."""
    num_rows, num_cols = residual_MN.shape
    if way == "zero" or not residual_MN.any():
        down_RN = torch.randn(rank, num_cols, generator=view.generator) / num_cols**0.5
        return torch.zeros(num_rows, rank), down_RN
    left_MK, sigma_K, right_KN = torch.linalg.svd(residual_MN.double(), full_matrices=False)
    return (left_MK[:, :rank] * sigma_K[:rank]).float(), right_KN[:rank].float()
