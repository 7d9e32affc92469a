"""Depth under the same budget: blocks are taken out, and what they cost goes to the widths of those that are left.

Which blocks go, and what stands for them, is `replace-me`'s to say. What is left is given the largest equal sizes that
the budget allows, and the best by the curves of the uncut model. `trials` judges both, with fewer and fewer blocks
until that does no better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitrim.calibrate import LiveModelView
from vitrim.calibrate.runs import find_runs, with_edits
from vitrim.compression.allocate import EQUAL, FOUND, Allocation, Place, best_sizes, total
from vitrim.compression.budget import near_stock
from vitrim.compression.timing import time_block_
from vitrim.config.options import Counted
from vitrim.config.widths import Width
from vitrim.cost.count import count_macs, num_parameters
from vitrim.errors import BudgetError, RecipeError
from vitrim.methods import ReplaceMe
from vitrim.models.origin import Origin
from vitrim.models.stock import stock_origin
from vitrim.surgery import DropBlocks, KeepUnits
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Sizes to try, by path in the model that is left, without a run of blocks or with all of them.

    `stock`: the model's own library can say the result.
    """

    units: Mapping[str, int]
    stock: bool
    run: DropBlocks | None = None

    @property
    def num_gone(self) -> int:
        """How many blocks are taken out."""
        return 0 if self.run is None else self.run.run.length


@dataclass(frozen=True, kw_only=True)
class Shallower:
    """Candidates without blocks, at the cost of equal sizes with all of them.

    `found` is the allocation over all blocks. `mlps_alone`: no attention is cut, so a library may be able to say equal
    widths; with `rounds` they become the nearest of these. Others are tried where `least_gain` of the error is foreseen
    to be saved.
    """

    found: Allocation
    origin: Origin
    teacher: nn.Module
    sites: Sequence[MlpSite]
    batches: Sequence[Tensor]
    counted: Counted
    mlps_alone: bool
    rounds: bool
    least_gain: float

    @property
    def num_blocks(self) -> int:
        """Number of blocks with an MLP to cut."""
        return len(dict.fromkeys(site.block for site in self.sites))

    @property
    def most(self) -> int:
        """How many blocks have to go at most, until the others need no cut."""
        whole = {place.path: max(place.sizes) for place in self.found.places}
        spared = 1 - self.found.about["allowed"] / total(self.found.places, whole, "costs_J")
        return min(self.num_blocks - 1, math.ceil(self.num_blocks * spared))

    def each(self) -> Iterator[Mapping[str, Candidate]]:
        """Yield candidates by name without 1, 2, ... blocks, up to where those that are left need no cut.

        It ends where no run of that many blocks can be taken out.
        """
        for number in range(1, self.num_blocks):
            view = LiveModelView(self.teacher, self.sites, {}, self.batches, seed=0)
            try:
                [run] = ReplaceMe(num_blocks=self.num_blocks - number).propose(view)
            except BudgetError:
                return
            places = {new: place for place in self.found.places if (new := run.new_path(place.path)) is not None}
            allowed = self.allowed(run)
            whole = {place.path: max(place.sizes) for place in places.values()}
            if total(list(places.values()), whole, "costs_J") <= allowed:
                yield {f"{EQUAL}-{number}": self._candidate(run, whole)}
                return
            yield self._both(run, list(places.values()), allowed)

    def allowed(self, run: DropBlocks) -> int:
        """Return what the blocks that are left may cost: the budget of all, and what the others cost beside it."""
        gone = [place for place in self.found.places if run.new_path(place.path) is None]
        whole = total(gone, {place.path: max(place.sizes) for place in gone}, "costs_J")
        return int(self.found.about["allowed"] + self._freed(run) - whole)

    def _freed(self, run: DropBlocks) -> int:
        """Return what the blocks of a run cost in all."""
        if self.counted == "latency":
            blocks = [run.run.block(index) for index in range(run.run.start, run.run.stop)]
            return sum(time_block_(self.found.measured, self.teacher, block, self.batches[0]) for block in blocks)
        models = self.teacher, with_edits(self.teacher, [run])
        image = self.batches[0][:1]
        before, after = (num_parameters(m) if self.counted == "params" else count_macs(m, image) for m in models)
        return before - after

    def _both(self, run: DropBlocks, places: Sequence[Place], allowed: int) -> Mapping[str, Candidate]:
        """Return equal sizes, and the best by the curves where these are foreseen to gain enough."""
        sizes, best = self._rounded(equal_within(places, self.found.places, allowed)), best_sizes(places, allowed)
        equal = self._candidate(run, sizes)
        found, number = {f"{EQUAL}-{equal.num_gone}": equal}, equal.num_gone
        errors = [total(places, each, "errors_J") for each in (best, nearest(places, sizes))]
        if best != sizes and errors[0] <= (1 - (self.least_gain if equal.stock else 0.0)) * errors[1]:
            found[f"{FOUND}-{number}"] = self._candidate(run, best)
        return found

    def _rounded(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """Return equal widths of all MLPs rounded down to what the library can load, if it can load any near them."""
        if not self.rounds:
            return sizes
        width = Width(kind="params_ratio", value=1.0)  # a ceiling
        return near_stock(width, sizes, self.origin, self.sites)[0]

    def _candidate(self, run: DropBlocks, sizes: Mapping[str, int]) -> Candidate:
        """Return a candidate from sizes by the paths of the uncut model."""
        units = {new: size for path, size in sizes.items() if (new := run.new_path(path)) is not None}
        cuts = [KeepUnits.first(site, sizes[site.path]) for site in self.sites if site.path in sizes]
        whole = all(size == max(place.sizes) for place in self.found.places if (size := sizes.get(place.path)))
        edits = [edit.below(self.origin.encoder) for edit in (*cuts, run)]
        stock = (self.mlps_alone or whole) and stock_origin(self.origin, edits) is not None
        return Candidate(units=units, run=run, stock=stock)


def equal_within(places: Sequence[Place], every: Sequence[Place], allowed: int) -> dict[str, int]:
    """Return the sizes of `every` place at the largest equal share with which some of them stay within a budget.

    A place has the largest of its sizes that is no more than the share; the smallest where there is none.
    """
    shares = sorted({size / max(place.sizes) for place in places for size in place.sizes}, reverse=True)
    every_size = ({place.path: _size_at(place, share) for place in every} for share in shares)
    return next(sizes for sizes in every_size if total(places, sizes, "costs_J") <= allowed)


def nearest(places: Sequence[Place], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return, of the sizes that are known of each place, the largest that is no more than the given one."""
    return {place.path: _size_at(place, sizes[place.path] / max(place.sizes)) for place in places}


def _size_at(place: Place, share: float) -> int:
    allowed = [size for size in place.sizes if size <= share * max(place.sizes) * (1 + 1e-9)]
    return max(allowed, default=min(place.sizes))


def check_depth(model: nn.Module, sites: Sequence[MlpSite], images: Tensor) -> None:
    """Check that a block can be taken out of a model.

    Raises:
        RecipeError: none can.
    """
    try:
        find_runs(model, sites, 1, images[:2], lambda _: None)
    except BudgetError as error:
        raise RecipeError(f"allocate.depth: {error}") from None
