"""Allocation: curves against slow least squares, the optimum against brute force, one pass for all budgets."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitrim
from tests.support.models import build_case
from vitrim.cli.options import CutOptions
from vitrim.compression.allocate import EQUAL, FOUND, allocate
from vitrim.compression.curves import through
from vitrim.config.options import AllocateOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import site_macs, site_parameters
from vitrim.errors import BudgetError, RecipeError
from vitrim.methods import METHODS, SiteMethod, register
from vitrim.ops.allocation import best_choices, dropped_energy, explained_energy


def measured(num_tokens=300, num_hidden=12, num_out=4):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, num_hidden, generator=generator, dtype=torch.float64)
    hidden = hidden @ torch.randn(num_hidden, num_hidden, generator=generator, dtype=torch.float64)
    target = hidden.relu() @ torch.randn(num_hidden, num_out, generator=generator, dtype=torch.float64)
    return hidden, target, torch.randperm(num_hidden, generator=generator)


def test_every_prefix_explains_what_a_fit_of_its_own_does():
    hidden, target, order = measured()
    explained = explained_energy(hidden.T @ hidden, hidden.T @ target, order)
    for count in range(1, len(order) + 1):
        columns = hidden[:, order[:count]]
        residual = (target - columns @ torch.linalg.lstsq(columns, target).solution).square().sum()
        torch.testing.assert_close(target.square().sum() - explained[count - 1], residual, rtol=1e-5, atol=1e-5)


def test_a_unit_that_repeats_others_explains_nothing():
    hidden, target, _ = measured()
    hidden = torch.cat([hidden[:, :6], hidden[:, :6] @ torch.randn(6, 3, dtype=torch.float64)], dim=1)
    explained = explained_energy(hidden.T @ hidden, hidden.T @ target, torch.arange(9))
    assert (explained.diff() >= 0).all()
    torch.testing.assert_close(explained[5:], explained[5].expand(4), rtol=1e-6, atol=0)


def test_sums_that_are_rounded_more_coarsely_than_the_ridge_are_no_error():
    generator = torch.Generator().manual_seed(0)
    hidden = (
        torch.randn(200, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 9, generator=generator).double()
    )
    target = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    gram = hidden.T @ hidden + 1e-4 * (noise + noise.T)
    assert torch.linalg.eigvalsh(gram)[0] < -1e-5
    found = explained_energy(gram, hidden.T @ target, torch.arange(9))
    assert float(found[3]) == pytest.approx(
        float(explained_energy(hidden.T @ hidden, hidden.T @ target, torch.arange(9))[3]), rel=1e-3
    )
    with pytest.raises(torch.linalg.LinAlgError):
        explained_energy(gram - 100 * torch.eye(9, dtype=torch.float64), hidden.T @ target, torch.arange(9))


def test_what_dropped_units_put_out_is_missing():
    hidden, _, order = measured()
    weight = torch.randn(4, 12, dtype=torch.float64)
    missing = dropped_energy(hidden.T @ hidden, weight, order)
    for count in range(1, 13):
        gone = order[count:]
        torch.testing.assert_close(missing[count - 1], (hidden[:, gone] @ weight[:, gone].T).square().sum())


def brute_force(errors, costs, budget):
    """The least error, and the least cost that has it."""
    sums = [
        (sum(e[j] for e, j in zip(errors, picked, strict=True)), sum(c[j] for c, j in zip(costs, picked, strict=True)))
        for picked in product(*(range(len(e)) for e in errors))
    ]
    return min((pair for pair in sums if pair[1] <= budget), default=None)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2**12), st.integers(0, 60)), min_size=1, max_size=5), min_size=1, max_size=5
    ),
    st.integers(0, 200),
)
def test_the_choice_is_the_best_that_the_budget_allows(options, budget):
    """Errors are multiples of 2^-12, so that their sums are exact in any order."""
    errors = [np.array([error for error, _ in of]) / 2**12 for of in options]
    costs = [np.array([cost for _, cost in of], dtype=np.int64) for of in options]
    expected = brute_force(errors, costs, budget)
    if expected is None:
        with pytest.raises(BudgetError, match="is below the"):
            best_choices(errors, costs, budget)
        return
    picked = best_choices(errors, costs, budget)
    found = sum(e[j] for e, j in zip(errors, picked, strict=True))
    spent = sum(int(c[j]) for c, j in zip(costs, picked, strict=True))
    assert (found, spent) == expected


def test_final_errors_run_through_what_was_measured():
    own = np.array([1.0, 0.6, 0.3, 0.1, 0.0])
    final = through(own, np.array([0.1, 0.3]), np.array([0.02, 0.01]))
    assert final.tolist() == pytest.approx([0.2 / 3, 0.04, 0.02, 0.02, 0.0])  # what fell counts as equal
    assert (np.diff(final) <= 0).all()
    swapped = through(own, np.array([0.3, 0.1]), np.array([0.01, 0.02]))  # widths without repair may be out of order
    assert swapped.tolist() == final.tolist()
    assert through(own, np.array([0.0, 0.3]), np.array([0.0, 0.03])).tolist() == pytest.approx(
        [0.1, 0.06, 0.03, 0.01, 0]
    )


def recipe_of(**values):
    given = {"method": "dgmr", "keep_ratio": 0.5, "round_to": 8, "repair": {"refit": False}, "allocate": "auto"}
    return Recipe.parse({**given, **values})


def allocated(recipe, model, sites, batches):
    """The widths that are found beside equal ones."""
    uniform = {site.path: recipe.width().of(site) for site in sites}
    return allocate(recipe, uniform, model, sites, batches, context=RunContext(quiet=True), least_gain=0.0)


def units_of(found):
    """The widths that were found to be best."""
    return found.candidates.get(FOUND, found.candidates[EQUAL])


@pytest.mark.parametrize("counted", ["params", "macs", "latency"])
def test_widths_cost_no_more_than_equal_ones_and_promise_no_less(kind, counted, tmp_path):
    recipe = recipe_of(allocate={"cost": counted, "cache": tmp_path})
    found = allocated(recipe, kind.model, kind.sites, kind.batches)
    about, units = found.about, units_of(found)
    assert about["cost"] <= about["allowed"]
    assert about["predicted"]["allocated"] <= about["predicted"]["uniform"]
    assert about["counted"] == counted and units.keys() == {site.path for site in kind.sites}
    uniform = Recipe(keep_ratio=0.5, round_to=8).width()
    for site in kind.sites:
        width = units[site.path]
        assert width % 8 == 0 or width in (uniform.of(site), site.d_hidden)
    if counted == "latency":
        return
    tokens = 1 if counted == "params" else tokens_of(kind)
    cost = site_parameters if counted == "params" else site_macs
    assert about["allowed"] == sum(cost(site, uniform.of(site)) * tokens for site in kind.sites)
    assert about["cost"] == sum(cost(site, units[site.path]) * tokens for site in kind.sites)


def tokens_of(case):
    seen = []
    model = case.copy()
    model.get_submodule(case.sites[0].value).register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    with torch.inference_mode():
        model(case.batches[0][:1])
    return seen[0] // case.sites[0].d_model


def test_width_goes_where_it_matters(build):
    case = build("timm-vit")
    model = case.copy()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1e-3)
    for method, repair in (("dgmr", {"refit": False}), ("magnitude", False)):
        recipe = recipe_of(method=method, repair=repair)
        found = units_of(allocated(recipe, model, case.sites, case.batches))
        assert found == {"blocks.0.mlp": 88, "blocks.1.mlp": 8}


def refuse(*_):
    raise AssertionError("the model was run")


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory):
    """A model that can't be run any more, and the folder with what was measured on it."""
    case, folder = build_case("timm-vit"), tmp_path_factory.mktemp("curves")
    model = case.copy()
    allocated(recipe_of(allocate={"cache": folder}), model, case.sites, case.batches)
    model.register_forward_pre_hook(refuse)
    for block in model.blocks:
        block.register_forward_pre_hook(refuse)
    return case, model, folder


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 96), st.sampled_from([1, 4, 8, 24]), st.sampled_from(["params", "macs"]))
def test_another_budget_runs_no_model_and_is_kept(measured_once, width, round_to, counted):
    case, model, folder = measured_once
    recipe = Recipe.parse(
        {
            "method": "dgmr",
            "hidden_dim": width,
            "round_to": round_to,
            "repair": {"refit": False},
            "allocate": {"cost": counted, "cache": str(folder)},
        }
    )
    found = allocated(recipe, model, case.sites, case.batches)
    assert all(sum(units.values()) <= 2 * width for units in found.candidates.values())
    assert found.about["predicted"]["allocated"] <= found.about["predicted"]["uniform"]
    assert all(1 <= units_of(found)[site.path] <= site.d_hidden for site in case.sites)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change", [{"method": "dgmr-paper"}, {"seed": 1}, {"repair": False}, {"options": {"select_on": "activations"}}]
)
def test_what_was_measured_serves_nothing_else(measured_once, change):
    case, model, folder = measured_once
    with pytest.raises(AssertionError, match="the model was run"):
        allocated(recipe_of(allocate={"cache": folder}, **change), model, case.sites, case.batches)
    with pytest.raises(AssertionError, match="the model was run"):
        batches = [batch + 1 for batch in case.batches]
        allocated(recipe_of(allocate={"cache": folder}), model, case.sites, batches)


def test_damaged_measurements_are_made_again(measured_once, tmp_path, caplog):
    case, model, folder = measured_once
    (file,) = folder.iterdir()
    (tmp_path / file.name).write_text(file.read_text()[:-20])
    with pytest.raises(AssertionError, match="the model was run"):
        allocated(recipe_of(allocate={"cache": tmp_path}), model, case.sites, case.batches)


def test_a_method_without_one_order_is_told_of(build, monkeypatch):
    case = build("timm-vit")
    monkeypatch.setattr("vitrim.methods.registry.METHODS", dict(METHODS))

    @register
    class Fickle(SiteMethod):
        name, needs, paper, arxiv, summary, repairs = "fickle", "weights", "none", "0.0", "", True

        def select(self, view):
            return torch.arange(96 - view.num_keep, 96)

    half = recipe_of(method="fickle", repair={"refit": False})
    found = allocated(half, case.model, case.sites, case.batches)
    assert any("picks units in another order at each width" in note for note in found.notes)
    straight = allocated(recipe_of(), case.model, case.sites, case.batches)
    assert straight.notes == ()


def test_what_can_not_be_allocated_is_refused(build, tmp_path):
    case = build("timm-vit")
    with pytest.raises(RecipeError, match="decides about the whole model by itself"):
        allocated(recipe_of(method="top-k", repair=False), case.model, case.sites, case.batches)
    with pytest.raises(RecipeError, match="need calibration images"):
        allocated(recipe_of(), case.model, case.sites, None)
    with pytest.raises(RecipeError, match="use compress, or give its widths"):
        vitrim.prune_checkpoint("nowhere", tmp_path / "out", recipe=recipe_of())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": {"blocks.0.mlp": 8}, "allocate": "auto"}, "drop one of the two"),
        (
            {"allocate": "auto", "recover": {"steps": 1, "elastic": [0.5, 1]}},
            "allocate: recover.elastic wants the same width",
        ),
        (
            {"widths": {"mlp": 8}, "recover": {"steps": 1, "elastic": [0.5, 1]}},
            "widths: recover.elastic wants the same width",
        ),
        ({"allocate": {"cots": "macs"}}, "did you mean 'allocate.cost'"),
        ({"allocate": "sometimes"}, "allocate"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(values)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"allocate": "auto"}, AllocateOptions(cache=Path("kept"))),
        ({"allocate_cost": "macs"}, AllocateOptions(cost="macs", cache=Path("kept"))),
        ({"allocate": "uniform"}, None),
        ({}, AllocateOptions(cache=Path("kept"))),
    ],
)
def test_the_command_line_goes_over_the_recipe(given, expected):
    base = Recipe.parse({"allocate": {"cache": "kept"}})
    assert base.updated(CutOptions(**given).given()).steps[0].allocate == expected
    with pytest.raises(RecipeError, match="--allocate-cost goes with --allocate auto"):
        CutOptions(allocate="uniform", allocate_cost="macs").given()


def test_widths_are_given_by_path_or_the_end_of_it(build):
    first, second = build("timm-vit").sites
    step = {"keep_ratio": 0.25, "round_to": 8, "widths": {"blocks.0.mlp": 17}}
    recipe = Recipe.parse({"steps": [step, {"method": "magnitude"}]})
    assert (recipe.width().of(first), recipe.width().of(second)) == (17, 24)
    assert recipe.width().of(first.below("visual.trunk")) == 17
    both = Recipe(widths={"mlp": 9, "visual.blocks.1.mlp": 5}).width()
    assert (both.of(first), both.of(second)) == (9, 5)
    assert recipe.width(1).of(first) == first.d_hidden  # a later step has its own: here, all that is left
    assert Recipe.parse({"allocate": "uniform"}).steps[0].allocate is None
    with pytest.raises(BudgetError, match="widths=97 asks to keep 97 of 96"):
        Recipe(widths={"mlp": 97}).width().of(first)
    with pytest.raises(BudgetError, match=r"no MLP 'blocks.7.mlp'; there are blocks.0.mlp"):
        Recipe(widths={"blocks.7.mlp": 8}).width().check([first, second])
