"""What every method says of itself, how it is found and made, and what adding one takes."""

import json
import runpy
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import vitrim
from vitrim import methods
from vitrim.cli.app import run as run_command
from vitrim.config.recipe import Recipe
from vitrim.errors import RecipeError
from vitrim.methods import METHODS, Dgmr, ModelMethod, SiteMethod, find_method, make_method, register
from vitrim.surgery import KeepUnits

EVERY = pytest.mark.parametrize("method", METHODS)


@EVERY
def test_an_unknown_option_is_refused_and_the_known_ones_are_named(method):
    known = ", ".join(METHODS[method].model_fields) or "none"
    with pytest.raises(RecipeError, match=rf"^options\.selec of method {method}: .*; its options are {known}\.$"):
        Recipe.parse({"method": method, "options": {"selec": 1}})


@pytest.mark.parametrize(("method", "value"), [("dgmr", "gradients"), ("dgmr-paper", "outputs"), ("dgmr", 3)])
def test_an_option_value_that_is_not_allowed_is_refused(method, value):
    with pytest.raises(RecipeError, match=rf"^options\.select_on of method {method}: "):
        Recipe.parse({"method": method, "options": {"select_on": value}})


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown name 'dgrm'; did you mean 'dgmr'\?"):
        find_method("dgrm")
    with pytest.raises(RecipeError, match=r"use one of .*dgmr.*magnitude.*random"):
        find_method("zzz")


@EVERY
def test_a_method_says_where_it_comes_from(method):
    entry = METHODS[method]
    assert entry.name == method and entry.needs in ("weights", "images")
    assert len(entry.arxiv.split(".")) == 2 and entry.arxiv.replace(".", "").isdigit()
    assert entry.paper and entry.summary


@EVERY
def test_a_method_is_frozen_and_its_options_are_all_that_it_dumps(method):
    made = make_method(method, None)
    assert made.model_dump().keys() == METHODS[method].model_fields.keys()
    assert make_method(method, made.model_dump(mode="json")) == made
    for option in METHODS[method].model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, option, None)
    with pytest.raises(AttributeError, match="is a ClassVar"):
        made.name = "another"


@pytest.mark.parametrize("wrong", [{"select_on": "gradients"}, {"selec": 1}])
def test_a_constructor_refuses_as_a_recipe_does(wrong):
    with pytest.raises(RecipeError) as alone:
        Dgmr(**wrong)
    with pytest.raises(RecipeError) as read:
        Recipe.parse({"method": "dgmr", "options": wrong})
    assert str(alone.value) == str(read.value)


def test_a_number_that_is_none_is_refused():
    with pytest.raises(RecipeError, match=r"options\.delta of method amp: .*finite"):
        make_method("amp", {"delta": float("nan")})


def test_what_is_no_whole_method_is_not_registered():
    class Silent(ModelMethod):
        name = "silent"

        def propose(self, view):
            yield from ()

    with pytest.raises(TypeError, match="Silent: says nothing about paper, arxiv, summary, needs, takes; set it"):
        register(Silent)
    with pytest.raises(TypeError, match="is no method; derive it from SiteMethod or ModelMethod"):
        register(dict)
    with pytest.raises(TypeError, match="abstract"):
        SiteMethod()
    assert "silent" not in METHODS


def test_every_file_in_methods_is_imported_and_registers_a_method(tmp_path):
    files = method_files(Path(methods.__file__).parent)
    assert idle(files, METHODS.values()) == set()
    assert {entry.__name__ for entry in METHODS.values()} <= set(methods.__all__)
    for name in ("dgmr", "forgotten", "__init__", "registry"):
        (tmp_path / f"{name}.py").touch()
    assert idle(method_files(tmp_path), METHODS.values()) == {"forgotten"}  # the check sees what it should


THIRTEENTH = '''
"""Two methods that nobody has thought of, in a file that is no part of the package."""
from torch import arange
from vitrim.methods import ModelMethod, SiteMethod, register
from vitrim.surgery import TopKActivation

@register
class FirstUnits(SiteMethod):
    name, summary, needs = "first-units", "units as they come", "weights"
    paper, arxiv = "none", "0000.00000"

    offset: int = 0

    def select(self, view):
        return arange(view.num_keep) + self.offset

@register
class OneActive(ModelMethod):
    name, summary, needs, takes = "one-active", "one unit a token", "weights", "nothing"
    paper, arxiv, edits = "none", "0000.00000", (TopKActivation,)

    def propose(self, view):
        for site in view.sites:
            yield TopKActivation(site=site, num_active=1)
'''


def test_a_thirteenth_method_needs_no_edit_of_the_package(tmp_path, monkeypatch, capsys):
    names = ("first-units", "one-active")
    for name in names:
        monkeypatch.setitem(METHODS, name, None)  # taken out again after the test
    (tmp_path / "thirteenth.py").write_text(THIRTEENTH)
    runpy.run_path(str(tmp_path / "thirteenth.py"))
    values = {"method": "first-units", "options": {"offset": 3}, "keep_ratio": 0.5}
    few = {"num_images": 16}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"calibrate": few, "steps": [values, {"method": "one-active"}]}))
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="its options are offset"):
        Recipe.parse({"method": "first-units", "options": {"offst": 3}})
    digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    found = vitrim.compress(digits, data="digits", recipe=recipe, out=tmp_path / "out", quiet=True)
    assert found.plan.method == "first-units+one-active" and found.metrics.reload_difference <= 1e-6
    cuts = [edit for edit in found.plan.edits if isinstance(edit, KeepUnits)]
    assert cuts and all(edit.keep == tuple(range(3, 3 + edit.width)) for edit in cuts)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vitrim.load(tmp_path / "out")(images), found.model(images))
    assert run_command(["methods", "--json"]) == 0
    listed = {row["name"]: row["edit"] for row in json.loads(capsys.readouterr().out)}
    assert {name: listed[name] for name in names} == {"first-units": "keep units", "one-active": "top k"}


def method_files(folder):
    """The files of a folder that ought to hold a method."""
    return {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}


def idle(files, entries):
    """Those files in which none of the registered methods was defined."""
    return files - {entry.__module__.rpartition(".")[2] for entry in entries}
