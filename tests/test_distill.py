"""Recovery by distillation: what it must never do, and that a stopped run goes on bit for bit."""

import json
import math
import os
import signal
import textwrap

import pytest
import torch

from tests.support.distillation import (
    HELD_OUT,
    Broken,
    assert_equal,
    make_images,
    make_student,
    make_teacher,
    poison,
    run,
    weights,
)
from tests.support.processes import run_python
from vitrim.config.options import RecoverOptions
from vitrim.config.published import family_of
from vitrim.data import open_images
from vitrim.errors import Interrupted, OutputError, RecipeError
from vitrim.recover.distill import recover_
from vitrim.recover.losses import feature_loss
from vitrim.recover.range_test import RATES
from vitrim.recover.result import Recovery
from vitrim.recover.schedule import rate_shape
from vitrim.tokens import Features


def test_the_loss_is_the_sum_of_two_means_and_zero_for_equal_features():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (
        Features(
            pooled_BD=torch.randn(2, 4, generator=generator), patches_BND=torch.randn(2, 3, 4, generator=generator)
        )
        for _ in range(2)
    )
    slow = sum(
        float(((a - b) ** 2).sum()) / a.numel()
        for a, b in ((mine.pooled_BD, theirs.pooled_BD), (mine.patches_BND, theirs.patches_BND))
    )
    assert float(feature_loss(mine, theirs)) == pytest.approx(slow, rel=1e-6)
    assert float(feature_loss(mine, mine)) == 0


def test_recovery_brings_the_student_closer_and_leaves_the_teacher_alone():
    teacher = make_teacher()
    student = make_student(teacher)
    before = weights(teacher)
    result = run(student, teacher, options={"steps": 40})
    assert result.best_error < 0.8 * result.curve[0]["relative_error"]
    assert_equal(before, teacher.state_dict())
    assert all(p.grad is None for p in [*teacher.parameters(), *student.parameters()])
    assert all(p.requires_grad for p in student.parameters())


def test_recovery_never_returns_worse_than_the_start():
    teacher = make_teacher()
    student = make_student(teacher)
    start = weights(student)
    result = run(student, teacher, options={"lr": 10.0, "steps": 6})
    assert result.best_step == 0
    assert_equal(start, student.state_dict())
    first, last = (f"{result.curve[place]['relative_error']:.4g}" for place in (0, -1))
    assert result.num_images >= 6 * 8 and result.seconds > 0
    assert result.notes[-1] == (
        f"recovery did not improve on the cut, which was kept: error {first} at the start and {last} at step "
        f"{result.curve[-1]['step']}, on 8 held-out images. It took {result.cost()}."
    )
    assert not any("did not improve" in note for note in run(student, teacher, options={"steps": 20}).notes)


def test_an_end_worse_than_the_start_is_said_even_where_a_better_state_was_kept():
    curve = [{"step": step, "relative_error": error} for step, error in ((0, 0.2), (10, 0.1), (20, 0.3))]
    found = Recovery(curve=curve, best_step=10, best_error=0.1, num_steps=20, num_test_steps=2, num_images=176)
    assert found.verdict(60) == [
        "recovery got worse again: error 0.2 at the start and 0.3 at step 20, on 60 held-out images. The state of step "
        "10 was kept (0.1). It took 20 steps and 2 of the range test, 176 images seen, 0 s."
    ]
    assert Recovery(curve=curve[:2], best_step=10, best_error=0.1).verdict(60) == []
    assert not Recovery(curve=curve[:1], best_step=0, best_error=0.2).improved


@pytest.mark.parametrize("steps", [1, 100, 400])
def test_the_range_test_takes_a_tenth_of_the_steps_at_most(monkeypatch, steps):
    """Or a single step for each rate, where a tenth is less than that."""
    teacher = make_teacher()
    student, done = make_student(teacher), []
    monkeypatch.setattr("vitrim.recover.distill._loop", lambda *_: None)  # the test alone
    monkeypatch.setattr("vitrim.recover.run.Run.train_step", lambda self, batches, lr=None: done.append(lr) or 0.0)
    errors = iter([1.0, *(2.0 - 0.1 * number for number in range(99))])  # every rate is tried
    monkeypatch.setattr("vitrim.recover.judge.relative_error", lambda *_: next(errors))
    found = run(student, teacher, options={"optimizer": "adamw", "lr": None, "steps": steps, "num_validations": 1})
    assert len(found.rate_test) == len(RATES)
    assert len(RATES) <= len(done) == found.num_test_steps <= max(len(RATES), steps / 10)


def test_labels_change_nothing():
    plain = make_images(16)
    results = []
    for labels in (None, [0] * 16, list(range(16))):
        items = [plain[i][0] if labels is None else (plain[i][0], labels[i]) for i in range(16)]
        teacher = make_teacher()
        student = make_student(teacher)
        run(student, teacher, images=open_images(items))
        results.append(weights(student))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_accumulation_equals_one_large_batch():
    results = []
    for options in ({"batch_size": 16}, {"batch_size": 4, "gradient_accumulation_steps": 4}):
        teacher = make_teacher()
        student = make_student(teacher)
        run(student, teacher, options={**options, "steps": 3, "lr": 1e-4})
        results.append(student(HELD_OUT[0]))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ema": 0.9},
        {"optimizer": "relative", "lr": 0.003},
        {"lr": None, "save_every": 1},
        {"features_at": "logits"},
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, given):
    teacher = make_teacher()
    whole, stopped = make_student(teacher), make_student(teacher)
    options = {"steps": 9, "num_validations": 9, **given}
    expected = run(whole, teacher, options=options)

    def interrupt(found):
        if found.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"step [45] of 9"):
        run(stopped, teacher, options=options, work=tmp_path, on_validation=interrupt)
    again = make_student(teacher)
    result = run(again, teacher, options=options, work=tmp_path, resume=True)
    assert_equal(weights(whole), weights(again))
    assert result.curve == expected.curve


@pytest.mark.parametrize("optimizer", ["relative", "adamw"])
def test_the_rate_is_found_by_a_range_test_that_leaves_no_trace(optimizer):
    teacher = make_teacher()
    student = make_student(teacher)
    found = run(student, teacher, options={"optimizer": optimizer, "lr": None, "steps": 20})
    assert found.optimizer == optimizer
    assert str(found.lr) in {str(float(rate)) for rate in found.rate_test}
    assert found.rate_test[f"{found.lr:g}"] == min(found.rate_test.values()) < found.curve[0]["relative_error"]
    again = make_student(teacher)
    run(again, teacher, options={"optimizer": optimizer, "lr": found.lr, "steps": 20})
    assert_equal(weights(student), weights(again))


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        pytest.param([0.01, 0.014, 0.012], "0.002", id="a near student: the first rate whose shock is small"),
        pytest.param([0.01, 0.016, 0.013], "0.001", id="a near student: not one with a large shock"),
        pytest.param([1.0, 1.2, 0.9, 0.95], "0.001", id="a far student: not one that makes it worse"),
    ],
)
def test_the_range_test_asks_more_of_a_rate_where_the_student_is_far_off(monkeypatch, errors, wanted):
    left = iter(errors)
    monkeypatch.setattr("vitrim.recover.judge.relative_error", lambda *_: next(left, errors[-1]))
    teacher = make_teacher()
    found = run(
        make_student(teacher), teacher, options={"optimizer": "adamw", "lr": None, "steps": 8, "num_validations": 1}
    )
    assert f"{found.lr:g}" == wanted


def test_unreadable_images_are_left_out():
    images, teacher = Broken(16, bad={3, 4, 5, 6, 7}), make_teacher()
    student = make_student(teacher)
    result = run(student, teacher, images=open_images(images), options={"batch_size": 2, "steps": 8})
    assert images.asked == set(range(16))
    assert len(result.curve) == 5 and all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())


def test_features_before_the_norm_train_neither_norm_nor_head():
    teacher = make_teacher()
    student = make_student(teacher)
    start = weights(student)
    run(student, teacher, options={"features_at": "pre_norm"})
    changed = {name for name in start if not torch.equal(start[name], student.state_dict()[name])}
    assert changed and not any(name.startswith(("norm.", "head.")) for name in changed)


def test_the_rate_rises_then_falls_to_nothing():
    shape = [rate_shape(step, 100, 0.1) for step in range(100)]
    assert shape[9] == shape[10] == 1.0 and shape[0] == pytest.approx(0.1) and shape[-1] < 1e-3
    assert shape[:10] == sorted(shape[:10]) and shape[10:] == sorted(shape[10:], reverse=True)


def test_the_rate_ends_at_min_lr_and_a_base_rate_grows_with_the_images_of_a_step():
    shape = [rate_shape(step, 100, 0.1, floor=0.25) for step in range(100)]
    expected = [0.25 + 0.75 * (1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)]
    assert shape[:10] == [rate_shape(step, 100, 0.1) for step in range(10)] and shape[10:] == pytest.approx(expected)
    options = RecoverOptions(steps=20, base_lr=1e-3, min_lr=1e-4, batch_size=64, gradient_accumulation_steps=2)
    assert options.peak_lr(128) == pytest.approx(5e-4)
    for wrong in ({"lr": 1e-3, "base_lr": 1e-3}, {"lr": 1e-5, "min_lr": 1e-4}, {"base_lr": 1e-4, "min_lr": 1e-4}):
        with pytest.raises(RecipeError, match="lr"):
            RecoverOptions(steps=1, **wrong)


PUBLISHED = {
    "dinov2": {"base_lr": 7.5e-6, "min_lr": 1e-7, "batch_size": 64, "warmup_ratio": 0.1, "ema": 0.997},
    "openclip": {"base_lr": 1e-4, "min_lr": 1e-6, "batch_size": 40, "warmup_ratio": 0.1, "ema": 0.0},
    "eva-clip": {"base_lr": 6e-5, "min_lr": 1e-6, "batch_size": 40, "warmup_ratio": 0.2, "ema": 0.0},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_published_schedule_is_the_papers_and_gives_way_to_what_is_given(family):
    found = RecoverOptions(schedule="published").as_published(family)
    assert {name: getattr(found, name) for name in PUBLISHED[family]} == PUBLISHED[family]
    assert found.epochs == 10 and found.weight_decay == (0.04, 0.2) and found.flip and found.lr is None
    assert found.augment == ("dinov2" if family == "dinov2" else "clip")
    assert found.as_published(family) == found
    given = {"steps": 7, "lr": 1e-3, "weight_decay": (0.0, 0.0), "augment": "light"}
    other = RecoverOptions(schedule="published", **given).as_published(family)
    assert {name: getattr(other, name) for name in given} == given and other.epochs is other.base_lr is None


@pytest.mark.parametrize(
    ("architecture", "library", "family"),
    [
        ("vit_giant_patch14_dinov2", "timm", "dinov2"),
        ("eva02_large_patch14_448", "timm", "dinov2"),
        ("eva02_large_patch14_clip_224", "timm", "eva-clip"),
        ("EVA02-E-14-plus", "open_clip", "eva-clip"),
        ("ViT-g-14", "open_clip", "openclip"),
        ("SiglipModel", "transformers", "openclip"),
    ],
)
def test_each_family_takes_its_own_schedule(architecture, library, family):
    assert family_of(architecture, library) == family


def test_distillation_refuses_a_schedule_that_was_not_filled_in():
    teacher = make_teacher()
    with pytest.raises(RecipeError, match="as_published"):
        recover_(make_student(teacher), teacher, None, held_out=[], options=RecoverOptions(schedule="published"))


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, torch
            torch.set_num_threads(1)
            from tests.support.distillation import make_student, make_teacher, run, weights
            teacher = make_teacher()
            student = make_student(teacher)
            result = run(student, teacher, options={"lr": 1e-4})
            if int(os.environ.get("RANK", 0)) == 0:
                torch.save(weights(student), sys.argv[1])
            """
        )
    )
    alone, together = tmp_path / "alone.pt", tmp_path / "together.pt"
    for processes, out in ((None, alone), (2, together)):
        done = run_python(script, out, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(path, weights_only=True) for path in (alone, together))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_loss_that_is_no_number_or_explodes_goes_back_and_lowers_the_rate(tmp_path, monkeypatch, value, on_disk):
    teacher = make_teacher()
    student = make_student(teacher)
    poison(monkeypatch, at={4}, value=value)
    result = run(student, teacher, work=tmp_path if on_disk else None)
    (note,) = result.notes
    assert "at step 4: went back to step 2 with the rate lowered to 0.0005" in note
    assert result.lr == 5e-4
    assert [point["step"] for point in result.curve] == [0, 2, 4, 6]
    assert all(bool(tensor.isfinite().all()) for tensor in student.state_dict().values())


def test_a_run_that_diverges_again_and_again_ends_with_its_best_state(monkeypatch):
    teacher = make_teacher()
    student = make_student(teacher)
    start = weights(student)
    poison(monkeypatch, at=set(range(1, 1000)))
    result = run(student, teacher)
    *went_back, ended, verdict = result.notes
    assert len(went_back) == 8 and all("went back to step 0" in note for note in went_back)
    assert "give a lower lr" in ended and "did not improve" in verdict
    assert_equal(start, student.state_dict())


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, monkeypatch, damage):
    state = tmp_path / "recover.state"
    teacher = make_teacher()
    whole, student = make_student(teacher), make_student(teacher)
    run(whole, teacher)

    def stop(found):
        if found.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # between the validation of step 4 and its state: the last one is step 2's
        run(student, teacher, work=tmp_path, on_validation=stop)
    if damage == "cut short":
        state.write_bytes(state.read_bytes()[:1000])
    else:
        state.unlink()
    again = make_student(teacher)
    run(again, teacher, work=tmp_path, resume=True)
    assert_equal(weights(whole), weights(again))


def test_a_full_disk_stops_cleanly_and_keeps_the_state_before(tmp_path, monkeypatch):
    teacher = make_teacher()
    whole, student = make_student(teacher), make_student(teacher)
    run(whole, teacher)
    real, calls = os.fsync, []

    def full(number):
        calls.append(number)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device.*make room and go on with resume"):
        run(student, teacher, work=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"recover.state", "recover.state.before", "recovery.jsonl"}
    again = make_student(teacher)
    run(again, teacher, work=tmp_path, resume=True)
    assert_equal(weights(whole), weights(again))


def test_each_validation_is_told_as_it_happens(tmp_path):
    teacher, seen = make_teacher(), []
    result = run(make_student(teacher), teacher, work=tmp_path, on_validation=seen.append)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "recovery.jsonl").read_text().splitlines()]
    errors = [point["relative_error"] for point in result.curve]
    assert [found.step for found in seen] == [0, 2, 4, 6] and {found.num_steps for found in seen} == {6}
    assert [found.held_out_error for found in seen] == errors
    assert [found.best_error for found in seen] == [min(errors[: index + 1]) for index in range(4)]
    assert [found.lr for found in seen] == [0.0, rates[1], rates[3], rates[5]]


def test_an_error_in_a_callback_ends_the_run_and_its_state_can_be_taken_up(tmp_path):
    teacher = make_teacher()
    whole, student = make_student(teacher), make_student(teacher)
    run(whole, teacher)

    def fail(found):
        if found.step == 4:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(make_student(teacher), teacher, work=tmp_path, on_validation=fail)
    run(student, teacher, work=tmp_path, resume=True)
    assert_equal(weights(whole), weights(student))


def test_every_step_is_logged_once_also_by_a_run_that_was_stopped(tmp_path):
    teacher = make_teacher()
    log = tmp_path / "recovery.jsonl"

    def stop(found):
        if found.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_student(teacher), teacher, work=tmp_path, on_validation=stop)
    with log.open("a") as file:
        file.write('{"step": 99, "lo')  # killed in the middle of a line
    run(make_student(teacher), teacher, work=tmp_path, resume=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["relative_error" in line for line in lines] == [False, True, False, True, False, True]
    assert all(line["loss"] > 0 and line["lr"] > 0 for line in lines[:-1])
