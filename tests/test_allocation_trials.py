"""Allocations judged by whole cuts: candidates against brute force, what is kept, and what a resumed run repeats."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitrim
from vitrim.compression import phases, trials
from vitrim.compression.allocate import EQUAL, FOUND, HALFWAY, Place, best_sizes, halfway
from vitrim.compression.judging import choosing_images, with_enough_to_choose
from vitrim.compression.trials import best_of
from vitrim.config.recipe import Recipe
from vitrim.data import Split

IMAGES = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@st.composite
def places(draw):
    """A few places whose errors fall and whose costs rise with the size; errors are multiples of 2^-12."""
    found = []
    for number in range(draw(st.integers(1, 3))):
        sizes = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)))
        errors = draw(st.lists(st.integers(0, 2**12), min_size=len(sizes), max_size=len(sizes)))
        price = draw(st.integers(1, 5))
        found.append(
            Place(
                path=f"blocks.{number}.mlp",
                sizes=sizes,
                costs_J=np.array([price * size for size in sizes]),
                errors_J=np.array(sorted(errors, reverse=True)) / 2**12,
                equal=draw(st.integers(0, len(sizes) - 1)),
            )
        )
    return found


def total(places, sizes, what):
    return sum(getattr(place, what)[place.sizes.index(sizes[place.path])] for place in places)


def brute_force(places, allowed, *, near=None):
    """The least error within a budget; with `near` no size is more than halfway from the equal one to that."""
    errors = []
    for picked in product(*(place.sizes for place in places)):
        sizes = {place.path: size for place, size in zip(places, picked, strict=True)}
        if total(places, sizes, "costs_J") > allowed:
            continue
        if near is not None and any(
            (size - place.sizes[place.equal]) * (near[place.path] - place.sizes[place.equal]) < 0
            or 2 * abs(size - place.sizes[place.equal]) > abs(near[place.path] - place.sizes[place.equal])
            for place, size in zip(places, picked, strict=True)
        ):
            continue
        errors.append(total(places, sizes, "errors_J"))
    return min(errors)


@settings(deadline=None, max_examples=150)
@given(places())
def test_candidates_are_the_best_within_the_budget_of_equal_sizes(places):
    equal = {place.path: place.sizes[place.equal] for place in places}
    allowed = int(total(places, equal, "costs_J"))
    best = best_sizes(places, allowed)
    assert total(places, best, "errors_J") == brute_force(places, allowed)
    middle = halfway(places, allowed, best)
    assert total(places, middle, "costs_J") <= allowed
    assert total(places, middle, "errors_J") == brute_force(places, allowed, near=best)


@settings(deadline=None, max_examples=100)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 0.1]))
def test_what_is_kept_is_never_worse_than_equal_widths(equal, middle, found, least_gain):
    errors = {EQUAL: equal, HALFWAY: middle, FOUND: found}
    kept = best_of(errors, least_gain)
    assert errors[kept] <= equal
    if kept != EQUAL:
        assert errors[kept] < (1 - least_gain) * equal and errors[kept] == min(errors.values())
    else:
        assert min(errors.values()) >= (1 - least_gain) * equal


def recipe_of(**values):
    given = {"method": "dgmr", "keep_ratio": 0.5, "round_to": 8, "repair": {"refit_steps": 20}, "allocate": "auto"}
    return Recipe.parse({**given, "calibrate": {"batch_size": 18, "views": 1}, **values})


@pytest.fixture
def lopsided(build):
    """A model whose first MLP matters and whose second hardly does."""
    model = build("timm-vit").copy()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1e-3)
    return model


@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_views", "judging"),
    [(160, 64, 1, 40), (720, 64, 1, 64), (256, 16, 1, 64), (100, 64, 4, 25), (1800, 64, 1, 72), (3, 64, 1, 3)],
)
def test_enough_images_stay_out_of_fits_to_choose_by(num_images, batch_size, num_views, judging):
    """All images and views stay, each once and in order, in batches that are no larger; 64 or a quarter judge."""
    size = batch_size // num_views
    rows = torch.arange(num_images)
    batches = [torch.cat([part + 10_000 * view for view in range(num_views)]) for part in rows.split(size)]
    split = Split(train=None, calibration=batches, held_out=[], counts={"views": num_views})
    found = with_enough_to_choose(split)
    alone = [batch[: len(batch) // num_views] for batch in found.calibration]
    assert torch.equal(torch.cat(alone), rows)
    for batch, part in zip(found.calibration, alone, strict=True):
        assert torch.equal(batch, torch.cat([part + 10_000 * view for view in range(num_views)]))
        assert len(batch) <= batch_size
    assert torch.equal(torch.cat(choosing_images(found)), rows[-judging:])


def compress(model, recipe, **given):
    return vitrim.compress(model, data=IMAGES, recipe=recipe, quiet=True, **given)


def test_all_that_was_tried_is_told_and_the_recipe_gives_the_plan_again(lopsided, tmp_path, monkeypatch):
    cuts = []
    monkeypatch.setattr(trials, "cut_", lambda *args, cut=trials.cut_, **given: cuts.append(1) or cut(*args, **given))
    out, recipe = tmp_path / "out", recipe_of()
    found = compress(lopsided, recipe, out=out)
    about, widths = found.metrics.allocation, dict(found.plan.widths)
    assert widths == {"blocks.0.mlp": 88, "blocks.1.mlp": 8} and len(cuts) == 3
    assert about["kept"] == FOUND and list(about["tried"]) == [EQUAL, HALFWAY, FOUND]
    assert about["tried"][FOUND]["judged"] == min(errors["judged"] for errors in about["tried"].values())
    (note,) = [note for note in found.metrics.notes if note.startswith("allocate:")]
    assert (
        "on 18 calibration images" in note
        and note.endswith("kept those found.")
        and f"{about['tried'][HALFWAY]['judged']:.4g}" in note
    )
    assert about["relative_error"] == {name: about["tried"][name]["held_out"] for name in (FOUND, EQUAL)}
    assert about["relative_error"][FOUND] == found.metrics.after_cut.fidelity["relative_error"]
    assert json.loads(Path(out / "metrics.json").read_text())["allocation"] == about
    written = Recipe.load(out / "recipe.yaml")
    assert written.steps == recipe.steps
    again = compress(lopsided, written)
    assert again.plan.sha256 == found.plan.sha256 and again.metrics.allocation == about
    known = compress(lopsided, written.updated({"allocate": "uniform", "widths": widths}))
    assert known.plan.sha256 == found.plan.sha256 and known.metrics.allocation is None
    equal = compress(lopsided, written.updated({"allocate": "uniform"}))
    assert equal.metrics.after_cut.fidelity["relative_error"] == about["relative_error"][EQUAL]


def test_errors_that_are_known_need_no_cut(lopsided, tmp_path, monkeypatch):
    recipe = recipe_of(allocate={"cache": str(tmp_path)})
    first = compress(lopsided, recipe)
    done = []
    monkeypatch.setattr(trials, "cut_", lambda *args, **given: done.append(1))
    again = compress(lopsided, recipe)
    assert not done and again.plan.sha256 == first.plan.sha256
    assert again.metrics.allocation == first.metrics.allocation
    other = recipe_of(allocate={"cache": str(tmp_path)}, repair={"refit_steps": 21})
    with pytest.raises(TypeError):  # what they depend on has changed, so the cut that is none is looked at
        monkeypatch.setattr(trials, "cut_", lambda *args, **given: 1 / None)
        compress(lopsided, other)


def test_equal_widths_stay_where_others_are_foreseen_to_save_little(build):
    model = build("timm-vit").copy()
    kept = compress(model, recipe_of())
    about = kept.metrics.allocation
    assert about["kept"] == EQUAL and "tried" not in about
    assert about["predicted"][FOUND] > 0.9 * about["predicted"][EQUAL]
    assert any("allocate: equal widths stay" in note for note in kept.metrics.notes)
    assert kept.metrics.stock
    equal = compress(model, recipe_of(allocate="uniform"))
    assert equal.plan.sha256 == kept.plan.sha256
    assert set(about["relative_error"].values()) == {equal.metrics.after_cut.fidelity["relative_error"]}


def test_equal_widths_stay_where_others_save_too_little_behind_the_cut(lopsided, monkeypatch):
    monkeypatch.setattr(trials, "relative_error", lambda *_: 0.5)
    kept = compress(lopsided, recipe_of())
    assert kept.metrics.allocation["kept"] == EQUAL and kept.metrics.stock
    assert any("kept equal widths; others save too little" in note for note in kept.metrics.notes)
    assert kept.plan.sha256 == compress(lopsided, recipe_of(allocate="uniform")).plan.sha256


def test_equal_widths_that_no_stock_config_can_say_have_no_preference(build, monkeypatch):
    monkeypatch.setattr(phases, "stock_origin", lambda *_: None)
    about = compress(build("timm-vit").copy(), recipe_of(round_to=1)).metrics.allocation
    assert about["predicted"][FOUND] > 0.9 * about["predicted"][EQUAL]
    assert about["tried"][about["kept"]]["judged"] == min(errors["judged"] for errors in about["tried"].values())


def test_nothing_is_tried_twice(lopsided):
    """With multiples of 32, no width lies halfway between 48 and 64 or 32."""
    found = compress(lopsided, recipe_of(round_to=32))
    assert list(found.metrics.allocation["tried"]) == [EQUAL, FOUND]
    assert "halfway" not in str(found.metrics.notes)
