"""Where an output is made: whose folder it is, what is deleted and when, and what takes the place of what."""

import json
import os

import pytest

import vitrim
from tests.support.checkpoints import SOURCES, snapshot
from vitrim.cli.app import run
from vitrim.errors import OutputError
from vitrim.output import stage
from vitrim.output.stage import LOCK, STATES, check_place, staged_output


def write(out, text="new", **given):
    """An output that `overwrite` takes for one of vitrim's."""
    with staged_output(out, **given) as (folder, _):
        (folder / "vitrim.json").write_text(text)


def stop(out, state, **given):
    """A run that leaves a state and no output."""
    with pytest.raises(KeyboardInterrupt), staged_output(out, **given) as (_, work):
        (work / state).write_text("hours of work")
        raise KeyboardInterrupt
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize("given", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_folder_of_the_user_is_not_touched(tmp_path, given):
    mine = tmp_path / ".out.partial"
    (mine / "output").mkdir(parents=True)
    (mine / "output" / "thesis.tex").write_text("mine")
    before = snapshot([tmp_path])
    with pytest.raises(OutputError, match=r"\.out\.partial: is not from vitrim, and the run needs its name; move it"):
        write(tmp_path / "out", **given)
    assert snapshot([tmp_path]) == before


def test_an_empty_folder_of_that_name_and_a_run_that_left_no_state_are_no_hindrance(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    write(tmp_path / "out")
    (tmp_path / ".other.partial" / "output").mkdir(parents=True)
    (tmp_path / ".other.partial" / LOCK).touch()
    write(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("state", STATES)
def test_a_state_is_deleted_by_overwrite_alone(tmp_path, state):
    work = stop(tmp_path / "out", state)
    with pytest.raises(OutputError, match=r"holds the state of a stopped run; .*--resume.*--overwrite"):
        write(tmp_path / "out")
    assert (work / state).read_text() == "hours of work"
    with staged_output(tmp_path / "other", resume=True), pytest.raises(OutputError, match="stopped run"):
        check_place(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), staged_output(tmp_path / "out", overwrite=True) as (_, work):
        assert not (work / state).exists()
        raise KeyboardInterrupt
    assert not work.exists()


def test_an_output_gives_way_at_the_end_and_only_to_overwrite(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(OutputError, match=r"exists already; .* or replace it with overwrite \(--overwrite\)"):
        write(out)
    with pytest.raises(ZeroDivisionError), staged_output(out, overwrite=True):
        raise ZeroDivisionError
    stop(out, "cut.json", overwrite=True)
    assert (out / "vitrim.json").read_text() == "old"
    with staged_output(out, resume=True, overwrite=True) as (folder, work):
        assert (work / "cut.json").exists() and (out / "vitrim.json").read_text() == "old"
        (folder / "vitrim.json").write_text("new")
    assert (out / "vitrim.json").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_nothing_that_is_not_an_output(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    write(tmp_path / "small")
    (tmp_path / "to small").symlink_to(tmp_path / "small")
    before = snapshot([tmp_path])
    for name in ("photos", "link", "to small"):
        with pytest.raises(OutputError, match="exists already; choose another output folder or remove this one"):
            write(tmp_path / name, overwrite=True)
    assert snapshot([tmp_path]) == before


def test_an_output_comes_back_where_the_new_one_can_not_take_its_place(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", stage.Path.rename
    write(out, "old")
    monkeypatch.setattr(stage.Path, "rename", lambda path, to: rename(path, to) if path.name != "output" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(out, overwrite=True)
    assert (out / "vitrim.json").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    (tmp_path / ".out.partial").mkdir()  # as a kill between the two renamings leaves it
    (tmp_path / ".out.partial" / LOCK).touch()
    out.rename(tmp_path / ".out.partial" / "replaced")
    with pytest.raises(OutputError, match="exists already"):
        write(out)
    assert (out / "vitrim.json").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_running_run_is_named_as_such(tmp_path):
    with staged_output(tmp_path / "out") as (_, work):
        (work / "cut.json").touch()
        check_place(tmp_path / "out")
        with pytest.raises(OutputError, match="another run is writing it"):
            write(tmp_path / "out", overwrite=True)


COMMANDS = {
    "compress": ["compress", "timm/no_such_model", "--out", "{0}/out"],
    "prune-checkpoint": ["prune-checkpoint", "{0}/nothing", "{0}/out"],
    "tune-text": ["tune-text", "open_clip/no/such", "--pairs", "{0}/nothing", "--out", "{0}/out"],
    "demo": ["demo", "--out", "{0}/out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_place_is_checked_before_anything_is_opened(tmp_path, capsys, command):
    stop(tmp_path / "out", "picks.jsonl")
    before = snapshot([tmp_path])
    assert run([part.format(tmp_path) for part in COMMANDS[command]]) == 2
    said = capsys.readouterr().err
    assert "stopped run" in said and "--resume" in said and "--overwrite" in said and said.count("\n") == 1
    assert snapshot([tmp_path]) == before


def test_a_wrong_width_costs_no_state(tmp_path):
    """A typo without --resume used to delete the state of a run of hours."""
    SOURCES["timm"](tmp_path / "model")
    work = stop(tmp_path / "out", "picks.jsonl")
    given = {"hidden_dim": 10**6, "quiet": True}
    for wrong in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(vitrim.errors.VitrimError):
            vitrim.prune_checkpoint(str(tmp_path / "model"), tmp_path / "out", **given, **wrong)
        assert (work / "picks.jsonl").read_text() == "hours of work"


def test_each_command_replaces_its_output(tmp_path):
    SOURCES["timm"](tmp_path / "model")
    given = [str(tmp_path / "model"), "--method", "magnitude", "--quiet", "--overwrite"]
    for ratio in ("1", "0.5"):
        assert run(["prune-checkpoint", given[0], str(tmp_path / "out"), *given[1:], "--mlp-ratio", ratio]) == 0
    widths = json.loads((tmp_path / "out" / "metrics.json").read_text())["widths"]
    assert {new for _, new in widths.values()} == {16} and not os.path.lexists(tmp_path / ".out.partial")
