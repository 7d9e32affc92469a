"""What a recovery reports: its result, and a value at each validation on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Recovery:
    """Result of a recovery.

    Attributes:
        curve: one point per validation: `step`, `relative_error` on held-out images (the mean loss there, where labels
            train), `loss` of the step (not at the start), and with several widths `mlp_ratio=R` for the error of each.
        optimizer: what took the steps: `relative`, whose rate is a share of each weight's norm, `adamw` or `sgd`.
        lr: peak learning rate, given or found; lower after a divergence or a restart.
        best_step: step whose state the student ended with; 0 is the untrained start.
        best_error: relative error of that state.
        rate_test: error at the end of the short run at each learning rate, where no rate was given.
        num_steps: steps asked for.
        num_test_steps: steps of the range test, in addition to those.
        num_images: images that all steps saw, those of the range test and repeated ones included.
        seconds: time that it took.
        restarts: steps at which it went back to its best state, with a lower rate and a schedule for the steps left.
        ended_at: step at which it ended early, because restarts gained nothing either or gains had stopped; else None.
        notes: sentences for the user.
        adapter: counts and sizes of the adapters, where there were any.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    optimizer: str = "adamw"
    lr: float = 0.0
    best_step: int = 0
    best_error: float = math.inf
    rate_test: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    num_test_steps: int = 0
    num_images: int = 0
    seconds: float = 0.0
    restarts: list[int] = field(default_factory=list)
    ended_at: int | None = None
    notes: list[str] = field(default_factory=list)
    adapter: dict[str, Any] | None = None

    @property
    def improved(self) -> bool:
        """Whether the state that was kept is closer to the original than the untrained start."""
        return self.best_step > 0 and self.best_error < self.curve[0]["relative_error"]

    def verdict(self, num_held_out: int, name: str = "recovery") -> list[str]:
        """Return a sentence on a recovery that did not end better than it started, with what it cost; else nothing.

        Args:
            num_held_out: number of images behind the errors.
            name: what it is called.
        """
        start, end = self.curve[0]["relative_error"], self.curve[-1]["relative_error"]
        if self.improved and end < start:
            return []
        what = "did not improve on the cut, which was kept" if not self.improved else "got worse again"
        kept = f" The state of step {self.best_step} was kept ({self.best_error:.4g})." if self.improved else ""
        of_width = ""
        if widths := [
            key for key in self.curve[0] if key.startswith("mlp_ratio=")
        ]:  # judged by the one that fares worst
            worst = max(widths, key=lambda key: self.curve[-1][key] / max(self.curve[0][key], 1e-12))
            start, end, of_width = self.curve[0][worst], self.curve[-1][worst], f" of {worst}"
        errors = f"error{of_width} {start:.4g} at the start and {end:.4g} at step {self.curve[-1]['step']}"
        return [f"{name} {what}: {errors}, on {num_held_out:,} held-out images.{kept} It took {self.cost()}."]

    def cost(self) -> str:
        """Return what the recovery cost, in words."""
        tests = f" and {self.num_test_steps:,} of the range test" if self.num_test_steps else ""
        return (
            f"{self.ended_at or self.num_steps:,} steps{tests}, {self.num_images:,} images seen, {self.seconds:.0f} s"
        )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One judgement of the student on held-out images, as `on_validation` callbacks get it.

    Attributes:
        step: steps done so far; 0 is the untrained start.
        num_steps: steps asked for.
        num_test_steps: steps of the range test, in addition to those.
        num_images: images that all steps saw, those of the range test and repeated ones included.
        seconds: time that it took.
        held_out_error: relative error of the state at this step.
        best_error: relative error of the best state so far, this one included.
        lr: learning rate of the last step; 0 before the first.
    """

    step: int
    num_steps: int
    held_out_error: float
    best_error: float
    lr: float
