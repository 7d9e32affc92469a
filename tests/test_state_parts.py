"""States of which each process writes its part: kept exactly, read by any number of processes, whole after a kill."""

import json
import shutil

import pytest
import torch

from tests.support.parts import OPTIONS, WAYS, same, whole_values
from tests.support.processes import run_python
from tests.support.two_processes import train
from vitrim.errors import CheckpointError
from vitrim.recover.files import RECOVERY_STATE
from vitrim.recover.state import has_state, load_state, save_state
from vitrim.storage.sealed import write_sealed


def start(what, folder, processes):
    return run_python("-m", "tests.support.parts", what, folder, processes=processes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left of which one was killed in the end, and what two and three made of it."""
    folder = tmp_path_factory.mktemp("parts")
    done = start("two", folder, 2)
    assert "ended with -9" in done.stderr, done.stderr[-4000:]
    shutil.copytree(folder / "killed", folder / "as-killed")
    for what, processes in (("two_again", 2), ("three", 3)):
        done = start(what, folder, processes)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def furthest(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_state_of_two_and_of_three_processes_is_read_by_one(folder):
    """Two wrote and read the first, three read it and wrote the second; that they got the same is asserted there."""
    for name, processes in (("a.state", 2), ("b.state", 3)):
        assert same(load_state(folder / name), whole_values())
        sizes = [(folder / name / f"part-{rank}.safetensors").stat().st_size for rank in range(processes)]
        assert len(list((folder / name).iterdir())) == processes + 1  # with the index
        assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_number_of_processes_goes_on_bit_for_bit(folder, way):
    whole, again = (torch.load(folder / f"{name}-{way}.pt") for name in ("whole", "again"))
    assert furthest(whole, again) == 0


@pytest.mark.parametrize("way", WAYS)
def test_another_number_of_processes_goes_on_to_rounding(folder, way, tmp_path):
    whole = torch.load(folder / f"whole-{way}.pt")
    assert furthest(whole, torch.load(folder / f"three-{way}.pt")) < 1e-5  # two, then three
    work = tmp_path / "work"
    shutil.copytree(folder / f"three-{way}", work)
    assert load_state(work / RECOVERY_STATE)["step"] == 3
    assert furthest(whole, train(OPTIONS, work=work, resume=True)["weights"]) < 1e-5  # three, then one
    assert (work / RECOVERY_STATE).is_file() and (work / f"{RECOVERY_STATE}.before").is_file()


def test_a_kill_in_the_middle_of_a_save_leaves_the_last_whole_state(folder):
    killed = folder / "as-killed" / RECOVERY_STATE
    new = killed.with_name(f"{RECOVERY_STATE}.new")
    assert (new / "part-1.safetensors").exists() and not (new / "index.json").exists()
    assert has_state(killed) and load_state(killed)["step"] == 3
    assert furthest(torch.load(folder / "whole-sharded.pt"), torch.load(folder / "again-killed.pt")) == 0


@pytest.mark.parametrize("name", ["index.json", "part-0.safetensors", "part-1.safetensors"])
@pytest.mark.parametrize("at", [9, -1, None])
def test_a_part_that_is_damaged_or_gone_is_noticed_and_the_state_before_taken(folder, tmp_path, caplog, name, at):
    path = tmp_path / "a.state"
    for each in ("a.state", "a.state.before"):
        shutil.copytree(folder / each, tmp_path / each)
    data = bytearray((path / name).read_bytes())
    if at is None:
        (path / name).unlink()
    else:
        data[at] ^= 1
        (path / name).write_bytes(data)
    if (name, at) != ("index.json", -1):  # that is the line's end
        assert torch.equal(load_state(path)["before"], torch.ones(3))
        assert f"can't be used ({name}: " in caplog.text and caplog.text.count("going on from") == 1
        shutil.rmtree(tmp_path / "a.state.before")
        with pytest.raises(CheckpointError, match="can't be used") as caught:
            load_state(path)
        assert "\n" not in str(caught.value)


def test_a_state_of_a_later_version_is_refused_in_one_line(folder, tmp_path):
    path = tmp_path / "a.state"
    shutil.copytree(folder / "a.state", path)
    index = json.loads((path / "index.json").read_bytes())
    write_sealed(path / "index.json", {**{k: v for k, v in index.items() if k != "digest"}, "format": "vitrim-state/9"})
    with pytest.raises(CheckpointError, match=r"its format is 'vitrim-state/9'; this version reads 'vitrim-state/2'"):
        load_state(path)


def test_files_and_folders_take_each_others_place(folder, tmp_path):
    path = tmp_path / "a.state"
    shutil.copytree(folder / "a.state", path)
    shutil.copytree(folder / "a.state", tmp_path / "a.state.new")  # left by a run that was killed
    for step in (1, 2):
        save_state(path, {"step": step})
    assert load_state(path) == {"step": 2}
    path.unlink()
    assert load_state(path) == {"step": 1}
