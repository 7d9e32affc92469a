"""How much of the feedback is taken: what pays on tokens that were not fitted, in MLP and attention cuts alike."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch

from tests.support.activations import stored_stats
from vitrim.calibrate import walk
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.ops.feedback import PAYS, STRONGER, aimed, fit_judged
from vitrim.ops.least_squares import fit_output
from vitrim.surgery import KeepUnits, apply_

KEEP = torch.tensor([0, 2, 3])


def problem(num_tokens, *, knowable, bias=True, seed=0):
    """Hidden values, targets, the part of them that is fed back, and a projection; other tokens for another seed.

    `knowable` is the share of what is fed back that hidden values tell.
    """
    generator = torch.Generator()

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    generator.manual_seed(0)
    weight, mix = draw(4, 5), draw(5, 4)
    generator.manual_seed(seed)
    hidden = draw(num_tokens, 5) + 1
    fed = knowable * hidden @ mix + (1 - knowable) * draw(num_tokens, 4)
    target = hidden @ weight.T + 0.1 * draw(num_tokens, 4) + fed
    return hidden, target, fed, weight[:, KEEP], weight[:, 0] if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_tokens", "knowable"), [(8, 0.0), (8, 0.3), (40, 0.5), (200, 1.0)])
def test_the_share_is_the_best_of_all_blends_of_the_target(num_tokens, knowable, bias):
    hidden, target, fed, weight, bias_D = problem(num_tokens, knowable=knowable, bias=bias)
    other, wanted = problem(100, knowable=knowable, bias=bias, seed=1)[:2]
    scale = torch.tensor([1.0, 0.1, 2.0, 0.5], dtype=torch.float64)
    stats = replace(stored_stats(hidden, target), fed=(fed.sum(0), hidden.T @ fed))
    found, found_D, chosen = fit_judged(stats, KEEP, weight, bias_D, (other, wanted), scale, ridge=1e-2, where="here")
    share, ridge, errors = chosen["feedback"], chosen["ridge"], {}
    for percent in range(101):
        blend = stored_stats(hidden, target - (1 - percent / 100) * fed)
        tried, tried_D = fit_output(blend, KEEP, weight, bias_D, ridge=ridge)
        output = other[:, KEEP] @ tried.T + (0.0 if tried_D is None else tried_D)
        errors[percent / 100] = float(((output - wanted) * scale).square().sum())
    assert share == pytest.approx(min(errors, key=errors.get), abs=0.0051)
    blend = stored_stats(hidden, target - (1 - share) * fed)
    expected, expected_D = fit_output(blend, KEEP, weight, bias_D, ridge=ridge)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_D, expected_D)
    for name in ("target_D", "cross_HD"):
        torch.testing.assert_close(getattr(aimed(stats, share), name), getattr(blend, name))


def test_what_cannot_be_known_is_not_fed_back_and_what_can_is():
    for num_tokens, knowable in ((12, 0.0), (400, 1.0)):
        hidden, target, fed, weight, bias_D = problem(num_tokens, knowable=knowable, seed=2)
        stats = replace(stored_stats(hidden, target), fed=(fed.sum(0), hidden.T @ fed))
        held_out = problem(200, knowable=knowable, seed=1)[:2]
        share = fit_judged(stats, KEEP, weight, bias_D, held_out, None, ridge=1e-4, where="here")[2]["feedback"]
        assert share > 0.9 if knowable else share < 0.1


@pytest.mark.parametrize("fed_back", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [4, 8, 30, 400])
def test_the_ridge_is_the_best_of_all_that_are_tried(num_tokens, bias, fed_back):
    hidden, target, fed, weight, bias_D = problem(num_tokens, knowable=0.0, bias=bias)
    other, wanted = problem(100, knowable=0.0, bias=bias, seed=1)[:2]
    stats = replace(stored_stats(hidden, target), fed=(fed.sum(0), hidden.T @ fed) if fed_back else None)
    found, found_D, chosen = fit_judged(stats, KEEP, weight, bias_D, (other, wanted), None, ridge=1e-4, where="here")
    assert ("feedback" in chosen) == fed_back
    errors = []
    for ridge in (1e-4 * stronger for stronger in STRONGER):
        shares = [percent / 100 for percent in range(101)] if fed_back else [1.0]
        tried = [
            fit_output(stored_stats(hidden, target - (1 - share) * fed), KEEP, weight, bias_D, ridge=ridge)
            for share in shares
        ]
        outputs = [other[:, KEEP] @ each.T + (0.0 if each_D is None else each_D) for each, each_D in tried]
        errors.append(min(float((output - wanted).square().sum()) for output in outputs))
    taken = [pytest.approx(1e-4 * stronger) for stronger in STRONGER].index(chosen["ridge"])
    assert errors[taken] <= min(errors) / (1 - PAYS) * (1 + 1e-3)
    assert all(errors[taken] < (1 - PAYS) * error * (1 + 1e-3) for error in errors[:taken])
    output = other[:, KEEP] @ found.T + (0.0 if found_D is None else found_D)
    assert float((output - wanted).square().sum()) == pytest.approx(errors[taken], rel=1e-3)


def test_with_few_tokens_the_ridge_is_wider_than_with_many():
    chosen = []
    for num_tokens in (6, 2000):
        hidden, target, _, weight, bias_D = problem(num_tokens, knowable=0.5)
        held_out = problem(200, knowable=0.5, seed=1)[:2]
        fitted = fit_judged(
            stored_stats(hidden, target), KEEP, weight, bias_D, held_out, None, ridge=1e-6, where="here"
        )
        chosen.append(fitted[2]["ridge"])
    assert chosen[0] > chosen[1]


def vit(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 3}
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, **size).eval().requires_grad_(False)


def images(num_batches, seed):
    return list(torch.randn(4 * num_batches, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).split(4))


@pytest.mark.parametrize("feedback", [0.5, 1.0])
def test_sums_of_what_is_fed_back_are_those_of_the_targets_less_those_without(feedback):
    teacher = vit()
    students = [copy.deepcopy(teacher) for _ in range(2)]
    both = [
        walk(teacher, student, find_mlps(teacher), images(4, 1), feedback=share)
        for student, share in zip(students, (feedback, 0.0), strict=True)
    ]
    for fed, plain in zip(*both, strict=True):
        assert plain.stats.fed is None
        for part, name in zip(fed.stats.fed, ("target_D", "cross_HD"), strict=True):
            difference = getattr(fed.stats, name) - getattr(plain.stats, name)
            torch.testing.assert_close(
                part, difference, atol=1e-5 * float(getattr(plain.stats, name).abs().max()), rtol=0
            )
        torch.testing.assert_close(aimed(fed.stats, 0.0).cross_HD, plain.stats.cross_HD, atol=1e-5, rtol=1e-5)
        for student in students:
            apply_(student, [KeepUnits.first(fed.site, 48)])
    assert float(fed.stats.fed[1].abs().max()) > 1e-3
    for visit in walk(teacher, copy.deepcopy(teacher), find_mlps(teacher), images(4, 1), num_held_out=0):
        assert visit.stats.fed is None  # nobody could judge it


@pytest.mark.parametrize(
    "options", [{"parts": "both"}, {"parts": "attention"}, {"parts": "both", "heads": "whole"}, {}]
)
def test_with_few_tokens_feedback_does_no_harm(options):
    """204 tokens and two blocks of random weights: fed back whole, the error of half of both is 20 times as large."""
    teacher, judged, errors, taken = vit(), images(16, 2), {}, []
    for feedback in (0.0, 1.0):
        student = copy.deepcopy(teacher)
        repair = {"refit": False, "feedback": feedback}
        recipe = Recipe.parse({"method": "dgmr", "keep_ratio": 0.5, "options": options, "repair": repair})
        report = cut_(student, teacher, find_mlps(teacher), recipe, images(4, 1), quiet=True)
        taken.append([row["feedback"] for row in report.errors.values() if "feedback" in row])
        errors[feedback] = fidelity(student, teacher, judged)["relative_error"]
    assert errors[1.0] < 1.1 * errors[0.0]
    assert taken[0] == [] and len(taken[1]) == len(report.errors) and all(0 <= share <= 1 for share in taken[1])
