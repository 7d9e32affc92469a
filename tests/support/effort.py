"""Defaults that are quick: what a test leaves at its default is done with little, and what it names as it says.

Most of the time of a cut is its refit, and what tests are about does not depend on how good that is. Tests marked
`defaults` have those that users have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from vitrim.config.options import CalibrateOptions, RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.config.steps import Step
from vitrim.methods import METHODS

QUICK: list[tuple[type[BaseModel], str, Any]] = [
    (RepairOptions, "refit_steps", 10),
    (CalibrateOptions, "num_images", 400),
    (METHODS["lora-prune"], "steps", 10),  # type: ignore[list-item]
]
USERS = [(kind, name, kind.model_fields[name].default) for kind, name, _ in QUICK]


def quick_by_default(**others: Any) -> None:
    """From here on, for the whole process; `others` by name in place of those above."""
    _set([(kind, name, others.get(name, value)) for kind, name, value in QUICK])


@contextmanager
def defaults_of_users() -> Iterator[None]:
    """Restore the defaults that users have inside a `with` block."""
    _set(USERS)
    try:
        yield
    finally:
        _set(QUICK)


def _set(values: list[tuple[type[BaseModel], str, Any]]) -> None:
    for kind, name, value in values:
        kind.model_fields[name].default = value
        kind.model_rebuild(force=True)
    Recipe.model_fields["calibrate"].default = CalibrateOptions()
    for kind in (Step, Recipe):
        kind.model_rebuild(force=True)
