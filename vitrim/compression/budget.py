"""Turns a budget for the whole model into hidden units of each MLP, and widths into ones that a library can load.

A budget is an upper limit: all MLPs keep the largest equal share of units with which the model stays within it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitrim.config.widths import Width, is_end
from vitrim.cost.count import count_macs, num_parameters, site_macs, site_parameters
from vitrim.cost.memory import tokens_per_site
from vitrim.errors import BudgetError
from vitrim.models.origin import Origin
from vitrim.models.stock import in_proportion, nearest_stock_width
from vitrim.types import MlpSite

HALVINGS = 40  # bisection steps for the share of units: finer than one unit of any real MLP


def solve_widths(
    width: Width,
    sites: Sequence[MlpSite],
    encoder: nn.Module,
    inputs: Tensor | None,
    *,
    original: nn.Module | None = None,
) -> dict[str, int]:
    """Return how many hidden units of each MLP stay, by path.

    Args:
        width: the budget and how it is rounded.
        sites: MLPs to cut, by paths from the encoder.
        encoder: the module that holds them; it may be on the meta device.
        inputs: a batch of inputs, needed to count MACs; its values play no part.
        original: the uncut encoder that the budget refers to, if `encoder` has been cut before.

    Raises:
        BudgetError: a width is outside what an MLP has, or the MLPs can't meet the budget.
    """
    width.check(sites)
    if not width.is_of_the_model:
        return {site.path: width.of(site) for site in sites}
    return _largest_within(width, sites, _cost_of(width, sites, encoder, inputs, original or encoder))


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """A cost: the original's total, the part that cutting MLPs never changes, and one MLP's cost at a width."""

    total: int
    fixed: int
    of_site: Callable[[MlpSite, int], int]
    words: str


def _cost_of(
    width: Width, sites: Sequence[MlpSite], encoder: nn.Module, inputs: Tensor | None, original: nn.Module
) -> _Cost:
    """Count parameters or MACs, depending on the budget."""
    if width.kind == "params_ratio":
        now, total, words, of_site = num_parameters(encoder), num_parameters(original), "parameters", site_parameters
    else:
        if inputs is None:
            raise BudgetError("macs_ratio: the size of the inputs is not known; pass data, or use params_ratio.")
        tokens = dict(zip((site.path for site in sites), tokens_per_site(encoder, inputs[0], sites), strict=True))
        now, total, words = count_macs(encoder, inputs[:1]), count_macs(original, inputs[:1]), "MACs"

        def of_site(site: MlpSite, width: int) -> int:
            return tokens[site.path] * site_macs(site, width)

    fixed = now - sum(of_site(site, site.d_hidden) for site in sites)
    return _Cost(total=total, fixed=fixed, of_site=of_site, words=words)


def _largest_within(width: Width, sites: Sequence[MlpSite], cost: _Cost) -> dict[str, int]:
    """Return the widths at the largest equal share of units that keeps the model within the budget."""

    def at(share: float) -> dict[str, int]:
        return {site.path: _units(width, site, share) for site in sites}

    def left(units: Mapping[str, int]) -> float:
        return cost.fixed + sum(cost.of_site(site, units[site.path]) for site in sites)

    allowed, smallest = width.value * cost.total, left(at(0.0))
    if smallest > allowed:
        share, least = 1 - cost.fixed / cost.total, smallest / cost.total
        raise BudgetError(
            f"{width.kind}={width.value:g}: the MLPs hold {share:.0%} of the {cost.words}, so cutting them alone "
            f"leaves {least:.3g} at least; use {_ceiling(least):g}..1, parts: both of dgmr or corp, or low-rank."
        )
    if left(at(1.0)) <= allowed:
        return at(1.0)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(at(middle)) <= allowed else (low, middle)
    return at(low)


def _units(width: Width, site: MlpSite, share: float) -> int:
    """Return a share of an MLP's units, rounded down to the multiple asked for; its own width and all units stay."""
    if any(is_end(path, site.path) for path in width.own):
        return width.of(site)
    units = share * site.d_hidden
    if units >= site.d_hidden:
        return site.d_hidden
    multiple = 1 if width.exact or units < width.round_to else width.round_to
    return max(1, min(site.d_hidden, int(units / multiple) * multiple))


def _ceiling(ratio: float) -> float:
    """Return a ratio rounded up to two digits."""
    return -(-ratio * 100 // 1) / 100


def near_stock(
    width: Width, units: Mapping[str, int], origin: Origin, sites: Sequence[MlpSite]
) -> tuple[Mapping[str, int], str | None]:
    """Return the nearest widths that the model's own library can load, with a note if they differ from those asked for.

    A library is told one ratio for all MLPs. A budget of the whole model stays a ceiling: no MLP gets wider.

    Args:
        width: the budget; one number of units for MLPs of several model widths is no ratio, and stays.
        units: hidden units that it comes to, by path.
        origin: how the uncut model is built.
        sites: every MLP that is cut, by paths from the encoder.
    """
    first, ceiling = sites[0], width.is_of_the_model
    if all(units[site.path] == site.d_hidden for site in sites):
        return units, None
    if width.kind == "hidden_dim" and len({site.d_model for site in sites}) > 1:
        return units, None
    asked = units[first.path]
    if ceiling:
        asked = min(units[site.path] * first.d_model // site.d_model for site in sites)
    found = nearest_stock_width(origin, [site.below(origin.encoder) for site in sites], asked, at_most=ceiling)
    if found is None:
        return units, None
    near = dict(zip((site.path for site in sites), in_proportion(found, sites), strict=True))
    if near == units:
        return units, None
    note = (
        f"hidden width {_in_words(units)} became {_in_words(near)}, the nearest that {origin.library} can load; "
        "--exact rounds no width."
    )
    return near, note


def _in_words(units: Mapping[str, int]) -> str:
    """Return each width once, in the order of the MLPs."""
    return ", ".join(str(count) for count in dict.fromkeys(units.values()))
