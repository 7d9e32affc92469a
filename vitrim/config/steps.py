"""One step of a recipe: a method, how far it goes, and whether the closed-form repair follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from vitrim.checked import Checked
from vitrim.config.options import AllocateOptions, RepairOptions
from vitrim.config.widths import BUDGETS, BudgetKind, Width
from vitrim.methods import Method, find_method, make_method


class Step(Checked):
    """A method at work on what the steps before it have left."""

    method: str = "dgmr"
    """Name of a method, or one of the classes of `vitrim.methods` with its options."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method, by name."""
    params_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the encoder's parameters that stays; 0.5 where no budget is given."""
    macs_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the encoder's multiply-accumulates that stays."""
    mlp_ratio: float | None = Field(default=None, gt=0)
    """Hidden width as a multiple of the model width, as in timm (the DGMR paper's r)."""
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of each MLP's hidden units that stays."""
    hidden_dim: int | None = Field(default=None, ge=1)
    """Hidden units that stay in each MLP."""
    round_to: int = Field(default=16, ge=1)
    """Widths become multiples of this, where they are not smaller; `hidden_dim` and MLP ratio 1 stay as they are."""
    exact: bool = False
    """Keep widths as asked: neither multiples, nor the nearest that the model's own library can load."""
    widths: dict[str, int] | None = None
    """Widths of single MLPs, by path or the end of one; the budget holds for the others."""
    allocate: AllocateOptions | None = None
    """Find widths that differ from MLP to MLP, together no more expensive than equal ones."""
    repair: RepairOptions | bool | None = None
    """Closed-form repair after the cut: None for the method's own habit, False for none, True or options for it."""

    @model_validator(mode="before")
    @classmethod
    def _method_as_class(cls, given: Any) -> Any:
        """Take a method's name and options from an instance of its class."""
        if not isinstance(given, Mapping) or not isinstance(given.get("method"), Method):
            return given
        if given.get("options"):
            raise ValueError("method: has its options already; drop options")
        method = given["method"]
        return {**given, "method": method.name, "options": method.model_dump(exclude_unset=True)}

    @field_validator("allocate", mode="before")
    @classmethod
    def _allocate_by_name(cls, given: Any) -> Any:
        """Let `auto` stand for the defaults, `uniform` for equal widths."""
        return {"auto": {}, "uniform": None}.get(given, given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits_together(self) -> Step:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of {', '.join(BUDGETS)}, not {' and '.join(given)}")
        if self.widths is not None and self.allocate is not None:
            raise ValueError("allocate finds widths and widths gives them; drop one of the two")
        if self.make_method().takes == "nothing" and given:
            raise ValueError(f"{given[0]}: {self.method} goes by no budget; drop it")
        return self

    @property
    def budget(self) -> BudgetKind | None:
        """Which budget was given, None where none was."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    def width(self, *, default: tuple[BudgetKind, float] = ("params_ratio", 0.5)) -> Width:
        """Return how many hidden units of each MLP stay.

        Args:
            default: the budget where the step gives none.
        """
        kind = self.budget
        kind, value = default if kind is None else (kind, getattr(self, kind))
        return Width(kind=kind, value=value, round_to=self.round_to, exact=self.exact, own=self.widths or {})

    def make_method(self) -> Method:
        """Return the method with its options."""
        return make_method(self.method, self.options)

    def repair_options(self) -> RepairOptions | None:
        """Return the repair that follows: what was asked for, or the method's own habit."""
        if isinstance(self.repair, RepairOptions):
            return self.repair
        wanted = find_method(self.method).repairs if self.repair is None else self.repair
        return RepairOptions() if wanted else None
