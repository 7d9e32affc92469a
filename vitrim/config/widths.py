"""How many hidden units each MLP keeps, as a value that can be asked for each MLP.

Budgets of a whole model (`params_ratio`, `macs_ratio`) can't be answered here, since they depend on all MLPs together;
`compression.budget` solves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from vitrim.errors import BudgetError
from vitrim.types import MlpSite

BudgetKind = Literal["params_ratio", "macs_ratio", "mlp_ratio", "keep_ratio", "hidden_dim"]
BUDGETS: tuple[BudgetKind, ...] = get_args(BudgetKind)
OF_THE_MODEL = ("params_ratio", "macs_ratio")


@dataclass(frozen=True, kw_only=True)
class Width:
    """A budget and how it is rounded; `own` sets the width of single MLPs, by path or its end."""

    kind: BudgetKind
    value: float
    round_to: int = 16
    exact: bool = False
    own: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_of_the_model(self) -> bool:
        """Whether the budget is for the whole model, so that it has no answer for one MLP alone."""
        return self.kind in OF_THE_MODEL

    def of(self, site: MlpSite) -> int:
        """Return how many hidden units of an uncut MLP stay.

        Raises:
            BudgetError: the number is below 1 or above the MLP's units, or the budget is for the whole model.
        """
        own = [path for path in self.own if is_end(path, site.path)]
        kind, value = ("widths", self.own[max(own, key=len)]) if own else (self.kind, self.value)
        if kind in ("widths", "hidden_dim"):
            wanted = int(value)
        elif kind == "keep_ratio":
            wanted = self.rounded(value * site.d_hidden, site.d_hidden)
        elif kind == "mlp_ratio":
            units = value * site.d_model
            # As in timm; a ratio of 1 asks for exactly the model width, even if that is no multiple of `round_to`.
            wanted = int(units) if self.exact or units == site.d_model else self.rounded(units, site.d_hidden)
        else:
            raise BudgetError(f"{kind}: is a budget of the whole model; give mlp_ratio, keep_ratio or hidden_dim here.")
        if not 1 <= wanted <= site.d_hidden:
            raise BudgetError(
                f"{site.path}: {kind}={value:g} asks to keep {wanted} of {site.d_hidden} units; use 1..{site.d_hidden}."
            )
        return wanted

    def rounded(self, units: float, full: int) -> int:
        """Round to the nearest multiple of `round_to`; not if `exact`, at full width, or below one multiple."""
        if round(units) >= full or self.exact or units < self.round_to:
            return round(units)
        return min(full, round(units / self.round_to) * self.round_to)

    def check(self, sites: Sequence[MlpSite]) -> None:
        """Refuse widths in `own` that match no MLP.

        Raises:
            BudgetError: no MLP of the model has such a path.
        """
        for path in self.own:
            if not any(is_end(path, site.path) for site in sites):
                raise BudgetError(f"widths: no MLP {path!r}; there are {', '.join(site.path for site in sites)}.")


def is_end(one: str, other: str) -> bool:
    """Return whether either dotted path is the end of the other: paths inside an encoder lack its prefix."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
