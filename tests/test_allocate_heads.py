"""Allocation over MLPs and attention together: what attentions lack and cost by slow references, and whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitrim
from tests.support.models import timm_vit
from vitrim.compression import timing
from vitrim.compression.allocate import EQUAL, FOUND, allocate
from vitrim.compression.head_curves import at_all_sizes
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import count_macs, num_parameters
from vitrim.models.sites import find_mlps
from vitrim.ops.head_factors import LogitSums, factor_logits, lost_logits
from vitrim.surgery import KeepHeadDims, KeepHeads, KeepUnits, apply_

IMAGES = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_lost_logits_are_those_of_the_mixtures_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 40, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    grams = query.mT @ query, key.mT @ key
    sums = LogitSums(query_GFF=grams[0], key_GFF=grams[1], query_cross_GFF=grams[0], key_cross_GFF=grams[1])
    whole, before = query @ key.mT, 1.0
    for size in range(1, 7):
        left, right = factor_logits(sums, size, ridge=1e-9)
        small = (query @ left.mT) @ (key @ right.mT).mT
        slow = float((whole - small).square().sum() / whole.square().sum())
        assert lost_logits(sums, left, right) == pytest.approx(slow, abs=1e-9)
        assert slow < before
        before = slow
    assert before == pytest.approx(0, abs=1e-9)


def recipe_of(parts="both", heads="dims", **values):
    options = {"parts": parts, "heads": heads}
    given = {"method": "dgmr", "keep_ratio": 0.5, "round_to": 8, "repair": {"refit": False}, "options": options}
    return Recipe.parse({**given, "allocate": "auto", "calibrate": {"batch_size": 18, "views": 1}, **values})


def allocated(recipe, case, model=None, sites=None):
    model, sites = model or case.model, sites or case.sites
    width = recipe.steps[0].width()
    uniform = {site.path: width.of(site) for site in sites}
    context = RunContext(quiet=True)
    return allocate(recipe, uniform, model, sites, case.batches, context=context, least_gain=0.0)


def edit_at(site, size, *, whole_heads):
    if whole_heads:
        return KeepHeads(site=site, keep=tuple(range(size)))
    kept = (tuple(range(size)),) * site.num_heads
    return KeepHeadDims(site=site, keep_qk=kept, keep_v=kept)


@pytest.mark.parametrize("heads", ["dims", "whole"])
@pytest.mark.parametrize("counted", ["params", "macs"])
def test_costs_are_those_of_the_model_that_comes_out(build, heads, counted):
    """The costs that an allocation adds up differ from a whole count of the cut model by the same amount for all."""
    case = build("timm-vit")
    found = allocated(recipe_of(heads=heads, allocate={"cost": counted}), case)
    attentions = attentions_of(case)
    assert set(found.measured.costs) == set(attentions) and len(attentions) == 2
    for path, site in attentions.items():
        costs = found.measured.costs[path][counted]
        whole = site.num_heads if heads == "whole" else site.head_dim
        assert len(costs) == whole == len(found.measured.errors[path])
        for size in range(1, whole):
            model = case.copy()
            apply_(model, [edit_at(site, size, whole_heads=heads == "whole")])
            slow = num_parameters(model) if counted == "params" else count_macs(model, case.batches[0][:1])
            assert costs[size - 1] == slow


def attentions_of(case):
    from vitrim.calibrate import LiveModelView

    return {site.path: site for site in LiveModelView(case.model, case.sites, {}, case.batches, seed=0).attentions()}


def test_costs_between_measured_ones_lie_on_a_line():
    assert at_all_sizes({2: 30, 4: 50, 8: 99}) == [20, 30, 40, 50, 60, 70, 80, 99]
    assert at_all_sizes({1: 5, 2: 9}) == [5, 9]


@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_errors_fall_with_the_size_and_the_student_is_put_back(build, heads):
    found = allocated(recipe_of(heads=heads), build("timm-vit"))
    for path in found.measured.costs:
        errors = np.array(found.measured.errors[path])
        assert errors[-1] == 0 and errors[0] > 0
        assert (np.diff(errors) <= 1e-12).all()
    assert found.about["predicted"][FOUND] <= found.about["predicted"][EQUAL]


def lopsided(build, *, attention_matters):
    """A model of which only the attentions matter, or only the MLPs."""
    model = build("timm-vit").copy()
    with torch.no_grad():
        for block in model.blocks:
            (block.mlp.fc2 if attention_matters else block.attn.proj).weight.mul_(1e-3)
    return model


@pytest.mark.parametrize("attention_matters", [True, False])
def test_the_budget_goes_to_what_matters(build, attention_matters):
    case, model = build("timm-vit"), lopsided(build, attention_matters=attention_matters)
    found = allocated(recipe_of(), case, model)
    equal = {"blocks.0.mlp": 48, "blocks.1.mlp": 48}
    sizes = found.candidates[FOUND]
    dims = [sizes[path] for path in found.measured.costs]
    whole = [len(found.measured.errors[path]) for path in found.measured.costs]
    assert found.candidates[EQUAL] == equal
    if attention_matters:
        assert dims == whole and all(sizes[path] < 48 for path in equal)
    else:
        assert all(2 * kept < full for kept, full in zip(dims, whole, strict=True))
        assert all(sizes[path] > 48 for path in equal)


def test_attention_alone_leaves_mlps_whole(build):
    model = lopsided(build, attention_matters=True)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.mul_(1e-3)
    found = vitrim.compress(model, data=IMAGES, recipe=recipe_of("attention"), quiet=True)
    kinds = {edit.KIND for edit in found.plan.edits}
    assert kinds == {"keep_head_dims"} and found.metrics.allocation["kept"] == FOUND
    first = found.metrics.allocation["sizes"]
    assert first["blocks.0.attn"] > first["blocks.1.attn"]


@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_a_run_spends_no_more_than_equal_sizes_and_says_what_it_kept(build, heads):
    model, recipe = lopsided(build, attention_matters=heads == "whole"), recipe_of(heads=heads)  # 1 of 2 heads stays
    found = vitrim.compress(model, data=IMAGES, recipe=recipe, quiet=True)
    equal = vitrim.compress(model, data=IMAGES, recipe=recipe.updated({"allocate": "uniform"}), quiet=True)
    assert num_parameters(found.model) <= num_parameters(equal.model)
    about = found.metrics.allocation
    assert about["kept"] != EQUAL
    assert about["relative_error"][FOUND] < about["relative_error"][EQUAL]
    assert about["relative_error"][EQUAL] == equal.metrics.after_cut.fidelity["relative_error"]
    sizes = {edit.site.path: edit for edit in found.plan.edits if not isinstance(edit, KeepUnits)}
    for path, edit in sizes.items():
        assert about["sizes"][path] == (len(edit.keep) if heads == "whole" else len(edit.keep_v[0]))
    again = vitrim.compress(model, data=IMAGES, recipe=recipe, quiet=True)
    assert again.plan.sha256 == found.plan.sha256


def test_values_alone_are_allocated_where_nothing_else_can_be_cut(build):
    torch.manual_seed(0)
    case, model = build("timm-vit"), timm_vit(qk_norm=True).eval()
    found = allocated(recipe_of(), case, model, find_mlps(model))
    assert len(found.measured.costs) == 2
    assert found.about["cost"] <= found.about["allowed"]


@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_times_are_measured_for_attentions_too_and_are_kept(build, heads, tmp_path, monkeypatch):
    case, recipe = build("timm-vit"), recipe_of(heads=heads, allocate={"cost": "latency", "cache": str(tmp_path)})
    found = allocated(recipe, case)
    about, times = found.about, found.measured.times
    assert about["cost"] <= about["allowed"]
    (key,) = [key for key in times if key.startswith("attention")]  # both have one shape
    assert all(time > 0 for time in times[key].values()) and len(times[key]) == (8 if heads == "dims" else 2)
    monkeypatch.setattr(timing, "import_timer", lambda: lambda *_, **__: 1 / 0)
    assert allocated(recipe, case).candidates == found.candidates
