"""Fitted beside held-out error, and the closed form on half of the images beside all."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from tests.support.activations import inputs_of, targets_of
from tests.support.rescaled import images, tiny_vit
from vitrim import compress
from vitrim.calibrate import walk
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.metrics.fidelity import fidelity
from vitrim.metrics.record import Metrics
from vitrim.models.sites import find_mlps
from vitrim.ops.feedback import PAYS, STRONGER
from vitrim.ops.least_squares import fit_output
from vitrim.repair.learning import ALL, ENERGY, HALF, learning_curve
from vitrim.surgery import KeepUnits, apply_, mlp_output, read_weights

BATCHES = images(80, 1)  # 5 of 16: two, two more, and one that judges
CLOSED = {"keep_ratio": 0.5, "repair": {"refit": False}}


@pytest.mark.parametrize("vit", ["gelu", "layer-scale", "swiglu"])
def test_both_fits_are_judged_as_if_each_had_been_made(vit):
    model = tiny_vit(vit, depth=2)
    sites = find_mlps(model)
    student = copy.deepcopy(model)
    report = cut_(student, model, sites, Recipe.parse(CLOSED), BATCHES, quiet=True, halves=True)
    first = sites[0]
    keep = torch.tensor(report.plan.edits[0].keep)
    for key, fitted_on in ((HALF, BATCHES[:2]), (ALL, BATCHES[:4])):
        again = copy.deepcopy(model)
        visit = next(iter(walk(model, again, [first], [*fitted_on, BATCHES[-1]])))
        start = read_weights(model, first)
        tried = []
        for stronger in STRONGER:
            given = (start.output_DH[:, keep], start.output_bias_D)
            weight, bias = fit_output(visit.stats, keep, *given, ridge=1e-4 * stronger)
            fitted = copy.deepcopy(again)
            apply_(fitted, [KeepUnits(site=first, keep=tuple(keep.tolist())).with_output(weight, bias)])
            with torch.no_grad():
                error = mlp_output(fitted, first, inputs_of(visit.held_out)) - targets_of(visit.held_out)
            scale = 1.0 if visit.scale_D is None else visit.scale_D
            tried.append(float((error * scale).square().sum(1).mean()))
        found = report.errors[first.path][key]
        assert found == pytest.approx(min(tried, key=lambda error: abs(error - found)), rel=1e-4)
        assert found <= min(tried) / (1 - PAYS) * (1 + 1e-4)
    assert report.errors[first.path][ENERGY] > report.errors[first.path][ALL] > 0


def test_halves_change_no_cut_and_cost_nothing_where_nobody_asks():
    model = tiny_vit("gelu", depth=1)
    plans = []
    for halves in (False, True):
        student = copy.deepcopy(model)
        report = cut_(student, model, find_mlps(model), Recipe.parse(CLOSED), BATCHES, quiet=True, halves=halves)
        plans.append(report.plan.sha256)
        assert all((HALF in row) == halves for row in report.errors.values())
    assert plans[0] == plans[1]


def curve(of_half: float, of_all: float, num_views: int = 1):
    batches = [torch.zeros(size * num_views, 1) for size in (40, 40, 80, 32)]
    errors = {"a": {HALF: of_half, ALL: of_all, ENERGY: 1.0}, "attention": {"repaired": 0.1}}
    return learning_curve(errors, batches, num_held_out=1, num_views=num_views)


def test_an_error_that_falls_with_one_over_images_is_carried_on():
    n_half, n_all = 40, 160  # of three batches one makes the first half
    found = curve(0.2 + 8 / n_half, 0.2 + 8 / n_all, num_views=3)
    assert (found.num_half, found.num_images, found.num_held_out) == (n_half, n_all, 32)
    assert found.error_of_twice == pytest.approx(0.2 + 8 / (2 * n_all))
    assert all(text in found.note for text in ("40 images were fitted", "0.225 where 320 are", "1 MLPs, 32 images"))


@pytest.mark.parametrize("of_half", [0.252, 0.25, 0.2])
def test_nothing_is_said_where_more_images_would_hardly_help(of_half):
    found = curve(of_half, 0.25)
    assert found.note is None and found.error_of_twice <= found.error


def test_a_single_fitted_batch_has_no_half():
    model = tiny_vit("gelu", depth=1)
    report = cut_(
        copy.deepcopy(model), model, find_mlps(model), Recipe.parse(CLOSED), BATCHES[:2], quiet=True, halves=True
    )
    assert learning_curve(report.errors, BATCHES[:2], num_held_out=1) is None


def test_a_run_shows_fitted_beside_held_out_error_with_their_images():
    model = tiny_vit("gelu", depth=2)
    data = torch.cat(images(200, 3))
    calibrate = {"batch_size": 32, "views": 2}
    result = compress(model, data=data, recipe={**CLOSED, "calibrate": calibrate, "device": "cpu"}, quiet=True)
    metrics = result.metrics
    cut = metrics.after_cut
    assert (cut.fitted["num_images"], cut.num_images) == (17, metrics.images["held_out"])  # a tenth of 176
    assert cut.fitted["relative_error"] < cut.relative_error
    assert {metrics.learning[key] for key in ("num_half", "num_images")} == {80, 176}
    rows = {row[0]: row for row in result.table()[1]}
    assert rows["relative error, fitted images"][-1] == "17"
    assert Metrics.from_json(json.loads(json.dumps(metrics.to_json()))).after_cut == cut


def test_without_repair_no_image_was_fitted():
    result = compress(
        tiny_vit("gelu", depth=1),
        data=torch.cat(images(64, 3)),
        recipe={"keep_ratio": 0.5, "repair": False, "device": "cpu"},
        quiet=True,
    )
    assert not result.metrics.after_cut.fitted and result.metrics.learning is None


def test_fitted_images_are_those_of_the_sums():
    from vitrim.compression.judging import fitted_images
    from vitrim.data import open_images, split_images

    recipe = Recipe.parse({**CLOSED, "calibrate": {"views": 3, "batch_size": 30}})
    split = split_images(open_images(torch.cat(images(160, 5))), recipe)
    found = torch.cat(fitted_images(split, recipe))
    known = {image.numpy().tobytes() for batch in split.calibration[:-1] for image in batch[: len(batch) // 3]}
    assert len(found) == 16 == split.counts["held_out"] and {image.numpy().tobytes() for image in found} <= known
    model = tiny_vit("gelu", depth=1)
    assert fidelity(model, model, [found])["num_images"] == len(found)
