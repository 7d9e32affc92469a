"""Greenformers (arXiv 2108.10808): splits a layer into two low-rank ones if that is smaller.

Ours are the factors that fit what the layers put out on calibration images, a rank that follows from the budget, and
convolutions group by group. Only matrices are factored here: no loss is looked at and nothing is trained, which
`recover` does afterwards.

Shapes: G groups, M outputs, N inputs (times kernel positions), K = min(M, N), R rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from pydantic import Field, StrictFloat, StrictInt, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from vitrim.errors import BudgetError, RecipeError
from vitrim.methods.registry import BudgetUse, ModelMethod, register
from vitrim.ops import low_rank as ops
from vitrim.surgery import ToLowRank
from vitrim.types import LayerSite, LayerSums, ModelView

Solver = Literal["svd", "nmf", "semi-nmf", "random"]


@register
class LowRank(ModelMethod):
    """Greenformers: replaces a layer by two of low rank.

    Without `rank` or `energy` the budget sets the rank: it is the share of each layer's values that stays.
    """

    name = "low-rank"
    paper = "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation"
    arxiv = "2108.10808"
    summary = "linear layers as two of low rank, fitted to what they put out"
    needs = "weights"
    repairs = False
    edits = (ToLowRank,)
    takes = "share"
    needs_mlps = False

    rank: StrictInt | StrictFloat | None = None
    """Rank of the factors: a whole number, or a share (up to 1.0) of the rank at which factors stop saving anything."""
    energy: float | None = Field(default=None, gt=0, le=1)
    """Use the smallest rank that keeps this share of the squared weights or, with `whiten`, squared outputs."""
    solver: Solver = "svd"
    """How the factors are found: by SVD, by (semi-)nonnegative matrix factorization, or at random."""
    whiten: bool | None = None
    """Fit the layers' outputs on images, not their weights. None does so with `svd` if there are images."""
    num_iter: int = Field(default=100, ge=1)
    """Iterations of the solvers `nmf` and `semi-nmf`."""
    only: tuple[str, ...] | None = None
    """Patterns of layer names, such as `*.attn.*`, or `*` for every linear and convolution layer. None takes the linear
    layers inside the blocks."""

    @field_validator("only", mode="before")
    @classmethod
    def _one_pattern(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.rank is not None and self.energy is not None:
            raise ValueError("give one of rank and energy, or neither to go by the budget")
        if isinstance(self.rank, float) and not 0 < self.rank <= 1:
            raise ValueError(f"rank {self.rank:g} is a share of the break-even rank, in 0..1; a rank is a whole number")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError("rank must be 1 or more")
        if self.whiten and self.solver != "svd":
            raise ValueError(f"whiten goes with solver svd, not {self.solver}")
        return self

    def goes_by(self) -> BudgetUse:
        """Return which part of the budget the method uses: none if `rank` or `energy` is given."""
        return "nothing" if self.rank is not None or self.energy is not None else self.takes

    def propose(self, view: ModelView) -> Iterator[ToLowRank]:
        """Yield factors for each layer that they make smaller, in the order of the layers.

        Args:
            view: the model; its images are read only for `whiten`, in one pass unless that needs too much memory.

        Raises:
            RecipeError: images are needed and missing, a pattern matches no layer, or nmf meets a negative value.
            BudgetError: there is neither a rank nor a budget.
        """
        whiten = view.has_images and self.solver == "svd" if self.whiten is None else self.whiten
        if whiten and not view.has_images:
            raise RecipeError("options.whiten needs images; pass data, or leave it out.")
        if self.solver == "svd" and self.whiten is None and not whiten:
            view.note("no images given: factors were fitted to weights alone; pass data to fit what layers put out.")
        layers = _chosen(view, self)
        ranks = self.ranks(view, layers, whiten=whiten)
        dense = [layer.path for layer in layers if (ranks[layer.path] or 0) >= layer.break_even]
        paying = [layer for layer in layers if layer.path not in dense]
        for group, sums in view.layer_sums(paying) if whiten else [(paying, {})]:
            if whiten:
                _note_unseen(view, group, sums)
            for layer in group:
                edit = _factors(view, layer, ranks[layer.path], self, sums.get(layer.path))
                if edit is None:
                    dense.append(layer.path)
                else:
                    yield edit
        if dense:
            view.note(
                f"{len(dense)} of {len(layers)} layers stay whole, since factors of their rank would save nothing: "
                f"{_few(dense)}."
            )

    def usual(self, view: ModelView, everything: Sequence[LayerSite]) -> list[LayerSite]:
        """Return the layers to factor where no patterns are given."""
        inside = tuple(f"{site.block}.".removeprefix(".") for site in view.sites)
        return [layer for layer in everything if layer.kind != "conv" and layer.path.startswith(inside)]

    def ranks(self, view: ModelView, layers: Sequence[LayerSite], *, whiten: bool) -> dict[str, int | None]:
        """Return the rank of each layer by path; None where `energy` sets it."""
        return {layer.path: _rank(view, layer, self) for layer in layers}


def _chosen(view: ModelView, options: LowRank) -> list[LayerSite]:
    """Return the layers to factor; note which can't be, and why."""
    everything = view.layers()
    if options.only is None:
        wanted = options.usual(view, everything)
    else:
        unmet = [p for p in options.only if not any(fnmatchcase(layer.path, p) for layer in everything)]
        if unmet:
            raise RecipeError(
                f"options.only: {unmet[0]!r} matches no linear or convolution layer; "
                f"there are {_few([layer.path for layer in everything])}."
            )
        wanted = [layer for layer in everything if any(fnmatchcase(layer.path, pattern) for pattern in options.only)]
    if not wanted:
        raise RecipeError("low-rank: no linear layer inside a block; name layers with options.only.")
    for reason in dict.fromkeys(layer.fixed for layer in wanted if layer.fixed):
        view.note(f"kept whole: {_few([layer.path for layer in wanted if layer.fixed == reason])}; {reason}.")
    chosen = [layer for layer in wanted if not layer.fixed]
    negative = [layer.path for layer in chosen if options.solver == "nmf" and (_weight(view, layer) < 0).any()]
    if negative:
        raise RecipeError(f"options.solver: nmf needs weights of 0 or more, not {_few(negative)}; use semi-nmf or svd.")
    return chosen


def _note_unseen(view: ModelView, layers: Sequence[LayerSite], sums: Mapping[str, LayerSums]) -> None:
    """Tell the user which layers no image reached."""
    unseen = [layer.path for layer in layers if layer.path not in sums]
    if unseen:
        view.note(
            f"{_few(unseen)}: never called, since other code reads the weights; factored by weight alone, and smaller "
            "but no faster."
        )


def _factors(
    view: ModelView, layer: LayerSite, rank: int | None, options: LowRank, sums: LayerSums | None
) -> ToLowRank | None:
    """Return one layer's edit, or None if two factors would have no fewer values than the layer."""
    weight_GMN = layer.matrices(_weight(view, layer))
    found = bases(weight_GMN, sums) if rank is None or sums is not None else []
    if rank is None:
        assert options.energy is not None
        rank = ops.rank_for_energy(torch.stack([energy_K for _, energy_K in found]), options.energy)
    if rank >= layer.break_even:
        return None
    if options.solver != "svd":
        solve = _solver(view, options)
        return ToLowRank.by(layer, [solve(weight_MN, rank) for weight_MN in weight_GMN])
    if sums is None:
        return ToLowRank(layer=layer, rank=rank)
    kept = [basis_MK[:, :rank] for basis_MK, _ in found]
    pairs = [ops.project(weight_MN, basis_MR) for weight_MN, basis_MR in zip(weight_GMN, kept, strict=True)]
    bias = _bias(view, sums, weight_GMN, torch.stack(kept)) if layer.has_bias else None
    return ToLowRank.by(layer, pairs, bias=bias)


def _rank(view: ModelView, layer: LayerSite, options: LowRank) -> int | None:
    """Return the rank that was asked for, at least 1, or None if `energy` sets it."""
    if options.energy is not None:
        return None
    if isinstance(options.rank, int):
        return options.rank
    share = view.keep_ratio if options.rank is None else options.rank
    if not share:
        raise BudgetError("low-rank: no MLP is left that the budget could be taken from; give options.rank or energy.")
    return max(1, int(layer.break_even * share))


def _solver(view: ModelView, options: LowRank) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """Return a solver that looks at the weight alone, as a function of a matrix and a rank."""
    solvers: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
        "nmf": lambda matrix, rank: ops.nmf(matrix, rank, num_iter=options.num_iter, generator=view.generator),
        "semi-nmf": lambda matrix, rank: ops.semi_nmf(matrix, rank, num_iter=options.num_iter),
        "random": lambda matrix, rank: ops.random_factors(matrix, rank, generator=view.generator),
    }
    return solvers[options.solver]


def bases(weight_GMN: Tensor, sums: LayerSums | None) -> list[tuple[Tensor, Tensor]]:
    """Return directions of each group's outputs with their energies, from the weights or from observed sums."""
    if sums is None:
        return [ops.weight_basis(weight_MN) for weight_MN in weight_GMN]
    moment_GKK, mean_GK = sums.square_GKK / sums.num_tokens, sums.total_GK / sums.num_tokens
    if sums.layer.has_bias:  # the bias can absorb the mean
        moment_GKK -= mean_GK[:, :, None] * mean_GK[:, None]
    pairs = zip(weight_GMN, moment_GKK, strict=True)
    if sums.of_inputs:
        return [ops.output_basis(weight_MN, inputs_NN=moment_NN) for weight_MN, moment_NN in pairs]
    return [ops.output_basis(weight_MN, outputs_MM=moment_MM) for weight_MN, moment_MM in pairs]


def _bias(view: ModelView, sums: LayerSums, weight_GMN: Tensor, basis_GMR: Tensor) -> Tensor:
    """Return the bias plus the part of the mean output that the factors lose."""
    bias, mean_GK1 = view.tensor(f"{sums.layer.path}.bias"), sums.total_GK[..., None] / sums.num_tokens
    if sums.of_inputs:
        product_GM1 = weight_GMN.to(mean_GK1) @ mean_GK1
    else:
        product_GM1 = mean_GK1 - bias.reshape_as(mean_GK1)
    lost_GM1 = product_GM1 - basis_GMR @ (basis_GMR.mT @ product_GM1)
    return bias + lost_GM1.flatten().to(bias)


def _weight(view: ModelView, layer: LayerSite) -> Tensor:
    return view.tensor(f"{layer.path}.weight")


def _few(names: Sequence[str]) -> str:
    """Return the first three names of a list, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
