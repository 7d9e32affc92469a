"""Recovery on several processes equals recovery on one, its states fit any number of them, and SIGKILL costs little."""

import json
import re

import pytest
import torch

import vitrim
from tests.support import two_processes
from tests.support.distillation import make_student, make_teacher, run, weights
from tests.support.killing import (
    KILLED,
    MOMENTS,
)
from tests.support.processes import run_python
from tests.support.two_processes import LONG, SHORT, losses_of, stopped, train, unreadable
from vitrim.errors import CheckpointError
from vitrim.recover.files import RECOVERY_LOG, RECOVERY_STATE
from vitrim.recover.state import load_state, save_state

WAYS = ("ddp", "sharded")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes did, each in its own words, and the folder in which they did it."""
    folder = tmp_path_factory.mktemp("two")
    for way in WAYS:
        stopped({**SHORT, "ema": 0.8}, folder / f"one-{way}")
    (folder / "taken").mkdir()
    done = run_python("-m", "tests.support.two_processes", folder, processes=2, torchrun=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def furthest(first, second) -> float:
    """The largest difference between two models' weights."""
    assert first["weights"].keys() == second["weights"].keys()
    return max(float((first["weights"][name] - second["weights"][name]).abs().max()) for name in first["weights"])


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_curve_is_that_of_one_process_over_fifty_steps(together, tmp_path, way):
    _, (main, other) = together
    alone = train(LONG, work=tmp_path)
    found = main["same_curve"][way]
    assert len(found["losses"]) == 50
    assert found["losses"] == pytest.approx(losses_of(tmp_path / "recovery.jsonl"), rel=1e-3)
    errors, expected = ([p["relative_error"] for p in result["curve"]] for result in (found, alone))
    assert errors == pytest.approx(expected, rel=1e-3) and errors[-1] < 0.2 * errors[0]
    assert furthest(found, alone) < 2e-5
    assert furthest(found, other["same_curve"][way]) == 0


@pytest.mark.parametrize(
    ("name", "options", "atol"),
    [
        (
            "everything",
            {"ema": 0.8, "gradient_accumulation_steps": 2, "batch_size": 4, "weight_decay": (0.1, 0.0)},
            2e-5,
        ),
        ("range test", {"optimizer": "adamw", "lr": None}, 2e-5),
        ("bf16", {"precision": "bf16"}, 2e-2),
        ("uneven", {"batch_size": 5, "gradient_accumulation_steps": 2}, 2e-5),
        ("before the norm", {"features_at": "pre_norm"}, 2e-5),
    ],
)
def test_shards_change_nothing_else_either(together, name, options, atol):
    """Accumulation, moving average, decay, a second forward pass, the range test, batches that can't be halved."""
    _, (main, other) = together
    alone, found = train({**SHORT, **options}), main["extras"][name]
    assert furthest(alone, found) < atol
    assert (alone["lr"], alone["best_step"]) == (found["lr"], found["best_step"]) and found["best_step"] > 0
    assert furthest(found, other["extras"][name]) == 0


def test_a_process_that_can_read_no_image_takes_part_all_the_same(together):
    _, (main, _) = together
    alone, found = train({**SHORT, "steps": 3}, images=unreadable()), main["extras"]["unreadable"]
    assert furthest(alone, found) < 2e-5 and found["best_step"] > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_state_goes_on_on_another_number_of_processes(together, way):
    folder, (main, _) = together
    whole = train({**SHORT, "ema": 0.8})
    assert furthest(whole, main["resumed"][way]) < 1e-5  # two, then two
    assert furthest(whole, main["resumed"][f"one to {way}"]) < 1e-5
    left = folder / f"left-{way}"
    assert load_state(left / RECOVERY_STATE)["step"] == 3
    found = train({**SHORT, "ema": 0.8}, work=left, resume=True)  # two, then one
    assert furthest(whole, found) < 1e-5
    assert [point["step"] for point in found["curve"]] == [0, 3, 6, 9]


@pytest.mark.parametrize("kept", ["on disk", "in memory"])
def test_a_loss_that_is_no_number_on_one_process_sends_all_back(together, kept):
    _, results = together
    for result in results:
        (note,) = result["diverging"][kept]["notes"]
        assert "at step 5: went back to step 3 with the rate lowered to 0.0005" in note
    assert furthest(results[0]["diverging"][kept], results[1]["diverging"][kept]) == 0


def test_errors_of_one_process_end_all(together):
    _, (main, other) = together
    main, other = main["failing"], other["failing"]
    assert (
        "(process 1: No space left on device); make room" in main["full disk"]
        and main["full disk"] == other["full disk"]
    )
    assert main["for users"] == other["for users"] == "VitrimError: no such thing"
    assert main["other"] == "ZeroDivisionError: by nought" and "the main process failed" in other["other"]
    assert "exists already" in main["taken"] and main["taken"] == other["taken"]


def test_compress_gives_every_process_the_same_and_writes_once(together):
    folder, (main, other) = together
    found, same = main["compressed"], other["compressed"]
    assert found["sha256"] == same["sha256"] and found["metrics"] == same["metrics"]
    assert furthest(found, same) == 0
    assert not (folder / ".out.partial").exists()
    loaded = vitrim.load(folder / "out")
    assert all(torch.equal(tensor, found["weights"][name]) for name, tensor in loaded.state_dict().items())
    alone = two_processes.compressed(None)
    assert alone["sha256"] == found["sha256"]
    assert furthest(alone, found) < 2e-5
    notes = [json.loads(result["metrics"])["notes"] for result in (alone, found)]
    notes = [[re.sub(r"[\d.]+", "#", note) for note in each] for each in notes]  # errors differ by rounding
    assert [note for note in notes[0] if "there is one process" not in note] == notes[1] and len(notes[0]) > len(
        notes[1]
    )


def test_a_process_without_a_cut_takes_the_main_ones(together):
    _, (main, other) = together
    assert main["taken_over"]["sha256"] == other["taken_over"]["sha256"]
    assert furthest(main["taken_over"], other["taken_over"]) == 0
    assert main["taken_over"]["nothing"] and other["taken_over"]["nothing"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_second_forward_pass_is_exact_and_runs_the_blocks_again(precision):
    results, calls = [], []
    for again in (False, True):
        teacher = make_teacher()
        student = make_student(teacher)
        seen: list[int] = []
        student.blocks[0].mlp.fc1.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        run(student, teacher, options={"checkpoint_activations": again, "steps": 4, "precision": precision})
        results.append({"weights": weights(student)})
        calls.append(len(seen))
        assert "forward" not in vars(student.blocks[0])
    assert furthest(*results) == 0
    assert calls[1] == calls[0] + 4


def test_a_state_keeps_what_it_is_given(tmp_path):
    given = {
        "tensors": [torch.arange(3), torch.ones(2, 3, dtype=torch.bfloat16).T, torch.tensor(True), torch.empty(0, 4)],
        "keys": {1: "int", 0.5: "float", "word": None},
        "numbers": (float("inf"), -1.5, 7, True),
        "none": {},
    }
    save_state(tmp_path / "a.state", given)
    found = load_state(tmp_path / "a.state")
    for mine, theirs in zip(given.pop("tensors"), found.pop("tensors"), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    assert found == given and [type(key) for key in found["keys"]] == [int, float, str]


@pytest.mark.parametrize("at", [0, 9, 300, -40, -1])
def test_a_changed_byte_is_noticed_and_the_state_before_taken(tmp_path, at):
    path = tmp_path / "a.state"
    for step in (1, 2):
        save_state(path, {"step": step, "tensor": torch.full((200,), float(step))})
    assert load_state(path)["step"] == 2
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert load_state(path)["step"] == 1
    path.with_name("a.state.before").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can't be used"):
        load_state(path)


def test_a_new_run_does_not_go_back_to_an_old_ones_state(tmp_path):
    teacher, state = make_teacher(), tmp_path / RECOVERY_STATE
    save_state(state, {"step": 1})
    save_state(state, {"step": 2})
    run(make_student(teacher), teacher, work=tmp_path, options={"steps": 1, "num_validations": 1})
    state.unlink()
    assert load_state(state)["step"] == 0


def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path):
    done = run_python("-m", "tests.support.killing", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = torch.load(tmp_path / "whole" / "weights.pt")
    start_weights = weights(make_student(make_teacher()))
    assert any(not torch.equal(whole[name], tensor) for name, tensor in start_weights.items())
    for name in ("ten", *MOMENTS):
        found = torch.load(tmp_path / name / "weights.pt")
        assert all(torch.equal(whole[key], tensor) for key, tensor in found.items()), name
        steps = [json.loads(line)["step"] for line in (tmp_path / name / RECOVERY_LOG).read_text().splitlines()]
        assert steps == list(range(1, KILLED["steps"] + 1)), name
