"""A distillation that gains nothing, or nothing more, ends early with its best; a found rate is lowered before."""

from types import SimpleNamespace

import pytest

from tests.support.distillation import assert_equal, make_student, make_teacher, run, weights
from vitrim.recover.run import Run

LENGTH = {"steps": 16, "lr": None, "num_validations": 16}


def test_a_found_rate_that_gains_nothing_is_lowered_and_the_run_ends_early(monkeypatch):
    """A range test of one step can't tell that a rate is too high; half of the run can."""
    monkeypatch.setattr("vitrim.recover.range_test.SHARES", (20.0,))
    teacher = make_teacher()
    student = make_student(teacher, width=24)
    start = weights(student)
    found = run(student, teacher, options=LENGTH)
    assert found.restarts == [8, 12] and found.ended_at == 14 and found.best_step == 0
    assert found.lr == pytest.approx(20 * 0.3**2) and found.curve[-1]["step"] == 14
    assert [note.partition(":")[0] for note in found.notes[:3]] == [
        "no gain by step 8",
        "no gain by step 12",
        "no gain by step 14 at a rate of 1.8 either",
    ]
    assert "14 steps and 1 of the range test" in found.notes[3]
    assert_equal(weights(student), start)


def test_a_rate_that_is_asked_for_is_kept():
    teacher = make_teacher()
    given = {**LENGTH, "lr": 20.0, "optimizer": "relative"}
    found = run(make_student(teacher, width=24), teacher, options=given)
    assert found.restarts == [] and found.ended_at is None and found.lr == 20.0


@pytest.mark.parametrize("averaged", [0.0, 0.7])
def test_behind_a_restart_a_lower_rate_gains_and_a_stopped_run_takes_the_same_steps(tmp_path, monkeypatch, averaged):
    monkeypatch.setattr("vitrim.recover.range_test.SHARES", (1.0,))
    teacher = make_teacher()
    whole, stopped, again = (make_student(teacher, width=24) for _ in range(3))
    given = {"options": {**LENGTH, "ema": averaged}}
    found = run(whole, teacher, **given)
    assert found.restarts[0] == 8 < found.best_step and found.ended_at == (13 if averaged else None)
    assert found.best_error < 0.5 * found.curve[0]["relative_error"]

    def stop(judged):
        if judged.step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, teacher, work=tmp_path, on_validation=stop, **given)
    resumed = run(again, teacher, work=tmp_path, resume=True, **given)
    assert resumed.restarts == found.restarts and resumed.curve == found.curve
    assert_equal(weights(again), weights(whole))


def overfitting(monkeypatch, turn=0.05):
    """Let the held-out error fall until the weights have moved by a share of their norm, and rise behind that."""
    teacher = make_teacher()
    student = make_student(teacher, width=24)
    start = weights(student)

    def error(model, *_):
        moved = sum(
            float((p.detach() - start[name.removeprefix("model.")]).square().sum())
            for name, p in model.named_parameters()
        )
        return 0.1 + abs(moved**0.5 / sum(float(p.square().sum()) for p in start.values()) ** 0.5 - turn)

    monkeypatch.setattr("vitrim.recover.judge.relative_error", error)
    return student, teacher


@pytest.mark.parametrize(
    "how", [{"optimizer": "relative"}, {"optimizer": "relative", "ema": 0.5}, {"optimizer": "adamw"}]
)
def test_a_run_that_gains_no_more_ends_early_with_its_best_and_says_what_that_saves(tmp_path, monkeypatch, how):
    given = {"options": {**LENGTH, "lr": 0.06 if how["optimizer"] == "relative" else 3e-3, "min_lr": 3e-3, **how}}
    student, teacher = overfitting(monkeypatch)
    found = run(student, teacher, **given)
    best, end = found.best_step, found.ended_at
    assert 0 < best < end == best + 8 < 16 and found.best_error == min(point["relative_error"] for point in found.curve)
    saved = f"{16 - end} of 16 steps ({8 * (16 - end)} images) were saved."
    assert found.notes[0] == f"no gain since step {best}: ended at step {end} with the state of that one; {saved}"
    assert found.cost().startswith(f"{end} steps, {8 * end} images seen")
    stopped, again = (overfitting(monkeypatch)[0] for _ in range(2))

    def stop(judged):
        if judged.step == end - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, teacher, work=tmp_path, on_validation=stop, **given)
    resumed = run(again, teacher, work=tmp_path, resume=True, **given)
    assert resumed.ended_at == end and resumed.curve == found.curve and resumed.notes[0] == found.notes[0]
    assert_equal(weights(again), weights(student))
    last = run(again, teacher, work=tmp_path, resume=True, **given)  # what has ended stays so
    assert last.curve == found.curve and last.notes[0] == found.notes[0]


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ([9, 5, 9, 8, 7, 6], False),  # as noise falls with the rate
        ([9, 5, 6, 6, 6, 6], True),
        ([9, 5, 6, 7, 8, 9], True),
        ([9, 5, 6, 7, 8], False),  # less than half of the steps
        ([5, 6, 7, 8, 9, 9], False),  # no gain yet
        ([9, 5, 9, 8, 7, 6, 7, 8, 9], False),  # the end
    ],
)
def test_gains_have_stopped_where_half_of_the_steps_bettered_nothing_and_the_error_is_not_falling(errors, ends):
    curve = [{"step": step, "relative_error": error, "loss": 1.0} for step, error in enumerate(errors)]
    result = SimpleNamespace(best_step=errors.index(min(errors)), curve=curve)
    state = SimpleNamespace(result=result, started=0, step=len(errors) - 1, num_steps=8)
    state.score = lambda found: found["relative_error"]
    assert Run.gains_no_more(state) is ends
