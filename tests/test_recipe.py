"""Recipes: what a constructor refuses and how it helps, and what wins where a recipe and arguments say different."""

import json

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import vitrim
from tests.support.digits import DIGITS, few
from vitrim.checked import NOT_GIVEN
from vitrim.compression import pipeline
from vitrim.config.options import RecoverOptions, RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.config.steps import Step
from vitrim.config.widths import BUDGETS
from vitrim.errors import RecipeError
from vitrim.methods import Dgmr, Magnitude

IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked(monkeypatch):
    """The recipe and the data that `compress` ends up with for its arguments; nothing is opened or cut."""

    class Stop(Exception):
        pass

    def stop(model, recipe, data, *, out):
        raise Stop(recipe, data)

    def asked(**arguments):
        with pytest.raises(Stop) as caught:
            vitrim.compress(DIGITS, **arguments)
        return caught.value.args

    monkeypatch.setattr(pipeline, "open_job", stop)
    return asked


# What is given wins over the recipe


FULL = {
    "data": "photos",
    "method": "magnitude",
    "params_ratio": 0.4,
    "repair": {"ridge": 0.1},
    "round_to": 8,
    "exact": True,
    "recover": {"steps": 9, "lr": 1e-3},
    "seed": 3,
    "device": "cpu",
    "scope": "blocks.1",
}


@pytest.mark.parametrize(
    "given",
    [
        {"method": "dgmr"},
        {"seed": 0},
        {"device": "auto"},
        {"exact": False},
        {"round_to": 16},
        {"recover": None},
        {"scope": None},
        {"repair": None},
        {"repair": False},
        {"params_ratio": 0.5},
    ],
    ids=str,
)
def test_an_argument_wins_over_the_recipe_also_where_it_equals_a_default(asked, given):
    (name, value), *_ = given.items()
    recipe, data = asked(recipe=FULL, **given)
    holder = recipe.steps[0] if name in Step.model_fields else recipe
    assert getattr(holder, name) == value
    before, _ = asked(recipe=FULL)
    rest = {"options"} | ({"repair"} if name == "method" else set())
    for place, other in ((recipe, before), (recipe.steps[0], before.steps[0])):
        kept = set(type(place).model_fields) - {name, "steps", "model"} - rest
        assert {key: getattr(place, key) for key in kept} == {key: getattr(other, key) for key in kept}
    assert data == "photos"


def test_no_data_and_other_data_win_over_those_of_the_recipe(asked):
    assert asked(recipe=FULL)[1] == "photos"
    recipe, data = asked(recipe=FULL, data=None)
    assert data is None and recipe.data is None
    recipe, data = asked(recipe=FULL, data=IMAGES)
    assert data is IMAGES and recipe.data == "<Tensor>"


def test_what_is_not_given_comes_from_the_recipe(asked):
    recipe, _ = asked(recipe=FULL)
    expected = Recipe.parse({**FULL, "model": DIGITS})
    assert recipe == expected and asked(recipe=expected)[0] == expected
    assert asked(recipe=FULL, method=NOT_GIVEN, seed=NOT_GIVEN, recover=NOT_GIVEN)[0] == expected


@given(st.sampled_from(BUDGETS), st.sampled_from(BUDGETS))
@settings(deadline=None)
def test_a_budget_replaces_whatever_budget_was_there(old, new):
    values = dict.fromkeys(BUDGETS, 0.25) | {"hidden_dim": 7}
    step = Recipe.parse({old: 1 if old == "hidden_dim" else 0.75}).updated({new: values[new]}).steps[0]
    assert step.budget == new and getattr(step, new) == values[new]
    assert [name for name in BUDGETS if getattr(step, name) is not None] == [new]


def test_a_new_method_drops_the_options_of_the_old_one_and_a_new_length_the_old_length(asked):
    base = {"method": "dgmr", "options": {"select_on": "weights"}, "recover": {"steps": 9, "lr": 1e-3}}
    recipe, _ = asked(recipe=base, method="corp", recover_epochs=2)
    assert recipe.steps[0].options == {} and (recipe.recover.steps, recipe.recover.epochs) == (None, 2)
    assert recipe.recover.lr == 1e-3
    same, _ = asked(recipe=base, method="dgmr")
    assert same.steps[0].options == {"select_on": "weights"}
    merged, _ = asked(recipe=base, recover={"lr": 1e-4})
    assert (merged.recover.steps, merged.recover.lr) == (9, 1e-4)


def test_a_length_beside_the_options_of_recovery(asked):
    for options in ({"steps": 9, "lr": 1e-3}, RecoverOptions(steps=9, lr=1e-3)):
        recipe, _ = asked(recover=options, recover_epochs=0.5)
        assert recipe.recover == RecoverOptions(epochs=0.5, lr=1e-3)
    assert asked(recover_steps=4)[0].recover == RecoverOptions(steps=4)
    with pytest.raises(RecipeError, match="recover_steps: recover=None asks for no distillation"):
        vitrim.compress(DIGITS, recover=None, recover_steps=4)


def test_a_seed_that_equals_the_default_makes_the_run_of_that_seed():
    """The whole way: a recipe's seed used to win over seed=0."""
    plans = {}
    for name, values in (("recipe", {}), ("zero", {"seed": 0}), ("three", {"seed": 3})):
        found = vitrim.compress(DIGITS, recipe=few(method="random", seed=3, repair=False), quiet=True, **values)
        plans[name] = found.plan.sha256
    plain = vitrim.compress(DIGITS, recipe=few(method="random", repair=False), quiet=True)
    assert plans["recipe"] == plans["three"] != plans["zero"] == plain.plan.sha256


# A recipe in every form


def test_a_recipe_is_taken_as_a_value_a_mapping_and_a_path(asked, tmp_path):
    value = Recipe.parse(FULL)
    (tmp_path / "a.yaml").write_text(value.dump())
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(FULL))
    forms = (value, FULL, value.model_dump(), tmp_path / "a.yaml", str(tmp_path / "b.yaml"))
    assert len({asked(recipe=form)[0].dump() for form in forms}) == 1


def test_one_step_is_written_flat_or_as_a_step(asked):
    flat = Recipe(method="magnitude", mlp_ratio=1, repair=True)
    assert flat == Recipe(steps=(Step(method="magnitude", mlp_ratio=1, repair=True),))
    assert flat.steps[0].repair is True and flat.steps[0].repair_options() == RepairOptions()
    assert Recipe() == Recipe(steps=(Step(),)) == Recipe.of(None) == Recipe.of({})
    with pytest.raises(RecipeError, match="mlp_ratio: belongs to a step; put it into one of steps, or drop steps"):
        Recipe(steps=[{"method": "magnitude"}], mlp_ratio=1)
    with pytest.raises(RecipeError, match=r"steps: .*at least 1"):
        Recipe(steps=[])


def test_a_method_is_given_by_name_or_as_a_value(asked):
    by_value, _ = asked(method=Dgmr(select_on="weights"))
    by_name, _ = asked(method="dgmr", options={"select_on": "weights"})
    assert by_value == by_name and by_value.steps[0].make_method() == Dgmr(select_on="weights")
    assert Recipe(method=Magnitude()) == Recipe(method="magnitude")
    assert json.loads(json.dumps(by_value.model_dump(mode="json")))["steps"][0]["method"] == "dgmr"
    with pytest.raises(RecipeError, match="method: has its options already; drop options"):
        Recipe(method=Dgmr(), options={"select_on": "weights"})


@given(
    st.sampled_from(["dgmr", "magnitude", "random"]),
    st.sampled_from([{}, {"mlp_ratio": 1.5}, {"hidden_dim": 24}, {"macs_ratio": 0.5}, {"keep_ratio": 0.25}]),
    st.sampled_from([None, True, False, {"ridge": 0.5}]),
    st.booleans(),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=40)
def test_what_is_dumped_is_loaded_as_it_was(tmp_path_factory, method, budget, repair, exact, num_steps):
    step = {"method": method, "repair": repair, "exact": exact, **budget}
    recipe = Recipe.parse({"steps": [step] * num_steps, "seed": num_steps})
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(recipe.dump())
    assert Recipe.load(file) == recipe and Recipe.load(file).dump() == recipe.dump()


# What a constructor refuses


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "nope"}, "method: unknown name 'nope'; use one of .*dgmr"),
        ({"method": "dgrm"}, r"method: unknown name 'dgrm'; did you mean 'dgmr'\?"),
        ({"options": {"typo": 1}}, r"options\.typo of method dgmr: .*; its options are .*select_on"),
        ({"widht_ratio": 1}, "unknown key 'widht_ratio'; "),
        ({"mlp_ration": 1}, r"unknown key 'mlp_ration'; did you mean 'mlp_ratio'\?"),
        ({"width": 8}, r"unknown key 'width'; did you mean 'widths'\?"),
        ({"stock": True}, "unknown key 'stock'; "),
        ({"then": []}, "unknown key 'then'; "),
        ({"repair": {"rigde": 1}}, r"unknown key 'repair\.rigde'; did you mean 'repair\.ridge'\?"),
        ({"recover": {"steps": 1, "stepz": 1}}, r"unknown key 'recover\.stepz'; did you mean 'recover\.steps'\?"),
        ({"steps": [{}, {"methd": "dgmr"}]}, r"unknown key 'steps\.1\.methd'; did you mean 'method'\?"),
        ({"seed": -1}, r"seed: .*\(got -1\)"),
        ({"params_ratio": float("nan")}, "params_ratio: "),
        ({"params_ratio": 1.5}, r"params_ratio: .*less than or equal to 1 \(got 1\.5\)"),
        ({"params_ratio": 0.5, "keep_ratio": 0.5}, "give exactly one of .*, not params_ratio and keep_ratio"),
        ({"method": "int8", "keep_ratio": 0.5}, "keep_ratio: int8 goes by no budget; drop it"),
    ],
    ids=str,
)
def test_a_constructor_refuses_in_one_line_and_names_what_was_meant(values, words):
    for make in (lambda: Recipe(**values), lambda: Recipe.parse(values), lambda: Recipe().updated(values)):
        with pytest.raises(RecipeError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)
    with pytest.raises(RecipeError, match=words):
        vitrim.compress(DIGITS, recipe=values, quiet=True)


@pytest.mark.parametrize("part", [Step, RepairOptions, RecoverOptions], ids=lambda part: part.__name__)
def test_its_parts_refuse_by_themselves_too(part):
    with pytest.raises(RecipeError, match=f"^{part.__name__}: unknown key 'nonsense'; known: "):
        part(nonsense=1)


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().seed = 1


def test_a_file_that_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RecipeError, match=r"list\.yaml: holds list; a recipe is a mapping of keys to values"):
        Recipe.load(tmp_path / "list.yaml")
    with pytest.raises(RecipeError, match="can't be read"):
        vitrim.compress(DIGITS, recipe=tmp_path / "none.yaml", quiet=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": ["dgmr"]}, "recipe: Input should be a valid dictionary or instance of Step"),
        ({"params_ratio": True}, "params_ratio: give a number"),
        ({"hidden_dim": True}, "hidden_dim: give a number"),
        ({"seed": 2**70}, "seed: Input should be less than 4294967296"),
        (5, "recipe: is int; pass a Recipe, a mapping, or the path of a YAML file"),
    ],
    ids=str,
)
def test_odd_values_are_refused_in_one_line(values, words):
    with pytest.raises(RecipeError, match=f"^{words}" if "Input should be a" in words else words):
        Recipe.of(values)


def test_an_instance_of_a_method_replaces_the_options_of_a_recipe_with_the_same_method():
    recipe = Recipe.parse({"method": "dgmr", "options": {"select_on": "weights"}, "mlp_ratio": 1})
    changed = recipe.updated({"method": vitrim.methods.Dgmr(select_on="outputs")}).steps[0]
    assert changed.options == {"select_on": "outputs"} and changed.mlp_ratio == 1


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"effort": "fast"}, {"repair": {"refit": False}}),
        ({"effort": "fast", "repair": True}, {"repair": {"refit": False}}),
        ({"effort": "fast", "repair": {"refit": True, "ridge": 1e-3}}, {"repair": {"refit": True, "ridge": 1e-3}}),
        ({"effort": "fast", "method": "magnitude"}, {"method": "magnitude"}),
        ({"effort": "max", "repair": False}, {"repair": False, "at_once": {}}),
        ({"effort": "max", "at_once": {"steps": 5}}, {"repair": {"refit_steps": 600}, "at_once": {"steps": 5}}),
        ({"effort": "default"}, {"repair": {}}),
    ],
)
def test_effort_is_written_out_and_what_the_recipe_says_wins(given, written):
    assert Recipe.parse(given) == Recipe.parse(written)


def test_effort_is_an_argument_of_compress(asked):
    assert asked(effort="fast", keep_ratio=0.5)[0].steps[0].repair == RepairOptions(refit=False)
    assert asked(effort="fast", recipe={"effort": "max"})[0].at_once is None
    with pytest.raises(RecipeError, match="effort: 'hard' is none of"):
        asked(effort="hard")


@pytest.mark.defaults
def test_what_ran_is_written_out(tmp_path):
    for asked_for, expected in (
        ({}, {"params_ratio": 0.5, "repair": {"refit": True, "refit_steps": 300}}),
        ({"method": "magnitude", "mlp_ratio": 1}, {"params_ratio": None, "mlp_ratio": 1.0, "repair": False}),
        ({"method": "int8"}, {"params_ratio": None, "repair": False}),
        ({"recover": {"steps": 1, "elastic": [1, 2]}}, {"params_ratio": None, "mlp_ratio": 2.0}),
    ):
        written = Recipe.parse(asked_for).written_out()
        (tmp_path / "recipe.yaml").write_text(written.dump())
        [step] = Recipe.load(tmp_path / "recipe.yaml").model_dump()["steps"]
        for key, value in expected.items():
            assert value.items() <= step[key].items() if isinstance(value, dict) else step[key] == value
        assert Recipe.load(tmp_path / "recipe.yaml").width() == Recipe.parse(asked_for).width()


def test_an_effort_that_does_not_exist_is_refused():
    with pytest.raises(RecipeError, match="effort: 'hard' is none of fast, default, max"):
        Recipe.parse({"effort": "hard"})


@pytest.mark.parametrize("former", ["fast", "default", "max"])
@pytest.mark.parametrize("effort", ["fast", "default", "max"])
def test_an_effort_on_top_of_a_written_recipe_wins_over_the_former(tmp_path, former, effort):
    file = tmp_path / "recipe.yaml"
    for written in (Recipe.parse({"effort": former}), Recipe.parse({"effort": former, "keep_ratio": 0.5})):
        file.write_text(written.dump())
        expected = written.updated({"effort": effort})
        assert Recipe.load(file).updated({"effort": effort}).dump() == expected.dump()
        step, again = expected.steps[0], Recipe.parse({"effort": effort})
        assert (step.repair_options(), expected.at_once) == (again.steps[0].repair_options(), again.at_once)


def test_an_effort_on_top_leaves_what_no_effort_writes_and_yields_to_what_is_given_beside_it():
    recipe = Recipe.parse({"effort": "fast", "repair": {"refit_steps": 50, "ridge": 1e-3}, "at_once": {"steps": 5}})
    found = recipe.updated({"effort": "max"})
    assert found.steps[0].repair == RepairOptions(refit_steps=50, ridge=1e-3, refit=True)
    assert found.at_once.steps == 5
    beside = recipe.updated({"effort": "max", "repair": {"refit": False}})
    assert not beside.steps[0].repair.refit
    assert Recipe.parse({"repair": False}).updated({"effort": "max"}).steps[0].repair is False
