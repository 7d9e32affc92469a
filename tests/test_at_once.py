"""All blocks at once: gradients are those of each block alone; runs resume, are shared, and never make it worse."""

from __future__ import annotations

import copy
import json
import textwrap

import pytest
import timm
import torch

import vitrim
from tests.support.blocks import IMAGES, cut
from tests.support.distillation import Broken, assert_equal, make_student, make_teacher, stopped_at, train, weights
from tests.support.processes import run_python
from vitrim.compression import phases
from vitrim.config.options import AtOnceOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import open_images
from vitrim.errors import Interrupted, ModelError, RecipeError
from vitrim.metrics.judging import features_on_cpu, relative_error
from vitrim.models.features import first_tensor
from vitrim.recover import at_once, distill
from vitrim.recover.at_once import LocalRun, train_at_once_
from vitrim.recover.sampler import MicroBatch
from vitrim.recover.snapshot import take_snapshot

KINDS = ("timm-vit-scaled", "timm-packed", "timm-post-norm", "timm-parallel", "timm-swin", "encoder-pre-norm", "hf-vit")
HELD_OUT = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))]
TEXTS = open_images([(row, -1) for row in torch.randint(20, (30, 7), generator=torch.Generator().manual_seed(3))])


def calls_of(model, blocks, images):
    """Arguments and output of each block in one pass."""
    seen = {}
    handles = [
        model.get_submodule(block).register_forward_hook(
            lambda _, args, kwargs, output, block=block: seen.update({block: (args, kwargs, first_tensor(output))}),
            with_kwargs=True,
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", [*KINDS, "timm-hiera", "hf-clip", "hf-bert"])
def test_the_gradient_of_a_block_is_that_of_the_block_alone_on_the_students_own_stream(build, name):
    case = build(name)
    student, images = cut(case), TEXTS if name == "hf-bert" else IMAGES
    held_out = [torch.stack([images[i][0] for i in range(4)])]
    batch = torch.stack([images[i][0] for i in range(4, 9)])
    options = RecoverOptions(steps=1, batch_size=5)
    run = LocalRun(
        student, case.model, images=images, held_out=held_out, options=options, context=RunContext(quiet=True)
    )
    blocks = list(dict.fromkeys(site.block for site in case.sites))
    energy = {block: call[2].square().mean() for block, call in calls_of(case.model, blocks, held_out[0]).items()}
    theirs, ours = (calls_of(model, blocks, batch) for model in (case.model, student))
    with run.trainable():
        run._loss(MicroBatch(batch, torch.arange(5), 0, torch.full((5,), -1))).backward()
        found = {name: p.grad.clone() for name, p in run.named_parameters().items()}
    expected = {}
    for block in blocks:
        args, kwargs, _ = ours[block]
        output = first_tensor(student.get_submodule(block)(*args, **kwargs))
        ((output - theirs[block][2]).square().mean() / energy[block] / len(blocks)).backward()
        expected |= {f"{block}.{name}": p.grad for name, p in student.get_submodule(block).named_parameters()}
        student.zero_grad()
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert found.keys() == expected.keys() and len(found) >= 4 * len(blocks)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_it_lowers_the_error_on_held_out_images_and_touches_blocks_alone(build, name):
    case = build(name)
    student = cut(case)
    start, teacher, flags = weights(student), weights(case.model), [p.requires_grad for p in student.parameters()]
    judged = [(batch, features_on_cpu(case.model, batch, "final")) for batch in HELD_OUT]
    before = relative_error(student, judged, "final")
    options = AtOnceOptions(steps=40, batch_size=10, num_validations=4)
    found = train_at_once_(
        student, case.model, IMAGES, held_out=HELD_OUT, options=options, context=RunContext(quiet=True)
    )
    after = relative_error(student, judged, "final")
    assert found.curve[0]["relative_error"] == pytest.approx(before, rel=1e-4)
    assert found.best_error == pytest.approx(after, rel=1e-4) and after < before and found.improved
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed and all(name.startswith(tuple(f"{site.block}." for site in case.sites)) for name in changed)
    assert_equal(weights(case.model), teacher)
    assert [p.requires_grad for p in student.parameters()] == flags
    assert all(p.grad is None for p in student.parameters())


def test_where_nothing_is_better_the_start_comes_back_and_that_is_said():
    teacher = make_teacher()
    student = copy.deepcopy(teacher)
    start = weights(student)
    found = train(student, teacher)
    assert_equal(weights(student), start)
    assert found.best_step == 0 and found.notes[-1].startswith("all blocks at once did not improve on the cut")


def test_weights_and_their_average_are_both_judged_and_the_better_counts():
    teacher = make_teacher()
    errors = {ema: train(make_student(teacher), teacher, ema=ema, lr=1.0).curve[1:] for ema in (0.0, 0.5)}
    raw, both = ([point["relative_error"] for point in errors[ema]] for ema in (0.0, 0.5))
    assert all(second <= first for first, second in zip(raw, both, strict=True)) and both < raw


@pytest.mark.parametrize("values", [{"lr": None}, {"ema": 0.0}])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, values):
    teacher = make_teacher()
    whole, again = make_student(teacher), make_student(teacher)
    expected = train(whole, teacher, **values)
    told = r"all blocks at once stopped at step [45] of 12; continue with --resume"
    with stopped_at(LocalRun, 4), pytest.raises(Interrupted, match=told):
        train(make_student(teacher), teacher, work=tmp_path, **values)
    result = train(again, teacher, work=tmp_path, resume=True, **values)
    assert_equal(weights(whole), weights(again))
    assert result.curve == expected.curve and result.lr == expected.lr


def test_a_run_that_was_killed_before_its_first_step_goes_on_bit_for_bit(tmp_path, monkeypatch):
    teacher = make_teacher()
    whole, again = make_student(teacher), make_student(teacher)
    expected = train(whole, teacher)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "_loop", lambda run, *_: take_snapshot(run) and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(make_student(teacher), teacher, work=tmp_path)
    assert train(again, teacher, work=tmp_path, resume=True).curve == expected.curve
    assert_equal(weights(whole), weights(again))


def test_images_that_cannot_be_read_are_left_out():
    teacher = make_teacher()
    student = make_student(teacher)
    found = train(student, teacher, images=open_images(Broken(16, bad=set(range(8)))), steps=4)
    assert found.improved and "could not be read" in " ".join(found.notes)


def test_bf16_takes_nearly_the_same_steps():
    teacher = make_teacher()
    full, half = make_student(teacher), make_student(teacher)
    first, second = (train(s, teacher, precision=how) for s, how in ((full, "fp32"), (half, "bf16")))
    assert first.best_error != second.best_error == pytest.approx(first.best_error, rel=0.03)


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, sys, torch
            from pathlib import Path
            torch.set_num_threads(1)
            from tests.support.distillation import make_student, make_teacher, train, weights
            teacher = make_teacher()
            student = make_student(teacher)
            work = Path(sys.argv[1])
            found = train(student, teacher, work=work, lr=None)
            if int(os.environ.get("RANK", 0)) == 0:
                torch.save(weights(student), work / "weights.pt")
                (work / "curve.json").write_text(json.dumps(found.curve))
            """
        )
    )
    found = []
    for processes in (None, 2):
        work = tmp_path / str(processes)
        work.mkdir()
        done = run_python(script, work, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        curve = json.loads((work / "curve.json").read_text())
        found.append((torch.load(work / "weights.pt", weights_only=True), curve))
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, atol=2e-4, rtol=1e-3)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_a_recipe_trains_at_once_before_it_distils_and_the_stages_resume(build, tmp_path, monkeypatch):
    case = build("timm-vit")
    images = [IMAGES[i][0] for i in range(30)]
    recipe = {"mlp_ratio": 1, "repair": False, "at_once": {"steps": 12, "batch_size": 8}}
    recipe |= {"recover": {"steps": 4, "batch_size": 8, "lr": 1e-4}}
    given = {"data": images, "quiet": True, "device": "cpu"}
    whole = vitrim.compress(case.model, recipe=recipe, **given)
    found = whole.metrics.at_once
    assert found["best_error"] < found["curve"][0]["relative_error"]
    assert found["best_error"] == pytest.approx(whole.metrics.recovery["curve"][0]["relative_error"], rel=1e-4)
    real, calls = at_once.LocalRun.train_step, []

    def stop(validation):
        if validation.step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vitrim.compress(case.model, recipe=recipe, out=tmp_path / "out", on_validation=stop, **given)
    monkeypatch.setattr(at_once.LocalRun, "train_step", lambda *a, **k: calls.append(a) or real(*a, **k))
    again = vitrim.compress(case.model, recipe=recipe, out=tmp_path / "out", resume=True, **given)
    assert not calls and again.metrics.at_once["curve"] == found["curve"]
    assert_equal(weights(again.model), weights(whole.model))


def test_what_does_not_fit_is_refused_beforehand(build):
    with pytest.raises(RecipeError, match="at_once: replace-me takes blocks out"):
        Recipe.parse({"method": "replace-me", "at_once": {}})
    with pytest.raises(RecipeError, match=r"at_once\.fsdp"):
        Recipe.parse({"at_once": {"fsdp": True}})
    with pytest.raises(RecipeError, match="needs images"):
        vitrim.compress(build("timm-vit").model, recipe={"at_once": {}}, quiet=True)


def test_a_block_that_runs_twice_is_refused(build):
    model = build("timm-vit").copy()
    model.blocks[1] = model.blocks[0]
    with pytest.raises(ModelError, match=r"the 1 blocks of VisionTransformer run 2 times in a pass"):
        train_at_once_(
            copy.deepcopy(model), model, IMAGES, held_out=HELD_OUT, options=AtOnceOptions(steps=1), context=None
        )


@pytest.mark.parametrize("size_is_known", [True, False])
def test_a_block_that_runs_twice_is_refused_before_anything_is_cut(monkeypatch, size_is_known):
    def too_late(*_, **__):
        raise AssertionError("images were read, or the model was cut")

    monkeypatch.setattr(phases, "split_images" if size_is_known else "cut_", too_late)
    if not size_is_known:
        monkeypatch.setattr(phases, "random_inputs", lambda _: None)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    model.blocks[1] = model.blocks[0]
    data = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match="the 1 blocks of VisionTransformer run 2 times"):
        vitrim.compress(model, data=data, recipe={"at_once": {}, "device": "cpu"}, quiet=True)
