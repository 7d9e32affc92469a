"""Budgets of a whole model beside a slow search, and what becomes of the widths that they come to."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitrim
from tests.support.digits import DIGITS
from tests.support.models import KINDS, build_case
from vitrim.compression.budget import solve_widths
from vitrim.compression.cut import cut_
from vitrim.compression.share import Trial, Trials, find_share
from vitrim.config.recipe import Recipe
from vitrim.config.widths import Width
from vitrim.cost.count import count_macs, num_parameters
from vitrim.errors import BudgetError, RecipeError
from vitrim.models.load import load_model
from vitrim.surgery import KeepUnits, apply_

MODELS = (*KINDS, "timm-swin", "timm-mixer", "hf-bert")  # of one size and of several, with images and with text
COUNTED = ("params_ratio", "macs_ratio")


def cost(case, counted, widths=None):
    """What a model costs that has really been cut."""
    student = case.copy()
    if widths is not None:
        apply_(student, [KeepUnits(site=site, keep=tuple(range(widths[site.path]))) for site in case.sites])
    return num_parameters(student) if counted == "params_ratio" else count_macs(student, case.batches[0][:1])


def at(case, share, round_to):
    """Widths at a share of all units, as the documentation has them: multiples, where they are not smaller."""
    found = {}
    for site in case.sites:
        units = math.floor(share * site.d_hidden)
        if round_to <= units < site.d_hidden:
            units -= units % round_to
        found[site.path] = max(1, units)
    return found


def every_choice(case, round_to):
    """All widths that a budget may come to, the narrowest first."""
    shares = sorted({Fraction(units, site.d_hidden) for site in case.sites for units in range(1, site.d_hidden + 1)})
    choices = [at(case, share, round_to) for share in shares]
    return [choices[0], *(after for before, after in pairwise(choices) if before != after)]


def solved(case, counted, ratio, round_to=16, *, exact=False):
    width = Width(kind=counted, value=ratio, round_to=round_to, exact=exact)
    return solve_widths(width, case.sites, case.model, case.batches[0])


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("name", MODELS)
def test_the_widest_choice_within_the_budget_is_found(name, counted):
    case = build_case(name)
    whole, choices = cost(case, counted), every_choice(case, 16)
    costs = [cost(case, counted, widths) for widths in choices]
    assert costs == sorted(costs) and costs[-1] == whole
    for ratio in (0.55, 0.7, 0.85, 1.0):
        fitting = [widths for widths, spent in zip(choices, costs, strict=True) if spent <= ratio * whole]
        if fitting:
            assert solved(case, counted, ratio) == fitting[-1]
        else:
            with pytest.raises(BudgetError, match=f"{counted}={ratio:g}: the MLPs hold"):
                solved(case, counted, ratio)
    assert solved(case, counted, 1.0) == {site.path: site.d_hidden for site in case.sites}


@given(
    st.sampled_from(MODELS),
    st.sampled_from(COUNTED),
    st.floats(0.5, 1.0),
    st.sampled_from([1, 3, 8, 16, 64]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_budget_is_met_and_the_next_choice_would_break_it(name, counted, ratio, round_to, exact):
    case = build_case(name)
    choices, allowed = every_choice(case, 1 if exact else round_to), ratio * cost(case, counted)
    try:
        found = solved(case, counted, ratio, round_to, exact=exact)
    except BudgetError:
        assert cost(case, counted, choices[0]) > allowed
        return
    place = choices.index(found)
    assert cost(case, counted, found) <= allowed
    assert place == len(choices) - 1 or cost(case, counted, choices[place + 1]) > allowed


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("name", MODELS)
def test_what_the_mlps_can_not_give_is_said_with_what_they_can(name, counted):
    case = build_case(name)
    with pytest.raises(BudgetError) as caught:
        solved(case, counted, 0.01)
    said = re.fullmatch(
        rf"{counted}=0\.01: the MLPs hold (\d+)% of the (parameters|MACs), so cutting them alone leaves (\S+) at "
        r"least; use (\S+)\.\.1, parts: both of dgmr or corp, or low-rank\.",
        str(caught.value),
    )
    assert said is not None and said[2] == {"params_ratio": "parameters", "macs_ratio": "MACs"}[counted]
    whole, least = cost(case, counted), cost(case, counted, dict.fromkeys((site.path for site in case.sites), 1))
    assert float(said[3]) == pytest.approx(least / whole, abs=5e-3)
    assert solved(case, counted, float(said[4]))  # what it says is possible is
    with pytest.raises(BudgetError):
        solved(case, counted, least / whole - 1e-4)


def test_own_widths_are_kept_and_the_others_make_room(build):
    case = build("timm-vit")
    first, second = (site.path for site in case.sites)
    width = Width(kind="params_ratio", value=0.8, round_to=1, own={first: 96})
    found = solve_widths(width, case.sites, case.model, case.batches[0])
    whole = cost(case, "params_ratio")
    assert found[first] == 96 and cost(case, "params_ratio", found) <= 0.8 * whole
    assert cost(case, "params_ratio", {**found, second: found[second] + 1}) > 0.8 * whole


def test_macs_need_inputs_and_parameters_none(build):
    case = build("timm-vit")
    with pytest.raises(BudgetError, match="macs_ratio: the size of the inputs is not known; pass data"):
        solve_widths(Width(kind="macs_ratio", value=0.7), case.sites, case.model, None)
    assert solve_widths(Width(kind="params_ratio", value=0.7), case.sites, case.model, None) == solved(
        case, "params_ratio", 0.7
    )


def test_a_later_step_has_a_budget_of_the_original(build):
    case = build("timm-vit")
    student, whole = case.copy(), cost(case, "params_ratio")
    steps = [{"method": "magnitude", "params_ratio": ratio, "repair": False, "round_to": 1} for ratio in (0.8, 0.6)]
    report = cut_(student, case.model, case.sites, Recipe(steps=steps), None, quiet=True)
    assert 0.59 * whole < num_parameters(student) <= 0.6 * whole
    assert report.plan.widths == solved(case, "params_ratio", 0.6, 1)


# What compress makes of it


def widths_of(model=DIGITS, **arguments):
    """The width of every MLP, which is one, and the result."""
    found = vitrim.compress(model, method="magnitude", quiet=True, **arguments)
    (width,) = set(found.plan.widths.values())
    return width, found


def test_nothing_asked_for_is_half_of_the_parameters():
    width, found = widths_of()
    whole = found.metrics.before.parameters
    each = (found.metrics.before.parameters - found.metrics.after.parameters) / (384 - width)
    assert (
        width % 16 == 0 and found.metrics.after.parameters <= 0.5 * whole < found.metrics.after.parameters + 16 * each
    )
    assert widths_of(params_ratio=0.5)[0] == width == 80


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"keep_ratio": 0.275}, 112),  # 105.6
        ({"keep_ratio": 0.275, "round_to": 8}, 104),
        ({"keep_ratio": 0.275, "exact": True}, 106),
        ({"mlp_ratio": 1.1}, 112),  # 105.6
        ({"mlp_ratio": 1.1, "exact": True}, 105),  # as timm has it
        ({"mlp_ratio": 1}, 96),
        ({"hidden_dim": 105}, 105),
        ({"macs_ratio": 0.6}, 112),
    ],
    ids=str,
)
def test_widths_are_multiples_of_sixteen_unless_they_are_asked_for_exactly(asked, expected):
    assert widths_of(**asked)[0] == expected


def test_a_share_of_macs_is_one_of_the_model():
    width, found = widths_of(macs_ratio=0.6)
    before, after = found.metrics.before.macs, found.metrics.after.macs
    each = (before - after) / (384 - width)
    assert after <= 0.6 * before < after + 16 * each


@pytest.mark.parametrize("counted", COUNTED)
def test_file_to_file_and_a_prediction_come_to_the_same_widths(tmp_path, counted):
    found = vitrim.compress(DIGITS, method="magnitude", quiet=True, **{counted: 0.6})
    written = vitrim.prune_checkpoint(DIGITS, tmp_path / "out", method="magnitude", quiet=True, **{counted: 0.6})
    (predicted,) = vitrim.inspect(DIGITS, **{counted: 0.6}).predicted
    assert found.plan.widths == written.plan.widths == predicted.hidden_dims
    assert predicted.parameters == found.metrics.after.parameters == written.metrics.after.parameters


def dinov2():
    """Its config can say a multiple of the model width alone, of which two thirds, as multiples of 8, are hidden."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=4, use_swiglu_ffn=True)).eval()


@pytest.mark.parametrize(
    ("asked", "wanted", "near"),
    [({"mlp_ratio": 1}, 32, 24), ({"hidden_dim": 60}, 60, 64), ({"keep_ratio": 0.5}, 48, 48)],
    ids=str,
)
def test_a_width_moves_to_the_nearest_that_the_library_can_load_and_says_so(asked, wanted, near):
    width, found = widths_of(dinov2(), **asked)
    note = f"hidden width {wanted} became {near}, the nearest that transformers can load; --exact rounds no width."
    assert width == near and found.metrics.stock and (note in found.metrics.notes) == (wanted != near)
    kept, exact = widths_of(dinov2(), exact=True, **asked)
    assert kept == {32: 32, 60: 60, 48: 44}[wanted] and not any("became" in note for note in exact.metrics.notes)
    assert exact.metrics.stock == (kept == near)


def test_widths_move_for_no_model_without_a_library_and_not_where_several_widths_are_asked_for():
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    width, found = widths_of(torch.nn.Sequential(mlp), hidden_dim=7)
    assert width == 7 and not found.metrics.stock
    assert "no library can build this model" in found.metrics.notes[-1]
    own = vitrim.compress(dinov2(), recipe={"hidden_dim": 60, "widths": {"layer.0.mlp": 30}}, quiet=True)
    assert sorted(own.plan.widths.values()) == [30, 60]


@pytest.mark.parametrize("counted", COUNTED)
def test_low_rank_meets_a_budget_by_trying(counted):
    recipe = {"calibrate": {"num_images": 32, "batch_size": 32}, counted: 0.6}
    found = vitrim.compress(DIGITS, data="digits", method="low-rank", recipe=recipe, quiet=True)
    metrics = found.metrics
    if counted == "params_ratio":
        share = metrics.after.parameters / metrics.before.parameters
    else:
        share = metrics.after.macs / metrics.before.macs
    assert 0.58 <= share <= 0.6


def test_corp_of_both_parts_meets_a_budget_by_trying_and_of_heads_at_a_share_goes_by_none():
    recipe = {"method": "corp", "options": {"parts": "both"}, "calibrate": {"num_images": 32, "batch_size": 32}}
    arguments = {"data": "digits", "quiet": True}
    metrics = vitrim.compress(DIGITS, recipe=recipe, params_ratio=0.6, **arguments).metrics
    assert 0.55 <= metrics.after.parameters / metrics.before.parameters <= 0.6
    recipe["options"] = {"parts": "attention", "keep_dims": 0.5}
    found = vitrim.compress(DIGITS, recipe=recipe, **arguments)
    assert found.plan.widths == {} and 0.85 < found.metrics.after.parameters / found.metrics.before.parameters < 1


def test_what_low_rank_can_not_give_is_said():
    recipe = {"calibrate": {"num_images": 32, "batch_size": 32}}
    with pytest.raises(BudgetError, match=r"^params_ratio=0\.01: low-rank leaves 0\.\d+ at least; use 0\.\d+\.\.1\.$"):
        vitrim.compress(DIGITS, data="digits", method="low-rank", params_ratio=0.01, recipe=recipe, quiet=True)


def test_a_method_that_goes_by_no_budget_takes_none():
    model, _ = load_model(DIGITS)
    assert vitrim.compress(model, method="relufy", quiet=True).metrics.after.parameters == num_parameters(model)
    with pytest.raises(RecipeError, match="params_ratio: relufy goes by no budget; drop it"):
        vitrim.compress(model, method="relufy", params_ratio=0.5, quiet=True)


@pytest.mark.parametrize(("method", "share"), [("fips", 0.45149), ("moefication", 1.0102)])
def test_what_an_error_suggests_can_be_met(monkeypatch, method, share):
    leaves = Trial(shares={"params": share, "macs": share}, repairable=False)
    monkeypatch.setattr(Trials, "_try", lambda *_: leaves)
    recipe = Recipe.parse({"method": method, "params_ratio": 0.1})
    model = torch.nn.Linear(2, 2)
    with pytest.raises(BudgetError, match=f"{method} leaves ") as caught:
        find_share(recipe, model, (), torch.zeros(1))
    advice = re.search(r"use ([\d.]+)\.\.1", str(caught.value))
    assert (advice is None) == (share > 1)
    if advice is not None:
        assert find_share(recipe.updated({"params_ratio": float(advice[1])}), model, (), torch.zeros(1)) > 0


def test_a_model_that_can_not_be_pruned_in_place_stays_as_it_was():
    model = torch.nn.Sequential(build_case("timm-vit").copy()).bfloat16().train()
    model[0].requires_grad_(False).eval()
    with pytest.raises(BudgetError, match="use 0"):
        vitrim.prune_(model, "magnitude", params_ratio=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training and not any(module.training for module in model[0].modules())
