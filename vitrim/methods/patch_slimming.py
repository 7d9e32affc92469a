"""Patch Slimming (arXiv 2106.02852): fewer tokens from block to block, the same for every image, with the same weights.

Each block puts out a set of tokens, nested from the last block, which keeps CLS and registers alone, to the first. A
block's candidates are ranked by how much of what they gather reaches the tokens that stay, over all paths through
later heads (`ops.token_paths`); as many are added as it takes for the next block to put out nearly what it did.

Ours: the error is relative, so that one tolerance suits any scale of features; how many are added is bisected; and the
tolerance is found by a budget, where one is given. Blocks are tuned one by one behind the search, by `blockwise`.

Shapes: B images, N tokens, D model width, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from vitrim.errors import BudgetError
from vitrim.methods.registry import BudgetUse, ModelMethod, register
from vitrim.ops.token_paths import paths_behind, token_scores, with_shortcut
from vitrim.surgery import KeepTokens
from vitrim.types import AttentionSite, ModelView

TOLERANCES = (1e-6, 10.0)  # relative errors between which a budget's lies: nothing lost, and everything


@register
class PatchSlimming(ModelMethod):
    """Patch Slimming: as many patches a block as a tolerance or a budget asks for, ranked over all paths to the end."""

    name = "patch-slimming"
    paper = "Patch Slimming for Efficient Vision Transformers"
    arxiv = "2106.02852"
    summary = "fewer tokens from block to block, the same patches for all images; weights unchanged"
    needs = "images"
    repairs = False
    edits = (KeepTokens,)
    takes = "share"
    senseless = ("params_ratio", "mlp_ratio", "hidden_dim", "widths")  # all weights stay

    tolerance: float | None = Field(default=None, gt=0)
    """Relative squared error that a block's choice may cause in the tokens that the next one puts out (the paper's
    epsilon, there 0.01 to 0.02); it then sets how many stay. None searches for the value that meets the budget."""
    num_last: int = Field(default=0, ge=0)
    """How many patches leave the last block: none for CLS alone, some for dense features or a mean over patches."""
    step: int | None = Field(default=None, ge=1)
    """How many patches are added at a time; None takes a twentieth of them."""
    shortcut: bool = False
    """Count the residual sum as a path, too: attention plus identity. The paper counts attention alone."""
    num_images: int = Field(default=128, ge=1)
    """How many calibration images the search uses; it holds what goes into every block for all of them."""
    rounds: int = Field(default=8, ge=1)
    """How many tolerances are tried when a budget is given instead."""

    def goes_by(self) -> BudgetUse:
        """Return which part of the budget the method uses: none if `tolerance` is given."""
        return "nothing" if self.tolerance is not None else self.takes

    def check(self, view: ModelView) -> None:
        """Refuse a model that tokens can't leave, and more patches behind the last block than there are."""
        if view.has_images:
            blocks = _blocks(view, self)
            if self.tolerance is None:
                self.affordable(view.keep_ratio, *blocks[:3])

    def affordable(self, share: float, sites: Sequence[AttentionSite], num_prefix: int, num_tokens: int) -> int:
        """Return how many patches of all blocks a share keeps.

        Raises:
            BudgetError: the last block alone keeps more than that.
        """
        num_patches, depth = num_tokens - num_prefix, len(sites)
        total = int(share * num_patches * depth)
        if total < depth * self.num_last:
            least = self.num_last / num_patches
            raise BudgetError(
                f"keep_ratio={share:g}: options.num_last alone keeps {least:.3g} of all patches; use more."
            )
        return total

    def propose(self, view: ModelView) -> Iterator[KeepTokens]:
        """Yield an edit for each block that loses tokens, in forward order.

        Raises:
            BudgetError: more patches are to stay than there are, or none of those that the model pools.
        """
        if self.tolerance is None and view.keep_ratio == 1:
            view.note("all tokens stay, so nothing was cut.")
            return
        search = _Search(view, self)
        counts = search.within(self.tolerance) if self.tolerance is not None else search.at_budget(view.keep_ratio)
        kept, every = search.masks(counts), tuple(range(search.num_tokens))
        for site, among, keep in zip(search.sites, [every, *kept], kept, strict=False):
            if len(keep) < search.num_tokens:
                yield KeepTokens(site=site, keep=keep, among=among)
        search.say(kept)


def _blocks(view: ModelView, options: PatchSlimming) -> tuple[Sequence[AttentionSite], int, int, bool]:
    """Return what `ModelView.token_blocks` does, if as many patches can leave the last block as are asked for."""
    sites, num_prefix, num_tokens, pools_prefix = view.token_blocks()
    num_patches = num_tokens - num_prefix
    if options.num_last > num_patches:
        raise BudgetError(f"options.num_last: {options.num_last} of {num_patches} patches; use 0..{num_patches}.")
    if not pools_prefix and not options.num_last:
        raise BudgetError(
            "options.num_last: this model pools patches, so some must leave the last block; give their number, and "
            "the kept ones are pooled."
        )
    return sites, num_prefix, num_tokens, pools_prefix


@dataclass(kw_only=True)
class _Walk:
    """A way from the last block to the first: the tokens kept behind the current block, and the paths from there on."""

    keep: tuple[int, ...]
    paths: list[Tensor] = field(default_factory=list)


class _Search:
    """The activations of the dense model at every block, and the search for the tokens that each puts out.

    `counts` are patches by block; tokens in front of the patches always stay.
    """

    def __init__(self, view: ModelView, options: PatchSlimming) -> None:
        self.view, self.options = view, options
        self.sites, self.num_prefix, self.num_tokens, pools_prefix = _blocks(view, options)
        self.tokens = self._activations()
        self.num_patches = self.num_tokens - self.num_prefix
        self.step = options.step or max(1, round(self.num_patches / 20))
        self.pools_patches = not pools_prefix

    def _activations(self) -> list[list[Tensor]]:
        """Return the tokens (B, N, D) of each batch at the start of every block, and behind the last."""
        seen: list[list[Tensor]] = [[] for _ in (*self.sites, None)]
        places = {site.block: number for number, site in enumerate(self.sites)}

        def see(path: str, inputs: Tensor, output: Tensor) -> None:
            number, have = places[path], sum(map(len, seen[places[path]]))
            if (left := self.options.num_images - have) > 0:
                seen[number].append(inputs[:left].clone())
                if number == len(self.sites) - 1:
                    seen[-1].append(output[:left].clone())

        self.view.observe(list(places), see)
        return seen

    def within(self, tolerance: float) -> list[int]:
        """Return how many patches each block needs for the next one to stay within a tolerance."""
        walk = self._start()
        counts = [self.options.num_last]
        for number in reversed(range(len(self.sites) - 1)):
            ranked = self._ranked(walk, number)
            count = self._fewest(walk.keep, ranked, number, tolerance)
            walk.keep = tuple(sorted({*walk.keep, *ranked[:count]}))
            counts.insert(0, len(walk.keep) - self.num_prefix)
        return counts

    def at_budget(self, share: float) -> list[int]:
        """Return counts that keep a share of all patches of all blocks, mixed from those of the two nearest tolerances.

        Raises:
            BudgetError: the last block alone keeps more than that.
        """
        total = self.options.affordable(share, self.sites, self.num_prefix, self.num_tokens)
        depth, last = len(self.sites), self.options.num_last
        many, few = [*[self.num_patches] * (depth - 1), last], [last] * depth
        low, high = TOLERANCES
        for _ in self.view.track(range(self.options.rounds), "searching for the tolerance"):
            if sum(many) <= total or sum(few) == total:
                break
            tolerance = math.sqrt(low * high)
            counts = self.within(tolerance)
            if sum(counts) > total:
                many, low = counts, tolerance
            else:
                few, high = counts, tolerance
        if (low, high) != TOLERANCES:
            self.view.note(f"patch-slimming: these tokens lie at a tolerance of {low:.2g} to {high:.2g}.")
        return many if sum(many) <= total else _between(few, many, total)

    def masks(self, counts: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the tokens that each block puts out, for a number of patches each."""
        walk = self._start()
        kept = [walk.keep]
        for number in reversed(range(len(self.sites) - 1)):
            missing = counts[number] + self.num_prefix - len(walk.keep)
            if missing > 0:
                walk.keep = tuple(sorted({*walk.keep, *self._ranked(walk, number)[:missing]}))
            else:
                self._ranked(walk, number)  # the paths go on
            kept.insert(0, walk.keep)
        return kept

    def say(self, kept: Sequence[Sequence[int]]) -> None:
        """Note how many tokens stay, and what errors are about."""
        counts, last = ", ".join(str(len(each)) for each in kept), len(kept[-1]) - self.num_prefix
        compared = f"the {last} kept patches of {self.num_patches}, and CLS" if last else "the CLS token alone"
        pooled = " What the model pools is the mean of the kept patches." if self.pools_patches else ""
        self.view.note(f"tokens behind each block: {counts} of {self.num_tokens}. Errors compare {compared}.{pooled}")

    def _start(self) -> _Walk:
        """Return the tokens behind the last block: CLS and registers, and the patches asked for with highest scores."""
        first = tuple(range(self.num_prefix))
        walk = _Walk(keep=first)
        if self.options.num_last:
            ranked = self._rank(len(self.sites) - 1, first, self._ends())
            walk.keep = tuple(sorted({*first, *ranked[: self.options.num_last]}))
        walk.paths = self._ends()
        return walk

    def _ends(self) -> list[Tensor]:
        """Return the paths behind the last block: each token is its own end."""
        eye_NN = torch.eye(self.num_tokens, device=self.tokens[0][0].device)
        return [eye_NN.expand(len(batch), -1, -1) for batch in self.tokens[0]]

    def _ranked(self, walk: _Walk, number: int) -> list[int]:
        """Take a walk one block towards the first, and return the candidates to be put out by block `number`."""
        keep = torch.tensor(walk.keep)
        walk.paths = [
            paths_behind(paths, self._maps(number + 1, batch), keep)
            for paths, batch in zip(walk.paths, self.tokens[number + 1], strict=True)
        ]
        return self._rank(number, walk.keep, walk.paths)

    def _rank(self, number: int, keep: Sequence[int], paths: Sequence[Tensor]) -> list[int]:
        """Return the tokens that are not kept yet, those with the highest mean score first; ties by position."""
        scores_N = torch.zeros(self.num_tokens, dtype=torch.float64)
        for later_BNN, batch in zip(paths, self.tokens[number], strict=True):
            scores_N += token_scores(later_BNN, self._maps(number, batch), batch).double().sum(0).cpu()
        ordered = scores_N.sort(descending=True, stable=True).indices.tolist()
        return [position for position in ordered if position not in set(keep)]

    def _maps(self, number: int, batch: Tensor) -> Iterator[Tensor]:
        maps = self.view.attention_maps(self.sites[number], batch)
        return iter(with_shortcut(maps) if self.options.shortcut else maps)

    def _fewest(self, keep: tuple[int, ...], ranked: Sequence[int], number: int, tolerance: float) -> int:
        """Return how many candidates must be added, in steps, for the next block's error to be within a tolerance."""
        low, high = 0, -(-len(ranked) // self.step)
        while low < high:
            middle = (low + high) // 2
            added = ranked[: middle * self.step]
            if self._error(number + 1, keep, tuple(sorted({*keep, *added}))) <= tolerance:
                high = middle
            else:
                low = middle + 1
        return min(len(ranked), high * self.step)

    def _error(self, number: int, keep: Sequence[int], given: Sequence[int]) -> float:
        """Return the relative squared error of the tokens that a block puts out where it is given some of its input."""
        index = [given.index(position) for position in keep]
        error, wanted = 0.0, []
        for inputs, outputs in zip(self.tokens[number], self.tokens[number + 1], strict=True):
            found_BKD = self.view.kept(self.sites[number], inputs[:, list(given)], index)
            wanted.append(outputs[:, list(keep)])
            error += float((found_BKD.double() - wanted[-1].double()).square().sum())
        rows_ND = torch.cat(wanted).double().flatten(0, 1)
        spread = float((rows_ND - rows_ND.mean(0)).square().sum())
        return error / spread if spread else math.inf if error else 0.0


def _between(few: Sequence[int], many: Sequence[int], total: int) -> list[int]:
    """Interpolate between two falling lists of counts to at most a total, and fill up from the first block on."""
    gap = sum(many) - sum(few)
    weight = (total - sum(few)) / gap if gap else 0.0
    counts = [math.floor(low + weight * (high - low)) for low, high in zip(few, many, strict=True)]
    for number, most in enumerate(many):
        counts[number] += min(max(0, most - counts[number]), total - sum(counts), 1)
    return counts
