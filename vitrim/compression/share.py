"""Finds, by trial, the share at which a method leaves a model at a given size.

For a method that does not cut hidden units, the saving can't be computed from the share: ranks are rounded, and experts
come in steps. So cuts are tried on a few images, between shares that are known to be too large and too small.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs, model_size
from vitrim.errors import BudgetError
from vitrim.methods import SiteMethod, find_method
from vitrim.surgery import KeepUnits, apply_
from vitrim.types import MlpSite

Counted = Literal["params", "macs", "bytes"]
SMALLEST, TOLERANCE, MAX_TRIALS = 0.05, 0.01, 6  # a keep_ratio, a share of the model, a number of cuts
NUM_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a cut left of a model, as shares; `repairable` if our repair can follow."""

    shares: Mapping[Counted, float]
    repairable: bool

    def largest(self, counted: Sequence[Counted]) -> float:
        """Return the largest share of several."""
        return max(self.shares[each] for each in counted)


@dataclass(kw_only=True)
class Trials:
    """Trial cuts of one model on a few images; `tried` stores their results by method and share."""

    teacher: nn.Module
    sites: Sequence[MlpSite]
    images_BCHW: Tensor
    base: Recipe
    tried: dict[tuple[str, float], Trial] = field(default_factory=dict)

    def meet(self, name: str, counted: Sequence[Counted], budget: float) -> float | None:
        """Return the largest keep_ratio found that stays within the budget, or None if no share saves that much.

        Args:
            name: name of the method.
            counted: what the budget counts; if it is several things, each has to stay within it.
            budget: share of the model that may stay.
        """
        smallest = self.smallest(name)
        low, high = (smallest, self.at(name, smallest).largest(counted)), (1.0, 1.0)
        if low[1] > budget:
            return None
        for number in range(MAX_TRIALS):
            if low[1] >= budget - TOLERANCE:
                break
            slope = (high[0] - low[0]) / max(high[1] - low[1], 1e-9)
            straight = low[0] + slope * (budget - TOLERANCE / 2 - low[1])
            # If sizes come in steps, such as experts, interpolation may get stuck: every other trial bisects instead.
            ratio = (low[0] + high[0]) / 2 if number % 2 else straight
            share = self.at(name, ratio).largest(counted)
            low, high = (low, (ratio, share)) if share > budget else ((ratio, share), high)
        return low[0]

    def smallest(self, name: str) -> float:
        """Return the smallest keep_ratio, in twentieths, at which a method can cut the model at all.

        Raises:
            BudgetError: it can't at any.
        """
        refused: list[BudgetError] = []
        for number in range(1, round(1 / SMALLEST)):
            try:
                self.at(name, number * SMALLEST)
                return number * SMALLEST
            except BudgetError as error:  # such as more blocks than one stage has
                refused.append(error)
        raise refused[-1]

    def at(self, name: str, keep_ratio: float) -> Trial:
        """Return the result of a trial cut; for a method that cuts each MLP by itself, only the widths matter."""
        if (name, keep_ratio) not in self.tried:
            self.tried[name, keep_ratio] = self._try(name, keep_ratio)
        return self.tried[name, keep_ratio]

    def _try(self, name: str, keep_ratio: float) -> Trial:
        student = copy.deepcopy(self.teacher)
        quick = find_method(name).trial_options
        budget = {} if find_method(name).takes == "nothing" else {"keep_ratio": keep_ratio}
        recipe = self.base.updated({"method": name, "repair": False, **budget, **({"options": quick} if quick else {})})
        method = recipe.steps[0].make_method()
        if isinstance(method, SiteMethod) and method.cuts() == "mlp":
            width = recipe.width()
            edits = [KeepUnits.first(site, width.of(site)) for site in self.sites]
            apply_(student, edits)
        else:
            edits = cut_(student, self.teacher, self.sites, recipe, [self.images_BCHW], quiet=True).plan.edits
        one, small, whole = self.images_BCHW[:1], model_size(student), model_size(self.teacher)
        shares: dict[Counted, float] = {
            "params": small["num_parameters"] / whole["num_parameters"],
            "bytes": small["num_bytes"] / whole["num_bytes"],
            "macs": count_macs(student, one) / count_macs(self.teacher, one),
        }
        bare = any(isinstance(edit, KeepUnits) and not edit.tensors for edit in edits)
        return Trial(shares=shares, repairable=bare or find_method(name).folds)


def find_share(recipe: Recipe, teacher: nn.Module, sites: Sequence[MlpSite], inputs: Tensor | None) -> float:
    """Return the keep_ratio with which the first step of a recipe meets its budget.

    Args:
        recipe: a recipe with a budget for the whole model.
        teacher: the uncut encoder, in eval mode.
        sites: its MLPs.
        inputs: a few images.

    Raises:
        BudgetError: the method can't save that much, or there are no inputs to try it on.
    """
    step, width = recipe.steps[0], recipe.width()
    if inputs is None:
        raise BudgetError(f"{width.kind}: {step.method} is tried on images to meet it; pass data, or give keep_ratio.")
    untrained = dict.fromkeys(("recover", "blockwise", "at_once", "exits"))
    alone = recipe.model_copy(update={"steps": (step,), **untrained})
    trials = Trials(teacher=teacher, sites=sites, images_BCHW=inputs[:NUM_IMAGES], base=alone)
    counted: Counted = "params" if width.kind == "params_ratio" else "macs"
    found = trials.meet(step.method, [counted], width.value)
    if found is None:
        least = trials.at(step.method, trials.smallest(step.method)).shares[counted]
        least = math.ceil(least * 1000) / 1000  # rounded up, so that it can be met
        other = "macs_ratio" if counted == "params" else "params_ratio"
        advice = f"use {least:g}..1" if least < 1 else f"give keep_ratio or {other}, or use another method"
        raise BudgetError(f"{width.kind}={width.value:g}: {step.method} leaves {least:g} at least; {advice}.")
    return found
