"""Options of the command line are fields of a recipe: same values, and the same line of documentation."""

import dataclasses
from typing import get_type_hints

import pytest

from vitrim.catalog import field_docs
from vitrim.checked import Checked
from vitrim.cli.options import BudgetOptions, CutOptions, TrainOptions
from vitrim.config.options import (
    AdapterOptions,
    AllocateOptions,
    AtOnceOptions,
    BlockwiseOptions,
    CacheOptions,
    CalibrateOptions,
    ExitOptions,
    RecoverOptions,
    RepairOptions,
)
from vitrim.config.recipe import Recipe
from vitrim.config.steps import Step
from vitrim.methods import METHODS
from vitrim.methods.dgmr import Dgmr

OPTIONS = (
    AdapterOptions,
    AllocateOptions,
    AtOnceOptions,
    ExitOptions,
    BlockwiseOptions,
    CacheOptions,
    CalibrateOptions,
    Recipe,
    RecoverOptions,
    RepairOptions,
    Step,
)
BY_MODULE = [*OPTIONS, *METHODS.values()]


@pytest.mark.parametrize("owner", BY_MODULE, ids=lambda owner: owner.__name__)
def test_every_field_has_a_line_of_documentation_and_help_shows_it(owner: type[Checked]):
    described = {name: " ".join((field.description or "").split()) for name, field in owner.model_fields.items()}
    assert all(described.values()), described
    own = {name: described[name] for name in owner.__annotations__ if name in described}
    assert field_docs(owner.__module__.removeprefix("vitrim."), owner.__name__) == own


# How options of the command line that are spelled otherwise are called in a recipe.
SPELLED = {
    "recover_steps": (RecoverOptions, "steps"),
    "recover_epochs": (RecoverOptions, "epochs"),
    "allocate_cost": (AllocateOptions, "cost"),
    "allocate_depth": (AllocateOptions, "depth"),
    "refit": (RepairOptions, "refit"),
    "blockwise": (BlockwiseOptions, "train"),
    "at_once_steps": (AtOnceOptions, "steps"),
    "exit_steps": (ExitOptions, "steps"),
    "select_on": (Dgmr, "select_on"),
}
ELSEWHERE = {"recipe", "option", "effort"}  # a file, what a method takes, and a word for several fields
OTHER_FORM = {
    "method",
    "repair",
    "blockwise",
    "at_once_steps",
    "exit_steps",
}  # of these the help says something for itself


@pytest.mark.parametrize("options", [BudgetOptions, CutOptions, TrainOptions], ids=lambda kind: kind.__name__)
def test_an_option_is_a_field_of_the_recipe_with_its_values_and_help(options):
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        if field.name in ELSEWHERE:
            continue
        owners = [(kind, field.name) for kind in (Step, Recipe, RecoverOptions) if field.name in kind.model_fields]
        kind, name = SPELLED.get(field.name) or owners[0]
        described = " ".join((kind.model_fields[name].description or "").split())
        given, parameter = hints[field.name].__origin__, hints[field.name].__metadata__[0]
        assert parameter.help.startswith(described) or field.name in OTHER_FORM
        allowed = [part.__args__ for part in given.__args__ if getattr(part, "__args__", None)]
        for values in allowed if field.name not in ("allocate", "adapter") else ():
            annotation = kind.model_fields[name].annotation
            inner = [annotation, *getattr(annotation, "__args__", ())]
            assert values in [getattr(part, "__args__", None) for part in inner]
