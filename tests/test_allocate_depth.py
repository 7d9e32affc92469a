"""Depth under the budget of an allocation: costs by whole counts, whole runs, what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitrim
from tests.support.models import HF_TEXT, hf, timm_vit
from vitrim.calibrate import LiveModelView
from vitrim.calibrate.runs import find_runs, past_run, with_edits
from vitrim.cli.options import CutOptions
from vitrim.compression import cut
from vitrim.compression.allocate import EQUAL, Place, allocate, total
from vitrim.compression.cut import cut_
from vitrim.compression.depth import Shallower, equal_within
from vitrim.compression.trials import best_of
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import count_macs, num_parameters
from vitrim.errors import RecipeError
from vitrim.methods import ReplaceMe
from vitrim.metrics.fidelity import fidelity
from vitrim.models.load import origin_of
from vitrim.models.sites import find_mlps
from vitrim.surgery import DropBlocks, KeepHeadDims, KeepUnits, apply_
from vitrim.types import AttentionSite

IMAGES = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit(depth=4, *, idle=(), **values):
    """A small ViT; blocks that are `idle` add next to nothing to the residual stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm_vit(depth=depth, **values).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
            for number in idle:
                model.blocks[number].attn.proj.weight.mul_(1e-3)
                model.blocks[number].mlp.fc2.weight.mul_(1e-3)
    return model


def recipe_of(parts="mlp", cost="params", **values):
    given = {"keep_ratio": 0.5, "round_to": 8, "repair": {"refit": False}, "options": {"parts": parts}}
    given |= {"allocate": {"depth": True, "cost": cost}, "calibrate": {"batch_size": 18, "views": 1}}
    return Recipe.parse({**given, **values})


def shallower(model, recipe):
    step, sites, batches = recipe.steps[0], find_mlps(model), list(IMAGES.split(18))
    uniform = {site.path: step.width().of(site) for site in sites}
    found = allocate(recipe, uniform, model, sites, batches, context=RunContext(quiet=True), least_gain=0.0)
    whole = {"found": found, "origin": origin_of(model), "teacher": model, "sites": sites, "batches": batches}
    alone = step.make_method().goes_by() == "widths"
    return Shallower(**whole, counted=step.allocate.cost, mlps_alone=alone, rounds=False, least_gain=0.0), uniform


def cut_to(model, sizes, run=None):
    """A copy of a model with blocks taken out, and then each MLP and attention at a size by path."""
    small = copy.deepcopy(model)
    apply_(small, [] if run is None else [run])
    mlps = find_mlps(small)
    attentions = LiveModelView(small, mlps, {}, [IMAGES[:2]], seed=0).attentions()
    apply_(small, [first(site, sizes[site.path]) for site in (*mlps, *attentions) if site.path in sizes])
    return small


def first(site, size):
    if not isinstance(site, AttentionSite):
        return KeepUnits.first(site, size)
    kept = (tuple(range(size)),) * site.num_heads
    return KeepHeadDims(site=site, keep_qk=kept, keep_v=kept)


@pytest.mark.parametrize(("parts", "cost"), [("mlp", "macs"), ("both", "params")])
def test_no_candidate_costs_more_than_equal_sizes_with_all_blocks(parts, cost):
    model = vit(3)
    fewer, uniform = shallower(model, recipe_of(parts, cost))
    sizes = {place.path: place.sizes[place.equal] for place in fewer.found.places}
    assert uniform.items() <= sizes.items()

    def count(small):
        return num_parameters(small) if cost == "params" else count_macs(small, IMAGES[:1])

    budget, every = count(cut_to(model, sizes)), list(fewer.each())
    assert 1 <= len(every) <= fewer.most
    for number, group in enumerate(every, start=1):
        assert parts != "mlp" or group[f"{EQUAL}-{number}"].stock
        for candidate in group.values():
            assert candidate.num_gone == number
            assert count(cut_to(model, candidate.units, candidate.run)) <= budget
    *_, last = every[-1].values()
    sites = {site.path: site for site in find_mlps(cut_to(model, {}, last.run))}
    if len(every) < 2:  # then the blocks that are left need no cut
        assert all(last.units[path] == site.d_hidden for path, site in sites.items())


@st.composite
def places(draw):
    found = []
    for number in range(draw(st.integers(1, 3))):
        sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)))
        price = draw(st.integers(1, 5))
        costs = np.array([price * size for size in sizes])
        found.append(Place(path=str(number), sizes=sizes, costs_J=costs, errors_J=np.zeros(len(sizes)), equal=0))
    return found


@settings(deadline=None, max_examples=100)
@given(places(), st.floats(0, 1))
def test_equal_sizes_are_the_largest_share_within_the_budget(some, part):
    least = total(some, {place.path: place.sizes[0] for place in some}, "costs_J")
    whole = total(some, {place.path: place.sizes[-1] for place in some}, "costs_J")
    allowed = int(least + part * (whole - least))
    found = equal_within(some, some, allowed)
    cost = total(some, found, "costs_J")
    assert cost <= allowed
    for share in (size / place.sizes[-1] for place in some for size in place.sizes):
        at = {p.path: max([s for s in p.sizes if s / p.sizes[-1] <= share + 1e-9] or p.sizes[:1]) for p in some}
        assert total(some, at, "costs_J") <= cost or total(some, at, "costs_J") > allowed


def test_a_simple_choice_stays_where_others_save_too_little():
    errors = {EQUAL: 0.5, "uniform-1": 0.3, "allocated-1": 0.28, "allocated-2": 0.4}
    assert best_of(errors, 0.1, [EQUAL, "uniform-1"]) == "uniform-1"
    assert best_of({**errors, "allocated-1": 0.26}, 0.1, [EQUAL, "uniform-1"]) == "allocated-1"
    assert best_of(errors, 0.0, [EQUAL]) == "allocated-1"


def test_idle_blocks_go_and_the_result_is_what_the_two_steps_give(tmp_path):
    model, recipe, out = vit(5, idle=(2, 3)), recipe_of(keep_ratio=0.25), tmp_path / "out"
    found = vitrim.compress(model, data=IMAGES, recipe=recipe, quiet=True, out=out)
    about = found.metrics.allocation
    assert about["blocks_out"] >= 2 and len(found.model.blocks) == 5 - about["blocks_out"]
    assert about["tried"][about["kept"]]["judged"] < 0.9 * about["tried"][EQUAL]["judged"]
    (note,) = [note for note in found.metrics.notes if note.startswith("allocate: relative error")]
    assert f"without {about['blocks_out']} blocks" in note and "on 18 calibration images" in note
    equal = vitrim.compress(model, data=IMAGES, recipe=recipe.updated({"allocate": "uniform"}), quiet=True)
    assert found.metrics.after.parameters <= equal.metrics.after.parameters
    assert about["relative_error"]["allocated"] < equal.metrics.after_cut.relative_error
    again = vitrim.load(out)
    with torch.inference_mode():
        torch.testing.assert_close(again(IMAGES[:4]), found.model(IMAGES[:4]))
    replaced = {"method": "replace-me", "options": {"num_blocks": 5 - about["blocks_out"]}}
    cut = {**recipe.steps[0].model_dump(exclude_unset=True, exclude={"allocate"}), "widths": dict(about["sizes"])}
    both = {"steps": [replaced, cut], "calibrate": {"batch_size": 18, "views": 1}}
    assert vitrim.compress(model, data=IMAGES, recipe=both, quiet=True).plan.sha256 == found.plan.sha256


def test_all_blocks_stay_where_each_does_its_part():
    found = vitrim.compress(vit(3), data=IMAGES, recipe=recipe_of(keep_ratio=0.9), quiet=True)
    about = found.metrics.allocation
    assert about["blocks_out"] == 0 and "uniform-1" in about["tried"] and "uniform-2" not in about["tried"]


def test_attention_and_depth_share_one_budget():
    model = vit(4, idle=(1,))
    found = vitrim.compress(model, data=IMAGES, recipe=recipe_of("both"), quiet=True)
    about = found.metrics.allocation
    assert about["blocks_out"] >= 1 and any(path.endswith("attn") for path in about["sizes"])
    equal = vitrim.compress(model, data=IMAGES, recipe=recipe_of("both").updated({"allocate": "uniform"}), quiet=True)
    assert found.metrics.after.parameters <= equal.metrics.after.parameters


def test_latency_counts_whole_blocks():
    fewer, _ = shallower(vit(3), recipe_of(cost="latency"))
    (first_group, *_), places = list(fewer.each()), fewer.found.places
    run = next(iter(first_group.values())).run
    gone = [place for place in places if run.new_path(place.path) is None]
    (timed,) = [times["0"] for key, times in fewer.found.measured.times.items() if key.startswith("block, ")]
    whole = total(gone, {place.path: max(place.sizes) for place in gone}, "costs_J")
    assert fewer.allowed(run) == fewer.found.about["allowed"] + timed - whole and timed > 0


def test_what_can_not_be_is_refused_in_a_line():
    with pytest.raises(RecipeError, match=r"blockwise: allocate\.depth takes blocks out.*drop blockwise"):
        recipe_of(blockwise={})
    with pytest.raises(RecipeError, match=r"--allocate-depth goes with --allocate auto; drop one of the two"):
        CutOptions(allocate="uniform", allocate_depth=True).given()
    assert CutOptions(allocate_depth=True).given() == {"allocate": {"depth": True}}
    with pytest.raises(RecipeError, match=r"allocate\.depth: .*no run of 1 blocks can be taken out.*cut widths alone"):
        vitrim.compress(vit(1), data=IMAGES, recipe=recipe_of(), quiet=True)


def test_what_follows_is_compared_with_the_whole_model(monkeypatch):
    """Behind the gap the stream is the whole model's; in front of it layers are to put out what stands for the run."""
    model, batches = vit(4), list(IMAGES.split(18))
    sites = find_mlps(model)
    [edit] = ReplaceMe(num_blocks=2).propose(LiveModelView(model, sites, {}, batches, seed=0))
    shorter, path = with_edits(model, [edit]), edit.run.output
    past = past_run(model, shorter, edit.run, IMAGES[:2])
    assert past is not None
    seen = {}
    for name, each in (("shorter", shorter), ("past", past)):
        each.get_submodule(path).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    with torch.inference_mode():
        short = shorter(IMAGES[:4])
        torch.testing.assert_close(past(IMAGES[:4]), model(IMAGES[:4]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(short, model(IMAGES[:4]), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(seen["past"], seen["shorter"])
    errors, recipe = {}, recipe_of()
    for name in ("past", "without"):
        student = copy.deepcopy(model)
        report = cut_(
            student,
            model,
            sites,
            recipe,
            batches[:-1],
            run=edit,
            widths=dict.fromkeys(seen_paths(edit, sites), 48),
            quiet=True,
        )
        errors[name] = fidelity(student, model, batches[:2])["relative_error"]
        assert any("compared with the model without" in note for note in report.notes) == (name == "without")
        monkeypatch.setattr(cut, "past_run", lambda *_: None)
    assert errors["past"] != errors["without"]


def seen_paths(edit, sites):
    return [new for site in sites if (new := edit.new_path(site.path)) is not None]


def test_blocks_that_end_in_a_norm_have_no_stream_to_hand_on():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, words = hf("Bert", **{**HF_TEXT, "num_hidden_layers": 3}).eval(), torch.randint(20, (6, 12))
    [run, *_] = find_runs(model, find_mlps(model), 1, words[:2], print)
    assert run.norm is not None
    assert past_run(model, with_edits(model, [DropBlocks(run=run)]), run, words[:2]) is None
