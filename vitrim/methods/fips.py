"""FiPS (arXiv 2411.09816): the matrices of several MLPs as one dense basis times sparse coefficients.

The basis starts from an SVD of all matrices side by side. With images, basis, coefficients and biases of a group are
then trained together, each MLP on what the model had there before any edit, while a schedule moves the coefficients'
masks: gradual magnitude pruning or RigL. Ours are that the masks' bits count against the budget, that sizes are the
layers' own instead of 4 d, and that training which does not help on held-out tokens is left out. The model as a whole
is not trained here: `recover` does that, and masks hold there, since only what is in them is stored.

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

MASKS_MOVE = 0.75  # share of the steps after which masks stay as they are; the paper's for RigL
JUDGE_SHARE = 0.1  # of the sampled tokens, held out


@register
class Fips(ModelMethod):
    """FiPS: matrices of several MLPs as one dense basis times sparse coefficients.

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
    """How many MLPs in a row share a basis, or the size of each group."""
    sparsity: float = Field(default=0.75, ge=0, lt=1)
    """Share of the coefficients that is zero; with the budget it says the rank."""
    count_masks: bool = True
    """Count the bits that say where coefficients stand, at 32 a number; the paper does not."""
    schedule: Literal["rigl", "gmp"] = "rigl"
    """How the masks of the coefficients move: RigL, or gradual magnitude pruning."""
    every: int = Field(default=10, ge=1)
    """Steps between two moves of the masks."""
    steps: int = Field(default=500, ge=0)
    """Steps of local training; 0, or no images, leave the SVD with its largest coefficients."""
    batch_size: int = Field(default=1024, ge=1)
    """Tokens of each MLP in a step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak rate of the local training."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of the local training."""
    num_tokens: int = Field(default=20_000, ge=64)
    """Tokens that are sampled of each MLP."""

    def propose(self, view: ModelView) -> Iterator[ToFips]:
        """One edit a group of MLPs.

        Raises:
            SiteNotFoundError: no MLP is left.
            RecipeError: group sizes do not add up.
            BudgetError: the budget pays for no basis at all, or MLPs of different widths are asked to share one.
        """
        if not view.sites:
            raise SiteNotFoundError(
                "fips: no MLP is left to share a basis; put fips before what replaces their layers."
            )
        groups = _groups(view.sites, self.group)
        if view.keep_ratio >= 1:
            view.note("fips: the full budget pays for the matrices themselves, so they stay as they are.")
            return
        if self.steps and not view.has_images:
            view.note("no images given: the shared basis is an SVD of the weights, not trained; pass data to train it.")
        # All before the first is carried out, so that what an MLP takes in and should put out is the original model's.
        yield from [_share(view, sites, self) for sites in groups]


Pair = tuple[Tensor, Tensor]  # tokens as an MLP takes them in, and as it puts them out


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    """One layer's matrix as columns of the joined one: transposed where it reads the model width."""

    path: str
    role: Role
    columns: slice

    def weight(self, factors: _Factors) -> Tensor:
        """The layer's weight by the factors, (out, in)."""
        part_DC = factors.basis_DR @ factors.coeff_RC[:, self.columns]
        return part_DC.T if self.role == "input" else part_DC


@dataclass(frozen=True, kw_only=True)
class _Mlp:
    """One MLP of a group: its matrices, and its biases by full name."""

    site: MlpSite
    matrices: tuple[_Matrix, ...]
    biases: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """What stands for a group's matrices: a basis, coefficients with zeros outside of their mask, trained biases."""

    basis_DR: Tensor
    coeff_RC: Tensor
    mask_RC: Tensor
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self, mlp: _Mlp) -> dict[str, Tensor]:
        """An MLP's tensors by full name."""
        weights = {f"{matrix.path}.weight": matrix.weight(self) for matrix in mlp.matrices}
        return weights | {name: self.biases[name] for name in mlp.biases if name in self.biases}


@dataclass(kw_only=True)
class _Sample:
    """Tokens of one MLP, inputs and outputs: of all that come by, those with the smallest random keys."""

    size: int
    generator: Generator
    keys_N: Tensor = field(default_factory=lambda: torch.empty(0))
    chosen_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: Literal["inputs", "outputs"], tokens: Tensor) -> None:
        """Count a batch in: inputs first, with new keys, then the outputs of the same tokens."""
        tokens_ND = tokens.flatten(0, -2).float().cpu()
        if name == "inputs":
            keys_N = torch.cat([self.keys_N, torch.rand(len(tokens_ND), generator=self.generator)])
            self.keys_N, self.chosen_N = keys_N.topk(min(self.size, len(keys_N)), largest=False)
        held_ND = torch.cat([self.parts[name], tokens_ND]) if name in self.parts else tokens_ND
        self.parts[name] = held_ND[self.chosen_N]

    def split(self) -> tuple[Pair, Pair]:
        """What to train on, and what judges; the keys have put the tokens in random order."""
        inputs_ND, outputs_ND = (self.parts[name].clone() for name in ("inputs", "outputs"))  # not of inference mode
        held_out = math.ceil(JUDGE_SHARE * len(inputs_ND))
        return (inputs_ND[held_out:], outputs_ND[held_out:]), (inputs_ND[:held_out], outputs_ND[:held_out])


def _groups(sites: Sequence[MlpSite], group: int | tuple[int, ...]) -> list[Sequence[MlpSite]]:
    """MLPs in a row, of one model width each; a plain number starts anew where the width changes."""
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
    """The start, training where it can be had and helps, and the edit."""
    mlps, joined_DC = _joined(view, sites)
    (num_rows, num_cols), keep, masks = joined_DC.shape, view.keep_ratio, options.count_masks
    rank = rank_for_budget(num_rows, num_cols, keep=keep, sparsity=options.sparsity, masks=masks)
    if rank < 1:
        raise BudgetError(f"{sites[0].path}: a share of {keep:.3g} pays for no basis; raise it, or options.group.")
    basis_DR, coeff_RC = leading_basis(joined_DC, rank)
    start = basis_DR.to(joined_DC.device), coeff_RC.to(joined_DC.device)
    # Untrained, a rank above D is columns of zeros: what they would cost goes to more coefficients.
    low = min(rank, num_rows)
    count = num_coefficients(num_rows, num_cols, low, keep=keep, masks=masks)
    found = _pruned(start[0][:, :low], start[1][:low], count)
    pairs = _observe(view, mlps, options) if view.has_images and options.steps else None
    if pairs is not None:
        count = max(1, int((1 - options.sparsity) * rank * num_cols))
        trained = _train(view, mlps, [train for train, _ in pairs], start, count, options)
        found = _better(view, mlps, [held_out for _, held_out in pairs], found, trained)
    parts: dict[str, tuple[Role, Tensor, Tensor]] = {
        matrix.path: (matrix.role, found.coeff_RC[:, matrix.columns], found.mask_RC[:, matrix.columns])
        for mlp in mlps
        for matrix in mlp.matrices
    }
    return ToFips.by(found.basis_DR, parts, biases=found.biases)


def _joined(view: ModelView, sites: Sequence[MlpSite]) -> tuple[list[_Mlp], Tensor]:
    """The MLPs of a group, and their matrices side by side; a layer's role decides which way its matrix is turned."""
    mlps: list[_Mlp] = []
    columns_DC: list[Tensor] = []
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
            start, end = end, end + columns_DC[-1].shape[1]
            matrices.append(_Matrix(path=path, role=role, columns=slice(start, end)))
            if bias is not None:  # as the layer holds it, where gate and value are packed
                biases[f"{path}.bias"] = view.tensor(f"{path}.bias")
        mlps.append(_Mlp(site=site, matrices=tuple(matrices), biases=biases))
    return mlps, torch.cat(columns_DC, dim=1)


def _pruned(basis_DR: Tensor, coeff_RC: Tensor, count: int) -> _Factors:
    """Factors with their largest coefficients: as the basis is orthonormal, no others are nearer to the matrices."""
    mask_RC = largest(coeff_RC.abs(), count)
    return _Factors(basis_DR=basis_DR, coeff_RC=coeff_RC * mask_RC, mask_RC=mask_RC)


def _observe(view: ModelView, mlps: Sequence[_Mlp], options: Fips) -> list[tuple[Pair, Pair]] | None:
    """Tokens of each MLP to train on and to judge by; None where one of them can't be run by itself."""
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
    """Whether running an MLP on what it took in gives what it put out inside its block."""
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
) -> _Factors:
    """Basis, coefficients and biases of a group together, while the schedule brings the masks to `count` entries."""
    basis_DR, coeff_RC = (part.clone().requires_grad_() for part in start)
    biases = {name: bias.clone().requires_grad_() for mlp in mlps for name, bias in mlp.biases.items()}
    leaves = [basis_DR, coeff_RC, *biases.values()]
    mask_RC = largest(coeff_RC.detach().abs(), coeff_RC.numel() if options.schedule == "gmp" else count)
    optimizer = torch.optim.AdamW(leaves, lr=options.lr, weight_decay=options.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.steps)
    with torch.no_grad():
        coeff_RC.mul_(mask_RC)
    for step in view.track(range(options.steps), f"training the basis of {len(mlps)} MLPs"):
        factors = _Factors(basis_DR=basis_DR, coeff_RC=coeff_RC, mask_RC=mask_RC, biases=biases)
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
        biases={name: bias.detach() for name, bias in biases.items()},
    )


def _moved(mask_RC: Tensor, coeff_RC: Tensor, count: int, step: int, options: Fips) -> tuple[Tensor, Tensor]:
    """The mask for a step, and where coefficients keep their values; after a share of all steps it rests."""
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
    """A random batch of an MLP's tokens."""
    rows = torch.randint(len(pair[0]), (min(count, len(pair[0])),), generator=generator)
    return pair[0][rows], pair[1][rows]


def _loss(view: ModelView, mlps: Sequence[_Mlp], pairs: Sequence[Pair], factors: _Factors) -> Tensor:
    """The sum over MLPs of the mean squared error of what they put out."""
    total = factors.basis_DR.new_zeros(())
    for mlp, (inputs_ND, targets_ND) in zip(mlps, pairs, strict=True):
        output_ND = view.run(mlp.site, inputs_ND.to(total.device), factors.tensors(mlp))
        total = total + functional.mse_loss(output_ND, targets_ND.to(total.device))
    return total


def _better(
    view: ModelView, mlps: Sequence[_Mlp], pairs: Sequence[Pair], plain: _Factors, trained: _Factors
) -> _Factors:
    """Which of two has the lower error on held-out tokens; a note tells that training was for nothing."""
    with torch.no_grad():
        before, after = (float(_loss(view, mlps, pairs, factors)) for factors in (plain, trained))
    if after < before:
        return trained
    view.note(f"{mlps[0].site.path}: training its group did not help on held-out tokens, so the SVD stays.")
    return plain
