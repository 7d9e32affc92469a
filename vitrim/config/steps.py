"""One step of a recipe: a method, how much it cuts, and whether the closed-form repair follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from vitrim.checked import Checked
from vitrim.config.options import AllocateOptions, RepairOptions
from vitrim.config.widths import BUDGETS, BudgetKind, Width
from vitrim.methods import Method, SiteMethod, find_method, make_method


class Step(Checked):
    """A method applied to the result of the steps before it."""

    method: str = "dgmr"
    """Name of a method; in Python also an instance of a class in `vitrim.methods`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the method, by name."""
    params_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the encoder's parameters to keep; 0.5 if no budget is given."""
    macs_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the encoder's multiply-accumulates to keep."""
    mlp_ratio: float | None = Field(default=None, gt=0)
    """Hidden width to keep, as a multiple of the model width, as in timm (the DGMR paper's r)."""
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of each MLP's hidden units to keep."""
    hidden_dim: int | None = Field(default=None, ge=1)
    """Number of hidden units to keep in each MLP."""
    round_to: int = Field(default=16, ge=1)
    """Round widths to multiples of this, unless they are smaller; `hidden_dim` and an MLP ratio of 1 stay exact."""
    exact: bool = False
    """Keep widths exactly as asked: don't round, not even to widths that the model's own library can load."""
    widths: dict[str, int] | None = None
    """Widths of single MLPs, by path or its end; the budget applies to the others."""
    allocate: AllocateOptions | None = None
    """Find widths that differ between MLPs but cost no more in total than equal ones."""
    repair: RepairOptions | bool | None = None
    """Closed-form repair after the cut: True or options for yes, False for no, None for the method's default."""

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
        """Turn `auto` into the default options and `uniform` into equal widths."""
        return {"auto": {}, "uniform": None}.get(given, given) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits_together(self) -> Step:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give exactly one of {', '.join(BUDGETS)}, not {' and '.join(given)}")
        if self.widths is not None and self.allocate is not None:
            raise ValueError("allocate finds widths and widths gives them; drop one of the two")
        method = self.make_method()
        if method.takes == "nothing" and given:
            raise ValueError(f"{given[0]}: {self.method} goes by no budget; drop it")
        if method.goes_by() == "nothing" and given:
            raise ValueError(
                f"{given[0]}: options of {self.method} say already how much stays ({', '.join(self.options)}); drop it "
                "or those"
            )
        if self.allocate is not None and not isinstance(method, SiteMethod):
            raise ValueError(f"allocate: {self.method} decides about the whole model by itself; use allocate=uniform")
        if senseless := [name for name in method.senseless if getattr(self, name) is not None]:
            sizes = [name for name in ("keep_ratio", "params_ratio", "macs_ratio") if name not in method.senseless]
            raise ValueError(f"{senseless[0]}: says nothing about what {self.method} cuts; give {' or '.join(sizes)}")
        return self

    @property
    def budget(self) -> BudgetKind | None:
        """Name of the budget that was given, or None if there was none."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    @property
    def has_default_budget(self) -> bool:
        """Whether the default budget applies: none was given, and the method goes by one."""
        return self.budget is None and self.make_method().goes_by() != "nothing"

    def width(self, *, default: tuple[BudgetKind, float] = ("params_ratio", 0.5)) -> Width:
        """Return how many hidden units of each MLP stay.

        Args:
            default: the budget to use if the step gives none.
        """
        kind = self.budget
        kind, value = default if kind is None else (kind, getattr(self, kind))
        return Width(kind=kind, value=value, round_to=self.round_to, exact=self.exact, own=self.widths or {})

    def make_method(self) -> Method:
        """Return the method with its options."""
        return make_method(self.method, self.options)

    def repair_options(self) -> RepairOptions | None:
        """Return the repair that follows, as asked for or by the method's default; None for no repair."""
        if isinstance(self.repair, RepairOptions):
            return self.repair
        wanted = find_method(self.method).repairs if self.repair is None else self.repair
        return RepairOptions() if wanted else None
