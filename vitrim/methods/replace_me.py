"""ReplaceMe (arXiv 2505.02819): takes a run of consecutive blocks out and puts the best linear map in their place.

The map T acts on what the MLP in front of the run adds to the residual stream: with Y the stream before that MLP, M
its output and L the output of the run's last block, Y + T M is to be L, by least squares over calibration tokens. T is
folded into the MLP's output projection, so nothing is added to the model. Here a constant is fitted, too, where the
projection has a bias; a layer scale behind it is divided out; and where blocks end in a norm (BERT), the least squares
are in front of the norm, which is then the last dropped block's.

Which run: every one of the wanted length is folded and measured on held-out images. The paper takes the run whose
input and output are nearest by cosine (`select_on: cosine`). For the run that goes, a few ridges are tried on the
held-out images, and weights fitted to the projection's inputs beside the map of its outputs.

Shapes: N tokens, D model width, H inputs of the projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vitrim.errors import BudgetError
from vitrim.methods.registry import BudgetUse, ModelMethod, optional_tensor, register
from vitrim.ops.least_squares import fit_output, ridge_for
from vitrim.surgery import DropBlocks
from vitrim.types import BlockRun, ModelView, RunInputs, Stats

RIDGES = (1e-6, 1e-4, 1e-2)


@register
class ReplaceMe(ModelMethod):
    """ReplaceMe: takes a run of blocks out, the best linear map for them folded into the projection in front.

    Without `num_blocks` the budget sets how many blocks stay: it is the share of them, to the nearest number.
    """

    name = "replace-me"
    paper = "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization"
    arxiv = "2505.02819"
    summary = "a run of blocks out, the best linear map for them folded into the projection in front"
    needs = "images"
    repairs = False
    edits = (DropBlocks,)
    takes = "share"
    senseless = ("mlp_ratio", "hidden_dim", "widths")

    num_blocks: int | None = Field(default=None, ge=1)
    """How many blocks stay; None goes by the budget."""
    fit: RunInputs | None = None
    """What stands for the run: a linear map of the projection's `output`, as in the paper, or new weights for its
    inputs, the `hidden` units of the MLP; None takes the better one on held-out images."""
    select_on: Literal["features", "cosine"] = "features"
    """Which run goes: the one that changes the final features of held-out images least, or, as in the paper, the one
    whose input and output are nearest by cosine."""
    ridge: float | None = Field(default=None, gt=0)
    """Strength of the regularization, towards the weights that are there, relative to the mean energy of what is
    mapped; None takes the one of a few that is best on held-out images, or no map if that is better still."""
    compensate: bool = True
    """Fold the map; False only takes the blocks out, to show how much the map helps."""

    def goes_by(self) -> BudgetUse:
        """Return which part of the budget the method uses: none if `num_blocks` is given."""
        return "nothing" if self.num_blocks is not None else self.takes

    def propose(self, view: ModelView) -> Iterator[DropBlocks]:
        """Yield the one edit, or none if all blocks stay.

        Raises:
            BudgetError: there are fewer blocks, or no run of that length can be taken out.
        """
        total = len(dict.fromkeys(site.block for site in view.sites))
        wanted = max(1, round(view.keep_ratio * total)) if self.num_blocks is None else self.num_blocks
        if wanted > total:
            raise BudgetError(f"options.num_blocks: {wanted} are to stay of {total} blocks; use 1..{total}.")
        if wanted == total:
            view.note(f"all {total} blocks stay, so nothing was taken out.")
            return
        runs = view.runs(total - wanted)
        edit, error = self._best(view, runs)
        _, plain = next(view.tried([DropBlocks(run=edit.run)]))
        view.note(
            f"{edit.describe()}, {'with' if edit.tensors else 'without'} a map for them: the relative squared error on "
            f"held-out images is {error:.3g}, and {plain:.3g} without."
        )
        yield edit

    def _best(self, view: ModelView, runs: Sequence[BlockRun]) -> tuple[DropBlocks, float]:
        """Return the edit that changes the features of held-out images least, and by how much."""
        if self.select_on == "cosine":
            runs = [_nearest(view, runs)]
        if not self.compensate:
            return min(view.tried(DropBlocks(run=run) for run in runs), key=_error)
        fits: Sequence[RunInputs] = ("output", "hidden") if self.fit is None else (self.fit,)
        ridges = RIDGES if self.ridge is None else (self.ridge,)
        middle = ridges[len(ridges) // 2]
        folded = (_folded(view, run, stats, fits[0], middle) for run, stats in view.run_sums(runs, of=fits[0]))
        best = min(view.tried(folded), key=_error)
        if len(fits) == len(ridges) == 1:
            return best
        others = (
            _folded(view, run, stats, of, ridge)
            for of in fits
            for run, stats in view.run_sums([best[0].run], of=of)
            for ridge in ridges
        )
        plain = [DropBlocks(run=best[0].run)] if self.ridge is None else []
        return min(view.tried(chain(others, plain)), key=_error)


def _error(pair: tuple[DropBlocks, float]) -> float:
    return pair[1]


def _folded(view: ModelView, run: BlockRun, stats: Stats, of: RunInputs, ridge: float) -> DropBlocks:
    """Return the edit with the map for a run folded into the projection in front of it."""
    weight_DH, bias_D = view.tensor(f"{run.output}.weight").flatten(1), optional_tensor(view, f"{run.output}.bias")
    start = torch.eye(len(weight_DH)) if of == "output" else weight_DH.cpu()
    keep = torch.arange(start.shape[1])
    ridge = ridge_for(stats.num_tokens, len(keep), ridge)
    found, shift_D = fit_output(stats, keep, start, bias_D, ridge=ridge, where=run.output)
    if of == "output":
        shift_D = None if shift_D is None or bias_D is None else found @ bias_D.to(found) + shift_D
        found = found @ weight_DH.to(found)
    tensors = {f"{run.output}.weight": found} | ({} if shift_D is None else {f"{run.output}.bias": shift_D})
    for name in ("weight", "bias") if run.norm and run.last_norm else ():
        tensor = optional_tensor(view, f"{run.last_norm}.{name}")
        tensors |= {} if tensor is None else {f"{run.norm}.{name}": tensor.clone()}
    return DropBlocks(run=run, tensors=tensors)


def _nearest(view: ModelView, runs: Sequence[BlockRun]) -> BlockRun:
    """Return the run whose input and output are nearest by the mean cosine of their tokens; a tie goes to the first."""
    latest: dict[str, Tensor] = {}
    sums = dict.fromkeys(runs, 0.0)

    def see(path: str, _: Tensor, output: Tensor) -> None:
        latest[path] = output
        for run in runs:
            if run.last == path:
                sums[run] += float(cosine_similarity(latest[run.before], output, dim=-1).sum())

    view.observe(list(dict.fromkeys(path for run in runs for path in (run.before, run.last))), see)
    return max(runs, key=lambda run: sums[run])
