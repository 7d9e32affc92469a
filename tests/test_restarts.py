"""A distillation whose found rate gains nothing goes back to its best, lowers the rate, and ends early."""

import pytest

from tests.support.distillation import assert_equal, make_student, make_teacher, run, weights

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
    assert found.restarts[0] == 8 < found.best_step and found.ended_at is None
    assert found.best_error < 0.5 * found.curve[0]["relative_error"]

    def stop(judged):
        if judged.step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, teacher, work=tmp_path, on_validation=stop, **given)
    resumed = run(again, teacher, work=tmp_path, resume=True, **given)
    assert resumed.restarts == found.restarts and resumed.curve == found.curve
    assert_equal(weights(again), weights(whole))
