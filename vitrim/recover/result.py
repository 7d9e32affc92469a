"""What a recovery reports: its result, and a value at each validation on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Recovery:
    """Result of a recovery.

    Attributes:
        curve: one point per validation: `step`, `relative_error` on held-out images, `loss` of the step (not at the
            start), and with several widths `mlp_ratio=R` for the error of each.
        lr: peak learning rate, given or found; lower after a divergence.
        best_step: step whose state the student ended with; 0 is the untrained start.
        best_error: relative error of that state.
        rate_test: error at the end of the short run at each learning rate, where no rate was given.
        num_steps: steps asked for.
        notes: sentences for the user.
        adapter: counts and sizes of the adapters, where there were any.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    lr: float = 0.0
    best_step: int = 0
    best_error: float = math.inf
    rate_test: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    notes: list[str] = field(default_factory=list)
    adapter: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One judgement of the student on held-out images, as `on_validation` callbacks get it.

    Attributes:
        step: steps done so far; 0 is the untrained start.
        num_steps: steps asked for.
        held_out_error: relative error of the state at this step.
        best_error: relative error of the best state so far, this one included.
        lr: learning rate of the last step; 0 before the first.
    """

    step: int
    num_steps: int
    held_out_error: float
    best_error: float
    lr: float
