"""FiPS (arXiv 2411.09816): the matrices of several MLPs as one dense basis times sparse coefficients.

The basis starts from an SVD of all matrices side by side. With images, basis, coefficients and biases of a group are
then trained together, so that each MLP reproduces its output from before any edit, while a schedule moves the masks of
the coefficients: gradual magnitude pruning or RigL. Three things are ours: the masks' bits count against the budget,
sizes are the layers' own instead of 4 d, and training that does not help on held-out tokens is discarded. The model as
a whole is not trained here: `recover` does that, and masks stay fixed there, since only values inside them are stored.

Shapes: D model width, C columns of all matrices of a group, R rank, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Generator, Tensor
from torch.nn import functional

from vitrim.errors import BudgetError, RecipeError, SiteNotFoundError
from vitrim.layers.fips import Role
from vitrim.methods.registry import ModelMethod, register
from vitrim.ops.fips import (
    cubic_sparsity,
    exchange,
    exchanged_share,
    largest,
    leading_basis,
    num_coefficients,
    rank_for_budget,
)
from vitrim.surgery import ToFips
from vitrim.types import MlpSite, ModelView

MASKS_MOVE = 0.75  # share of the steps after which masks no longer change; the paper's value for RigL
LENGTH = 1 / 3  # of the columns of a matrix, in the mean, once joined; near that of trained ViTs, to which rates belong
JUDGE_SHARE = 0.1  # share of the sampled tokens that is held out


@register
class Fips(ModelMethod):
    """FiPS: several MLPs share one dense basis, each with sparse coefficients of its own.

    The budget is the share of the matrices' values that stays.
    """

    name = "fips"
    paper = "FiPS: Learning Parameter Sharing with Tensor Decompositions and Sparsity"
    arxiv = "2411.09816"
    summary = "MLPs of several blocks share a dense basis, each with sparse coefficients"
    needs = "weights"
    repairs = False
    edits = (ToFips,)
    takes = "share"

    group: PositiveInt | tuple[PositiveInt, ...] = 4
    """How many consecutive MLPs share a basis, or the size of each group in turn."""
    sparsity: float = Field(default=0.75, ge=0, lt=1)
    """Share of the coefficients that is zero; together with the budget it sets the size of the basis."""
    count_masks: bool = True
    """Count the bits that mark nonzero coefficients against the budget, 32 bits as one number; the paper does not."""
    schedule: Literal["rigl", "gmp"] = "rigl"
    """How the positions of nonzero coefficients change during training: RigL, or gradual magnitude pruning (gmp)."""
    every: int = Field(default=10, ge=1)
    """Training steps between two changes of those positions."""
    steps: int = Field(default=500, ge=0)
    """Steps of local training. With 0, or without images, the shared basis is not trained."""
    batch_size: int = Field(default=1024, ge=1)
    """Tokens of each MLP in one training step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the local training."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of the local training."""
    num_tokens: int = Field(default=20_000, ge=64)
    """How many tokens are sampled from each MLP for training."""

    def propose(self, view: ModelView) -> Iterator[ToFips]:
        """Yield one edit per group of MLPs.

        Raises:
            SiteNotFoundError: no MLP is left.
            RecipeError: group sizes do not add up to the number of MLPs.
            BudgetError: the budget is too small for any basis, or MLPs of different model widths should share one.
        """
        if not view.sites:
            raise SiteNotFoundError(
                "fips: no MLP is left to share a basis; put fips before what replaces their layers."
            )
        if odd := next((site.output for site in view.sites if view.tensor(f"{site.output}.weight").ndim > 2), None):
            raise SiteNotFoundError(f"{odd}: is a convolution; fips shares a basis among linear layers alone.")
        groups = _groups(view.sites, self.group)
        if view.keep_ratio >= 1:
            view.note("fips: the full budget pays for the matrices themselves, so they stay as they are.")
            return
        if self.steps and not view.has_images:
            view.note("no images given: the shared basis is an SVD of the weights, not trained; pass data to train it.")
        # Make all edits before carrying out the first, so that every MLP's inputs and targets are the original model's.
        yield from [_share(view, sites, self) for sites in groups]


Pair = tuple[Tensor, Tensor]  # an MLP's input tokens and its output tokens


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """One layer's matrix as columns of the joined one: transposed if the layer reads the model width."""

    path: str
    role: Role
    columns: slice

    def weight(self, factors: _Factors) -> Tensor:
        """Return the layer's weight as the product of the factors, (out, in)."""
        part_DC = factors.basis_DR @ (factors.coeff_RC * factors.size_C)[:, self.columns]
        return part_DC.T if self.role == "input" else part_DC


@dataclass(frozen=True, kw_only=True)
class _Mlp:
    """One MLP of a group: its matrices, and its biases by full name."""

    site: MlpSite
    matrices: tuple[_Matrix, ...]
    biases: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """Factors that replace a group's matrices: basis, coefficients (zero outside their mask) and trained biases.

    Coefficients are in units of `size_C`, the scale of each one's matrix.
    """

    basis_DR: Tensor
    coeff_RC: Tensor
    mask_RC: Tensor
    size_C: Tensor
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self, mlp: _Mlp) -> dict[str, Tensor]:
        """Return an MLP's tensors by full name."""
        weights = {f"{matrix.path}.weight": matrix.weight(self) for matrix in mlp.matrices}
        return weights | {name: self.biases[name] for name in mlp.biases if name in self.biases}


@dataclass(kw_only=True)
class _Sample:
    """A random sample of one MLP's input and output tokens: those with the smallest random keys of all seen."""

    size: int
    generator: Generator
    keys_N: Tensor = field(default_factory=lambda: torch.empty(0))
    chosen_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: Literal["inputs", "outputs"], tokens: Tensor) -> None:
        """Add a batch: inputs first, with new keys, then the outputs of the same tokens."""
        tokens_ND = tokens.flatten(0, -2).float().cpu()
        if name == "inputs":
            keys_N = torch.cat([self.keys_N, torch.rand(len(tokens_ND), generator=self.generator)])
            self.keys_N, self.chosen_N = keys_N.topk(min(self.size, len(keys_N)), largest=False)
        held_ND = torch.cat([self.parts[name], tokens_ND]) if name in self.parts else tokens_ND
        self.parts[name] = held_ND[self.chosen_N]

    def split(self) -> tuple[Pair, Pair]:
        """Return pairs to train on and held-out pairs; the keys have put the tokens in random order."""
        inputs_ND, outputs_ND = (self.parts[name].clone() for name in ("inputs", "outputs"))  # no inference tensors
        held_out = math.ceil(JUDGE_SHARE * len(inputs_ND))
        return (inputs_ND[held_out:], outputs_ND[held_out:]), (inputs_ND[:held_out], outputs_ND[:held_out])


def _groups(sites: Sequence[MlpSite], group: int | tuple[int, ...]) -> list[Sequence[MlpSite]]:
    """Group consecutive MLPs of equal model width; a plain number starts a new group where the width changes."""
    if isinstance(group, int):
        runs = [list(run) for _, run in groupby(sites, key=lambda site: site.d_model)]
        return [run[start : start + group] for run in runs for start in range(0, len(run), group)]
    if sum(group) != len(sites):
        raise RecipeError(f"options.group: sizes {list(group)} add up to {sum(group)}; there are {len(sites)} MLPs.")
    ends = accumulate(group)
    groups = [sites[end - size : end] for size, end in zip(group, ends, strict=True)]
    for members in groups:
        if len({site.d_model for site in members}) > 1:
            raise BudgetError(
                f"{members[0].path}: shares no basis with {members[-1].path}, whose model width is another; "
                "let a size in options.group end where the width changes."
            )
    return groups


def _share(view: ModelView, sites: Sequence[MlpSite], options: Fips) -> ToFips:
    """Compress one group: start from an SVD, train if possible and helpful, and return the edit."""
    mlps, joined_DC, size_C = _joined(view, sites)
    (num_rows, num_cols), keep, masks = joined_DC.shape, view.keep_ratio, options.count_masks
    rank = rank_for_budget(num_rows, num_cols, keep=keep, sparsity=options.sparsity, masks=masks)
    if rank < 1:
        raise BudgetError(f"{sites[0].path}: a share of {keep:.3g} pays for no basis; raise it, or options.group.")
    basis_DR, coeff_RC = leading_basis(joined_DC, rank)
    start = basis_DR.to(joined_DC.device), coeff_RC.to(joined_DC.device)
    # Untrained, columns beyond rank D would be zeros: their cost is spent on more coefficients instead.
    low = min(rank, num_rows)
    count = num_coefficients(num_rows, num_cols, low, keep=keep, masks=masks)
    found = _pruned(start[0][:, :low], start[1][:low], count, size_C)
    pairs = _observe(view, mlps, options) if view.has_images and options.steps else None
    if pairs is not None:
        count = max(1, int((1 - options.sparsity) * rank * num_cols))
        trained = _train(view, mlps, [train for train, _ in pairs], start, count, options, size_C)
        found = _better(view, mlps, [held_out for _, held_out in pairs], found, trained)
    parts: dict[str, tuple[Role, Tensor, Tensor]] = {
        matrix.path: (matrix.role, (found.coeff_RC * size_C)[:, matrix.columns], found.mask_RC[:, matrix.columns])
        for mlp in mlps
        for matrix in mlp.matrices
    }
    return ToFips.by(found.basis_DR, parts, biases=found.biases)


def _joined(view: ModelView, sites: Sequence[MlpSite]) -> tuple[list[_Mlp], Tensor, Tensor]:
    """Return a group's MLPs, their matrices side by side, each at columns of `LENGTH`, and each column's scale (C,).

    A layer's role says whether its matrix is transposed. Gate and value of a packed layer count as two matrices.
    """
    mlps: list[_Mlp] = []
    columns_DC: list[Tensor] = []
    sizes: list[Tensor] = []
    end = 0
    for site in sites:
        weights = view.weights(site)
        layers: list[tuple[str | None, Role, Tensor | None]] = [
            (site.value, "input", weights.value_bias_H),
            (site.gate, "input", weights.gate_bias_H),
            (site.output, "output", weights.output_bias_D),
        ]
        matrices, biases = [], {}
        for path, role, bias in layers:
            if path is None:
                continue
            weight = view.tensor(f"{path}.weight")
            columns_DC.append(weight.T if role == "input" else weight)
            sizes += [_sizes(part) for part in columns_DC[-1].chunk(site.num_groups if role == "input" else 1, dim=1)]
            start, end = end, end + columns_DC[-1].shape[1]
            matrices.append(_Matrix(path=path, role=role, columns=slice(start, end)))
            if bias is not None:  # as the layer stores it, also where gate and value are packed into one layer
                biases[f"{path}.bias"] = view.tensor(f"{path}.bias")
        mlps.append(_Mlp(site=site, matrices=tuple(matrices), biases=biases))
    size_C = torch.cat(sizes)
    return mlps, torch.cat(columns_DC, dim=1) / size_C, size_C


def _sizes(matrix_DC: Tensor) -> Tensor:
    """Return a matrix's scale, the mean length of its columns by `LENGTH`, for each of them (C,); 1 if it is zero."""
    size = matrix_DC.square().sum(0).mean().sqrt() / LENGTH
    return torch.where(size > 0, size, 1).expand(matrix_DC.shape[1])


def _pruned(basis_DR: Tensor, coeff_RC: Tensor, count: int, size_C: Tensor) -> _Factors:
    """Keep the `count` largest coefficients: the best approximation, as the basis is orthonormal."""
    mask_RC = largest(coeff_RC.abs(), count)
    return _Factors(basis_DR=basis_DR, coeff_RC=coeff_RC * mask_RC, mask_RC=mask_RC, size_C=size_C)


def _observe(view: ModelView, mlps: Sequence[_Mlp], options: Fips) -> list[tuple[Pair, Pair]] | None:
    """Return each MLP's tokens to train on and to judge by, or None if one of them can't be run by itself."""
    samples = [_Sample(size=options.num_tokens, generator=view.generator) for _ in mlps]
    starts = {mlp.site.value: sample for mlp, sample in zip(mlps, samples, strict=True)}
    ends = {mlp.site.output: sample for mlp, sample in zip(mlps, samples, strict=True)}

    def see(path: str, inputs: Tensor, outputs: Tensor) -> None:
        if path in starts:
            starts[path].add("inputs", inputs)
        else:
            ends[path].add("outputs", outputs)

    view.observe([*starts, *ends], see)
    pairs = [sample.split() for sample in samples if len(sample.parts) == 2 and len(sample.keys_N) > 1]
    if len(pairs) == len(mlps) and all(
        _stands_alone(view, mlp, pair[1]) for mlp, pair in zip(mlps, pairs, strict=True)
    ):
        return pairs
    view.note(
        f"{mlps[0].site.path}: its group has an MLP that is not run, or not outside its block; it was not trained."
    )
    return None


def _stands_alone(view: ModelView, mlp: _Mlp, seen: Pair) -> bool:
    """Return whether an MLP, run by itself on its inputs, gives the same outputs as inside its block."""
    like = view.tensor(f"{mlp.site.value}.weight")
    with torch.no_grad():
        again_ND = view.run(mlp.site, seen[0][:64].to(like), {}).to(seen[1])
    return bool((again_ND - seen[1][:64]).abs().max() <= 1e-3 * seen[1][:64].abs().max())


def _train(
    view: ModelView,
    mlps: Sequence[_Mlp],
    pairs: Sequence[Pair],
    start: Pair,
    count: int,
    options: Fips,
    size_C: Tensor,
) -> _Factors:
    """Train a group's basis, coefficients and biases while the schedule brings the masks to `count` entries."""
    basis_DR, coeff_RC = (part.clone().requires_grad_() for part in start)
    starts = {name: bias for mlp in mlps for name, bias in mlp.biases.items()}
    units = {
        name: unit for mlp, pair in zip(mlps, pairs, strict=True) for name, unit in _units(view, mlp, pair).items()
    }
    shifts = {name: torch.zeros_like(bias).requires_grad_() for name, bias in starts.items()}  # in those units
    leaves = [basis_DR, coeff_RC, *shifts.values()]
    mask_RC = largest(coeff_RC.detach().abs(), coeff_RC.numel() if options.schedule == "gmp" else count)
    optimizer = torch.optim.AdamW(leaves, lr=options.lr, weight_decay=options.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.steps)
    with torch.no_grad():
        coeff_RC.mul_(mask_RC)
    for step in view.track(range(options.steps), f"training the basis of {len(mlps)} MLPs"):
        biases = {name: bias + units[name] * shifts[name] for name, bias in starts.items()}
        factors = _Factors(basis_DR=basis_DR, coeff_RC=coeff_RC, mask_RC=mask_RC, size_C=size_C, biases=biases)
        loss = _loss(view, mlps, [_drawn(pair, options.batch_size, view.generator) for pair in pairs], factors)
        for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            leaf.grad = gradient
        with torch.no_grad():
            mask_RC, stays_RC = _moved(mask_RC, coeff_RC, count, step, options)
            coeff_RC.mul_(stays_RC)
            assert coeff_RC.grad is not None
            coeff_RC.grad.mul_(mask_RC)
            optimizer.step()
            cosine.step()
            coeff_RC.mul_(mask_RC)  # momentum would move what has been pruned
    return _Factors(
        basis_DR=basis_DR.detach(),
        coeff_RC=coeff_RC.detach(),
        mask_RC=mask_RC,
        size_C=size_C,
        biases={name: bias + units[name] * shifts[name].detach() for name, bias in starts.items()},
    )


def _units(view: ModelView, mlp: _Mlp, pair: Pair) -> dict[str, Tensor]:
    """Return how large each value that a layer puts out is without its bias, by the bias's name: its unit in training.

    For the output layer that is with it, for what the MLP puts out is known.
    """
    found = {}
    for matrix in mlp.matrices:
        weight = view.tensor(f"{matrix.path}.weight")
        seen = pair[0].to(weight) @ weight.T if matrix.role == "input" else pair[1].to(weight)
        found[f"{matrix.path}.bias"] = seen.square().mean(0).sqrt()
    return found


def _moved(mask_RC: Tensor, coeff_RC: Tensor, count: int, step: int, options: Fips) -> tuple[Tensor, Tensor]:
    """Return the mask for a step and where coefficients keep their values; masks are fixed after `MASKS_MOVE`."""
    last = int(MASKS_MOVE * (options.steps - 1))
    if step > last or (step % options.every and step < last):
        return mask_RC, mask_RC
    progress = step / last if last else 1.0
    if options.schedule == "rigl":
        assert coeff_RC.grad is not None
        return exchange(mask_RC, coeff_RC, coeff_RC.grad, int(exchanged_share(progress) * count))
    sparsity = cubic_sparsity(progress, 1 - count / mask_RC.numel())
    mask_RC = largest(coeff_RC.abs().masked_fill(~mask_RC, -1), round((1 - sparsity) * mask_RC.numel()))
    return mask_RC, mask_RC


def _drawn(pair: Pair, count: int, generator: Generator) -> Pair:
    """Draw a random batch of an MLP's tokens."""
    rows = torch.randint(len(pair[0]), (min(count, len(pair[0])),), generator=generator)
    return pair[0][rows], pair[1][rows]


def _loss(view: ModelView, mlps: Sequence[_Mlp], pairs: Sequence[Pair], factors: _Factors) -> Tensor:
    """Return the mean squared error of the outputs, summed over the MLPs, relative to the outputs' energy."""
    total, energy = factors.basis_DR.new_zeros(()), 0.0
    for mlp, (inputs_ND, targets_ND) in zip(mlps, pairs, strict=True):
        output_ND = view.run(mlp.site, inputs_ND.to(total.device), factors.tensors(mlp))
        total = total + functional.mse_loss(output_ND, targets_ND.to(total.device))
        energy += float(targets_ND.square().mean())
    return total / energy if energy else total


def _better(
    view: ModelView, mlps: Sequence[_Mlp], pairs: Sequence[Pair], plain: _Factors, trained: _Factors
) -> _Factors:
    """Return the factors with the lower error on held-out tokens; note it if training did not help."""
    with torch.no_grad():
        before, after = (float(_loss(view, mlps, pairs, factors)) for factors in (plain, trained))
    if after < before:
        return trained
    view.note(f"{mlps[0].site.path}: training its group did not help on held-out tokens, so the SVD stays.")
    return plain
