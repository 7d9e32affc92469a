"""How much work a run spends on what it keeps, in a word that is written out into the keys of a recipe.

`fast` is the closed form alone. `default` refits each MLP. `max` refits twice as long, and then trains all blocks at
once. What a recipe says itself wins; an effort that is put on top of a recipe wins over what another wrote into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from vitrim.config.options import AtOnceOptions, RepairOptions
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


def without_effort(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's keys without those that hold what some effort would have written, or a default.

    So a recipe that was written out by one effort, in full even, can take another. Values that no effort writes stay.
    """
    found = {key: value for key, value in given.items() if not (key in RECIPE["max"] and _is_written(value))}
    return {**found, "steps": [_step_without(step) for step in found.get("steps", [{}])]}


def _is_written(at_once: Any) -> bool:
    """Return whether an effort may have written this value of `at_once`."""
    return at_once is None or AtOnceOptions.model_validate(at_once) == AtOnceOptions()


def _step_without(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's keys without what efforts write into its repair."""
    repair, defaults = given.get("repair"), RepairOptions().model_dump()
    if not isinstance(repair, Mapping):
        return dict(given)
    written = {(key, value) for keys in REPAIR.values() for key, value in keys.items()}
    written |= {(key, defaults[key]) for key, _ in written}
    return {**given, "repair": {key: value for key, value in repair.items() if (key, value) not in written}}


def _step(given: Step | Mapping[str, Any], repair: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's keys with the options of its repair, where it has one, unless it says otherwise."""
    step = Step.model_validate(given)
    if step.repair_options() is None:
        return step.model_dump(exclude_unset=True)
    own = step.repair.model_dump(exclude_unset=True) if step.repair and step.repair is not True else {}
    return {**step.model_dump(exclude_unset=True), "repair": {**repair, **own}}
