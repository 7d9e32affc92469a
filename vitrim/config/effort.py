"""How much work a run spends on what it keeps, in a word that is written out into the keys of a recipe.

`fast` is the closed form alone. `default` refits each MLP. `max` refits twice as long, and then trains all blocks at
once. What a recipe says itself wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from vitrim.config.steps import Step

Effort = Literal["fast", "default", "max"]
EFFORT = "effort"
# Of a step's repair, and of the recipe.
REPAIR: Mapping[str, Mapping[str, Any]] = {"fast": {"refit": False}, "default": {}, "max": {"refit_steps": 600}}
RECIPE: Mapping[str, Mapping[str, Any]] = {"fast": {}, "default": {}, "max": {"at_once": {}}}


def with_effort(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's keys with the effort, if one is given, written out.

    Raises:
        ValueError: there is no such effort.
    """
    found = dict(given)
    effort = found.pop(EFFORT, None)
    if effort is None:
        return found
    if effort not in get_args(Effort):
        raise ValueError(f"effort: {effort!r} is none of {', '.join(get_args(Effort))}")
    found["steps"] = [_step(step, REPAIR[effort]) for step in found.get("steps", [{}])]
    return {**RECIPE[effort], **found}


def _step(given: Step | Mapping[str, Any], repair: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's keys with the options of its repair, where it has one, unless it says otherwise."""
    step = Step.model_validate(given)
    if step.repair_options() is None:
        return step.model_dump(exclude_unset=True)
    own = step.repair.model_dump(exclude_unset=True) if step.repair and step.repair is not True else {}
    return {**step.model_dump(exclude_unset=True), "repair": {**repair, **own}}
