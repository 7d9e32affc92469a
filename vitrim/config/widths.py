"""How many hidden units each MLP keeps, as a value that can be asked MLP by MLP.

Budgets of a whole model (`params_ratio`, `macs_ratio`) can't be answered here, since they depend on all of it;
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
    """A budget and how it is rounded; `own` gives MLPs a width of their own, by path or the end of one."""

    kind: BudgetKind
    value: float
    round_to: int = 16
    exact: bool = False
    own: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_of_the_model(self) -> bool:
        """Whether the budget is one of the whole model, so that no MLP can be answered alone."""
        return self.kind in OF_THE_MODEL

    def of(self, site: MlpSite) -> int:
        """Return how many hidden units of an uncut MLP stay.

        Raises:
            BudgetError: fewer than 1, or more than there are.
        """
        own = [path for path in self.own if is_end(path, site.path)]
        kind, value = ("widths", self.own[max(own, key=len)]) if own else (self.kind, self.value)
        if kind in ("widths", "hidden_dim"):
            wanted = int(value)
        elif kind == "keep_ratio":
            wanted = self.rounded(value * site.d_hidden, site.d_hidden)
        elif kind == "mlp_ratio":
            units = value * site.d_model
            # As timm has it; and a ratio of 1 asks for exactly the model width, whatever multiple that is.
            wanted = int(units) if self.exact or units == site.d_model else self.rounded(units, site.d_hidden)
        else:
            raise BudgetError(f"{kind}: is a budget of the whole model; give mlp_ratio, keep_ratio or hidden_dim here.")
        if not 1 <= wanted <= site.d_hidden:
            raise BudgetError(
                f"{site.path}: {kind}={value:g} asks to keep {wanted} of {site.d_hidden} units; use 1..{site.d_hidden}."
            )
        return wanted

    def rounded(self, units: float, full: int) -> int:
        """Round to the nearest multiple of `round_to`, unless that is none; `exact` and the full width stay."""
        if round(units) >= full or self.exact or units < self.round_to:
            return round(units)
        return min(full, round(units / self.round_to) * self.round_to)

    def check(self, sites: Sequence[MlpSite]) -> None:
        """Refuse a width of its own for an MLP that is not there.

        Raises:
            BudgetError: no MLP of the model has such a path.
        """
        for path in self.own:
            if not any(is_end(path, site.path) for site in sites):
                raise BudgetError(f"widths: no MLP {path!r}; there are {', '.join(site.path for site in sites)}.")


def is_end(one: str, other: str) -> bool:
    """Return whether one of two dotted paths is the end of the other: inside an encoder paths start later."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
