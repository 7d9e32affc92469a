"""Finite in, finite out: broken images are counted and left out by every method and door, and sums are checked."""

import copy
import json
import logging
import math
from dataclasses import replace

import pytest
import torch

import vitrim
from tests.support.checkpoints import VIT, timm_folder
from tests.support.digits import DIGITS
from tests.support.models import build_case
from vitrim.calibrate import walk
from vitrim.data import first_images, open_images
from vitrim.data.inputs import open_inputs
from vitrim.data.pixels import distinct, usable
from vitrim.errors import DataError, ModelError
from vitrim.methods import METHODS
from vitrim.metrics.fidelity import fidelity
from vitrim.metrics.record import Closeness, Metrics, ModelCost
from vitrim.ops import least_squares
from vitrim.ops.least_squares import WIDE_RIDGE, fit_output, ridge_for
from vitrim.output.load import open_encoder
from vitrim.repair.refit import improve_
from vitrim.storage.documents import write_json

IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
QUICK = {
    "fips": {"steps": 2},
    "moefication": {"num_experts": 4, "epochs": 1},
    "amp": {"trials": 1, "rounds": 1},
    "lora-prune": {"steps": 2},
}
BROKEN = [(0, math.nan), (11, math.nan), (5, 1e30), (5, -math.inf)]


def broken(place, value):
    """The images, with one value of one of them replaced."""
    images = IMAGES.clone()
    images[place, 1, 2, 3] = value
    return images


def assert_same(one, two):
    mine, theirs = one.state_dict(), two.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def method(name):
    return METHODS[name](**QUICK.get(name, {}))


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, "vitrim")
    return caplog


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_what_it_gives_without_the_broken_image(name, told):
    original = build_case("timm-vit").model
    budget = {} if METHODS[name].takes == "nothing" else {"keep_ratio": 0.5}
    budget |= {"repair": vitrim.RepairOptions(refit=False)} if METHODS[name].repairs else {}
    for place, value in [BROKEN[0], BROKEN[1], BROKEN[2]]:
        found, expected = copy.deepcopy(original), copy.deepcopy(original)
        rest = [image for at, image in enumerate(IMAGES) if at != place]
        vitrim.prune_(found, method(name), list(broken(place, value).split(6)), **budget)
        batches = [torch.stack(rest[: 5 if place < 6 else 6]), torch.stack(rest[5 if place < 6 else 6 :])]
        vitrim.prune_(expected, method(name), batches, **budget)
        assert_same(found, expected)
    assert "prune_: 1 of 12 images were left out; the first: image 5 of batch 1 holds nan at (1, 2, 3)" in told.text
    assert "holds 1e+30 at (1, 2, 3), and 1 such values" in told.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_any_float_type_give_what_the_same_values_in_float32_give(dtype, tmp_path):
    images, case, given = IMAGES.half(), build_case("timm-vit"), {"keep_ratio": 0.5, "quiet": True}
    first, second = (
        vitrim.compress(case.copy(), data=images.to(kind), out=tmp_path / str(kind), **given)
        for kind in (dtype, torch.float32)
    )
    assert_same(first.model, second.model)
    one, two = case.copy(), case.copy()
    for model, kind in ((one, dtype), (two, torch.float32)):
        vitrim.prune_(model, batches=[images.to(kind)], keep_ratio=0.5)
    assert_same(one, two)


@pytest.mark.parametrize("place, value", BROKEN)
def test_compress_counts_a_broken_image_and_names_it(place, value):
    recipe = {"method": "dgmr", "keep_ratio": 0.5, "repair": {"refit": False}}
    found = vitrim.compress(build_case("timm-vit").model, data=broken(place, value), recipe=recipe, quiet=True)
    assert found.metrics.images["skipped"] == 1
    said = [note for note in found.metrics.notes if "left out" in note]
    assert len(said) == 1 and f"image {place}," in said[0] and f"holds {value:g} at (1, 2, 3)" in said[0]
    assert all(torch.isfinite(tensor).all() for tensor in found.model.state_dict().values())
    assert math.isfinite(found.metrics.after_cut.relative_error)


def test_file_to_file_and_evaluate_leave_it_out_too(tmp_path, told):
    source = timm_folder(tmp_path / "source", "vit_tiny_patch16_224", VIT)
    recipe = {"method": "dgmr", "repair": {"refit": False}}
    found = vitrim.prune_checkpoint(source, tmp_path / "out", recipe=recipe, data=broken(3, math.nan), quiet=True)
    assert found.metrics.images == {"calibration": 11, "views": 4} and "image 3," in "".join(found.metrics.notes)
    judged = vitrim.evaluate(str(tmp_path / "out"), f"local-dir:{source}", broken(3, 1e30), latency=False)
    assert (judged.num_images, judged.num_skipped) == (11, 1) and math.isfinite(judged.fidelity["relative_error"])
    assert "image 3, OSError: holds 1e+30" in told.text


def test_an_image_beside_which_all_others_vanish_is_left_out_and_one_that_is_only_bright_is_not():
    for factor, num_left in ((1e12, 11), (1e5, 12)):
        images = IMAGES.clone()
        images[4] *= factor
        opened = open_images(images)
        batches, num_skipped = first_images(opened, 12, seed=0)
        assert (sum(map(len, batches)), num_skipped) == (num_left, 12 - num_left)
    with pytest.raises(DataError, match=r"me: none of 12 images can be used; image 0 of batch 0 holds nan"):
        usable([torch.full_like(IMAGES, math.nan)], "me")


def test_sums_that_are_not_finite_name_the_mlp_before_anything_is_solved():
    case = build_case("timm-vit")
    model = case.copy()
    model.blocks[1].mlp.act = torch.nn.Hardtanh(-math.inf, math.inf)  # passes all on
    torch.nn.init.constant_(model.blocks[1].norm2.weight, 1e38)
    model.blocks[1].mlp.fc1.weight.data.mul_(1e3)  # beyond float32, whatever its random weights are
    with pytest.raises(ModelError, match=r"^blocks\.1\.mlp: the sum \w+ over \d+ tokens is not finite"):
        list(walk(model, copy.deepcopy(model), case.sites, case.batches))
    stats = replace(next(walk(case.model, case.copy(), case.sites, case.batches)).stats)
    sick = replace(stats, hidden_HH=-stats.hidden_HH)
    with pytest.raises(ModelError, match=r"^here: the sums of its 96 kept units are not positive definite at a ridge"):
        fit_output(sick, torch.arange(96), torch.zeros(32, 96), None, ridge=1e-4, where="here")


def test_a_held_out_error_that_is_no_number_is_an_error_and_a_diverged_refit_is_said(told):
    layer = torch.nn.Linear(2, 2)
    start = copy.deepcopy(layer.state_dict())
    given = {"losses": lambda: [layer.weight.sum()], "num_steps": 2, "lr": 1e-3, "where": "blocks.0.mlp"}
    with pytest.raises(ModelError, match=r"^blocks\.0\.mlp: the held-out error is nan before anything"):
        improve_(layer, list(layer.parameters())[:1], judge=lambda: math.nan, **given)
    errors = iter([2.0, math.nan])
    assert improve_(layer, list(layer.parameters())[:1], judge=lambda: next(errors), **given) == (2.0, 2.0)
    assert "blocks.0.mlp: training diverged (error nan) and was undone" in told.text
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in start.items())


@pytest.mark.parametrize("data", [IMAGES[:1], IMAGES[:1].repeat(20, 1, 1, 1)])
def test_one_image_and_its_copies_judge_nothing(data, tmp_path):
    recipe = {"method": "random", "keep_ratio": 0.5, "repair": {"refit": False}, "calibrate": {"views": 1}}
    out = tmp_path / "out" if len(data) == 1 else None
    found = vitrim.compress(build_case("timm-vit").model, data=data, recipe=recipe, out=out, quiet=True)
    assert found.metrics.after_cut is None and found.metrics.images["held_out"] == 0
    notes = "\n".join(found.metrics.notes)
    assert "quality was not measured: no image differs from those used for calibration" in notes
    assert f"17 calibration tokens can't determine a fit of 48 units: its ridge is {WIDE_RIDGE:g}" in notes
    assert ("are exact copies of others" in notes) == (len(data) > 1)
    with pytest.raises(DataError, match="quality was not measured"):
        vitrim.compress(build_case("timm-vit").model, data=data, recipe=recipe, recover_steps=2, quiet=True)


def test_a_held_out_image_is_no_copy_of_a_calibration_image():
    recipe = {"method": "random", "keep_ratio": 0.5, "repair": False}
    data = torch.cat([IMAGES, IMAGES])
    images = vitrim.compress(build_case("timm-vit").model, data=data, recipe=recipe, quiet=True).metrics.images
    assert images["calibration"] == 12 and images["held_out"] == 0
    batches, num_repeated = distinct(list(data.split(5)))
    assert torch.equal(torch.cat(batches), IMAGES) and num_repeated == 12


def test_a_ridge_is_widened_for_too_few_tokens_only():
    assert [ridge_for(tokens, 48, 1e-4) for tokens in (17, 48, 49)] == [WIDE_RIDGE, WIDE_RIDGE, 1e-4]
    assert ridge_for(17, 48, 0.5) == 0.5


def test_a_fit_on_one_blank_image_is_better_on_others_than_none_and_than_with_a_narrow_ridge(monkeypatch):
    model, origin = open_encoder(DIGITS)
    others = [image for image, _ in (open_inputs("digits", origin, split="test")[at] for at in range(24))]
    errors = []
    for repair, wide in (
        (False, 1e-2),
        (vitrim.RepairOptions(refit=False), 1e-4),
        (vitrim.RepairOptions(refit=False), 1e-2),
    ):
        monkeypatch.setattr(least_squares, "WIDE_RIDGE", wide)
        student = copy.deepcopy(model)
        vitrim.prune_(student, "random", [-torch.ones_like(others[0])[None]], keep_ratio=0.4, repair=repair)
        errors.append(fidelity(student, model, [torch.stack(others)])["relative_error"])
    assert errors[2] < 0.7 * min(errors[:2])


def test_metrics_are_json_without_nan_or_infinity(tmp_path):
    cost = ModelCost(parameters=1)
    judged = Closeness(fidelity={"relative_error": math.inf, "cosine": 1.0}, blocks=[{"relative_error": math.nan}])
    metrics = Metrics(model="m", method="random", before=cost, after=cost, after_cut=judged, seconds=math.nan)
    write_json(tmp_path / "metrics.json", metrics.to_json())
    text = (tmp_path / "metrics.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))
    assert read["after_cut"]["fidelity"] == {"relative_error": None, "cosine": 1.0} and read["seconds"] is None
    assert "after_cut.fidelity.relative_error: is not a finite number, so it is left out." in read["notes"]
    assert math.isnan(Metrics.from_json({**read, "seconds": 0.0}).after_cut.relative_error)
    write_json(tmp_path / "other.json", {"a": [math.nan, (1, -math.inf)]})
    assert json.loads((tmp_path / "other.json").read_text()) == {"a": [None, [1, None]]}
