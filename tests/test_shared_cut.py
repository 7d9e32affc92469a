"""A cut by several processes against that by one, on the same calibration images."""

import copy

import pytest
import torch

from tests.support.models import build_case
from tests.support.processes import run_python
from tests.support.threads import in_threads
from tests.support.three_cut import RECIPE, images, vit
from vitrim.calibrate.walk import walk
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import ModelError
from vitrim.models.sites import find_mlps


def cut(model, recipe, batches, num, **given):
    """The report and the student of each of so many that share the images."""

    def work(share):
        student = copy.deepcopy(model)
        return cut_(student, copy.deepcopy(model), find_mlps(model), recipe, batches, quiet=True, share=share), student

    return in_threads(num, work)


def furthest(one, other):
    """The largest distance of a tensor, relative to its size."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def picks(report):
    return report.plan.without_tensors().edits


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num", [2, 3])
def test_several_cut_as_one(depth, num):
    model, recipe = vit(depth), Recipe.parse(RECIPE)
    [(report, student)] = cut(model, recipe, images(), 1)
    every = cut(model, recipe, images(), num)
    for found, other in every:
        assert picks(found) == picks(report)
        assert furthest(other, every[0][1]) == 0
        assert furthest(other, student) < 1e-6
        for path, errors in report.errors.items():
            assert found.errors[path] == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize(
    "name, given",
    [
        ("timm-split-norm", {}),
        ("timm-vit-scaled", {"options": {"parts": "both"}}),
        ("timm-vit-scaled", {"options": {"parts": "both", "heads": "whole", "select_on": "features"}}),
        ("timm-swin", {"repair": False}),
        ("hf-bert", {}),
    ],
)
def test_norms_heads_windows_and_texts_are_cut_as_by_one(name, given, num):
    """The cases have four batches, one of them held out: of three processes, one of the two with one has no other."""
    built, recipe = build_case(name), Recipe.parse({**RECIPE, **given})
    [(report, student)] = cut(built.model, recipe, built.batches, 1)
    for found, other in cut(built.model, recipe, built.batches, num):
        assert picks(found) == picks(report)
        assert furthest(other, student) < 1e-6


@pytest.mark.parametrize("num_batches", [1, 2])
def test_processes_without_images_take_part(num_batches):
    model, recipe = vit(2), Recipe.parse({**RECIPE, "options": {"parts": "both"}})
    [(report, student)] = cut(model, recipe, images(num_batches), 1)
    for found, other in cut(model, recipe, images(num_batches), 3):
        assert picks(found) == picks(report)
        assert furthest(other, student) < 1e-6


def test_each_runs_its_own_images_alone():
    model, seen = vit(1), {}

    def work(share):
        student, rows = copy.deepcopy(model), seen.setdefault(share.rank, [])
        student.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        sites = find_mlps(model)
        return next(walk(copy.deepcopy(model), student, sites, images(7), num_held_out=2, halves=True, share=share))

    [alone] = in_threads(1, work)
    assert len(seen.pop(0)) > 7
    every = in_threads(3, work)
    assert [len(rows) for rows in (seen[1], seen[2])] == [2 + 1] * 2  # the whole model once, and its own two batches
    for visit in every:
        for found, wanted in ((visit.stats, alone.stats), (visit.half, alone.half)):
            torch.testing.assert_close(found.hidden_HH, wanted.hidden_HH, rtol=1e-12, atol=1e-12)
            assert found.num_tokens == wanted.num_tokens
    for name in ("fit", "held_out"):
        lanes = [lane for visit in every for lane in getattr(visit, name).lanes]
        wanted = {tuple(lane.numbers_N.tolist()): lane for lane in getattr(alone, name).lanes}
        assert len(lanes) == len(wanted)
        for lane in lanes:
            same = wanted[tuple(lane.numbers_N.tolist())]
            assert torch.equal(lane.inputs_ND, same.inputs_ND) and torch.equal(lane.targets_ND, same.targets_ND)


def test_what_is_not_finite_on_one_is_refused_by_all():
    model, batches, said = vit(1), images(4), []
    batches[3] = batches[3] * float("nan")  # held out, by the second process

    def work(share):
        with pytest.raises(ModelError) as caught:
            next(walk(copy.deepcopy(model), copy.deepcopy(model), find_mlps(model), batches, share=share))
        said.append(str(caught.value))

    in_threads(2, work)
    assert len(said) == 2 and said[0] == said[1] and "held_out" in said[0]


def test_methods_for_whole_models_lead_to_one_student():
    """They run by themselves on each process; what is repaired behind them is shared."""
    model = vit(2)
    later = {"method": "dgmr", "repair": RECIPE["repair"]}
    recipe = Recipe.parse({"steps": [{"method": "vbp", "keep_ratio": 0.5}, later]})
    [(_, student)] = cut(model, recipe, images(), 1)
    every = cut(model, recipe, images(), 2)
    assert furthest(every[1][1], every[0][1]) == 0
    assert furthest(every[0][1], student) < 1e-6


def test_three_processes_cut_as_one(tmp_path):
    done = run_python("-m", "tests.support.three_cut", tmp_path, processes=3)
    assert done.returncode == 0, done.stderr[-4000:]
    main, *others = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(3))
    for depth, found in main.items():
        model = vit(depth)
        [(report, student)] = cut(model, Recipe.parse(RECIPE), images(), 1)
        assert found["edits"] == picks(report)
        for name, tensor in student.state_dict().items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-6, atol=1e-7)
            assert all(torch.equal(other[depth]["weights"][name], found["weights"][name]) for other in others)
