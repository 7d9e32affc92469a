"""Wrong or damaged input is one clear line and leaves nothing behind; a killed run goes on to the same bytes."""

import errno
import itertools
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import IMAGES, SOURCES, bytes_of, snapshot, tensors_of
from tests.support.effort import quick_by_default
from tests.support.processes import forked
from vitrim.cli.app import run
from vitrim.compression import file_to_file, selection
from vitrim.compression.file_to_file import prune_checkpoint
from vitrim.config.recipe import Recipe
from vitrim.errors import CheckpointError, DataError, OutputError, RecipeError, VitrimError
from vitrim.storage import tensor_writer
from vitrim.storage.tensor_writer import TensorWriter

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
PRUNE = Recipe(mlp_ratio=1)
REPAIR = Recipe(mlp_ratio=1, repair={"refit_steps": 5}, calibrate={"batch_size": 8})
FC1 = "blocks.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {name: SOURCES[name](root / name.replace(" ", "-")) for name in ("timm", "timm shards", "open_clip")}


@pytest.fixture
def copied(pristine, tmp_path):
    """A copy of a checkpoint, free to be damaged."""

    def copied(name):
        shutil.copytree(pristine[name], tmp_path / "source")
        return tmp_path / "source"

    return copied


def edited(**changes):
    """Damage that changes tensors by name; None takes one away."""

    def damage(folder):
        state = tensors_of(folder)
        for name, change in changes.items():
            tensor = state.pop(name)
            if change is not None:
                state[name] = change(tensor)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def index_edited(change):
    def damage(folder):
        path = folder / "model.safetensors.index.json"
        known = json.loads(path.read_text())
        path.write_text(json.dumps({**known, "weight_map": {**known["weight_map"], **change(known["weight_map"])}}))

    return damage


def truncated(folder):
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = torch.nan
    return tensor


DAMAGE = {
    "truncated": ("timm", truncated, r"model\.safetensors: truncated or damaged"),
    "a truncated shard": ("timm shards", truncated, r"model-00001-of-00003\.safetensors: truncated or damaged"),
    "a missing shard": ("timm shards", lambda f: next(f.glob("model-00002*")).unlink(), "00002-of-00003.*missing"),
    "an index that is none": (
        "timm shards",
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "no index",
    ),
    "a shard that is not there": ("timm shards", index_edited(lambda m: {FC1: "model-00009.safetensors"}), "missing"),
    "the wrong shard": (
        "timm shards",
        index_edited(lambda m: {FC1: next(file for file in m.values() if file != m[FC1])}),
        f"holds {FC1}, and it does not",
    ),
    "a shard elsewhere": ("timm shards", index_edited(lambda m: {FC1: "../secret"}), "not a file beside it"),
    "NaN": ("timm", edited(**{FC1: nan}), f"{FC1}: holds NaN"),
    "infinite": ("timm", edited(**{"blocks.0.mlp.fc2.weight": lambda t: t / 0}), "NaN or infinite"),
    "another shape": (
        "timm",
        edited(**{FC1: lambda t: t[:-1].clone()}),
        f"{FC1} is .127, 32. in the checkpoint and .128, 32.",
    ),
    "another shape elsewhere": ("timm", edited(**{"head.bias": lambda t: t[:2].clone()}), r"head.bias is \(2,\)"),
    "a missing MLP tensor": ("timm", edited(**{FC1: None}), f"{FC1} is missing"),
    "no weights": ("timm", lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "no config": ("timm", lambda f: (f / "config.json").unlink(), "has no config.json"),
    "open_clip's file gone": ("open_clip", lambda f: (f / "open_clip_model.safetensors").unlink(), "holds no visual"),
}


@pytest.mark.parametrize("images", [False, True], ids=["weights", "images"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_source_is_one_line_and_leaves_nothing(copied, tmp_path, name, images):
    library, damage, words = DAMAGE[name]
    source = copied(library)
    damage(source)
    before = snapshot([source])
    with pytest.raises(VitrimError, match=words) as caught:
        prune_checkpoint(str(source), tmp_path / "out", recipe=REPAIR, data=IMAGES[:8] if images else None, quiet=True)
    assert "\n" not in str(caught.value)
    assert snapshot([source]) == before and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_images_need_every_tensor_of_the_encoder(copied, tmp_path):
    file = (source := copied("open_clip")) / "open_clip_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "class_embedding" not in name}, file)
    with pytest.raises(CheckpointError, match=r"holds no (visual\.)?class_embedding"):
        prune_checkpoint(str(source), tmp_path / "out", recipe=REPAIR, data=IMAGES[:8], quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_images_of_another_size_are_refused(pristine, tmp_path):
    with pytest.raises(DataError, match="can't run on float32"):
        prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=PRUNE, data=[torch.ones(3, 40, 40)] * 4, quiet=True)
    assert list(tmp_path.iterdir()) == []


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_a_payload_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "more": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("evil.pth", "evil.bin"):
        with pytest.raises(VitrimError, match=name) as caught:
            prune_checkpoint(f"timm/test_vit@{tmp_path / name}", tmp_path / "out", quiet=True)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.bin", "evil.pth"]


BAD = {
    "nothing there": ("{0}/none", [], "no model folder there"),
    "a model by name": ("timm/vit_tiny_patch16_224", [], "no model folder there"),
    "a file with nothing beside it": ("{0}/lone.safetensors", [], "no model folder there"),
    "an existing output": ("{1}", ["--exists"], "exists already"),
    "too wide": ("{1}", ["--hidden-dim", "129"], "use 1..128"),
    "recover": ("{1}", ["--recipe", "{0}/recipe.yaml"], "recover: "),
    "a budget that is none": ("{1}", ["--memory-budget", "lots", "--data", "digits"], "size: 'lots'"),
    "no such data": ("{1}", ["--data", "{0}/photos"], "photos"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_on_the_command_line_is_one_line_and_exit_code_2(pristine, tmp_path, capsys, name):
    source, words, expected = BAD[name]
    (tmp_path / "recipe.yaml").write_text("recover: {steps: 3}\n")
    save_file({"a": torch.ones(1)}, tmp_path / "lone.safetensors")
    if words == ["--exists"]:
        (tmp_path / "out").mkdir()
        words = []
    before = snapshot([tmp_path]), sorted(tmp_path.iterdir())
    places = [str(tmp_path), pristine["timm"]]
    arguments = ["prune-checkpoint", source.format(*places), str(tmp_path / "out"), "--quiet"]
    assert run([*arguments, *(word.format(*places) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and expected in printed.err
    assert (snapshot([tmp_path]), sorted(tmp_path.iterdir())) == before


# The disk


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_worked_out(pristine, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(file_to_file, "select_on_weights", None)
    with pytest.raises(OutputError, match=r"needs 0\.\d MB for the output, the disk has 0\.\d MB left; make room"):
        prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=PRUNE, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_activations_is_refused(pristine, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=150_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(
        selection.MemoryEstimate, "bytes", lambda self, *, offloaded, moments: 10 if offloaded else 1000
    )
    with pytest.raises(OutputError, match="for activations"):
        prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=REPAIR, data=IMAGES, memory_budget=100, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["a tensor", "a journal", "the config"])
def test_a_disk_that_fills_up_leaves_nothing_but_what_was_picked(pristine, whole, tmp_path, monkeypatch, where):
    if where == "a tensor":
        calls, write = itertools.count(), TensorWriter.write
        monkeypatch.setattr(TensorWriter, "write", lambda *given: no_space() if next(calls) == 5 else write(*given))
    else:
        monkeypatch.setattr(
            *((selection, "append", no_space) if where == "a journal" else (file_to_file, "write_json", no_space))
        )
    with pytest.raises(OutputError, match=r"could not be written \(No space left on device\)") as caught:
        prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=PRUNE, quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    if where == "a journal":
        assert list(tmp_path.iterdir()) == []
    else:
        monkeypatch.undo()
        monkeypatch.setattr(selection, "select", None)  # nothing is picked twice
        prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=PRUNE, resume=True, quiet=True)
        assert bytes_of(tmp_path / "out") == whole["weights"]


def test_values_that_change_on_their_way_to_the_disk_are_noticed(pristine, tmp_path, monkeypatch):
    close = TensorWriter.close

    def close_and_flip(self):
        close(self)
        path = next(self.folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[self.places["cls_token"].start] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(TensorWriter, "close", close_and_flip)
    with pytest.raises(OutputError, match="cls_token reads back otherwise"):
        prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=PRUNE, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


# Killed and gone on with


def hooks(where):
    """What a run dies in: object, name of its function, and how much of the call is carried out first."""
    return {
        "picks": (selection, "append", 0),
        "half a line": (selection, "append", 0.5),
        "tensors": (TensorWriter, "write", 0),
        "half a tensor": (TensorWriter, "write", 0.5),
        "sync": (TensorWriter, "sync", 0),
        "close": (TensorWriter, "close", 0),
        "moving": (Path, "rename", 0),
    }[where]


def killed(where, count, source, out, keywords):
    """Run until the `count`th call of something, then die of SIGKILL in the middle of it."""
    quick_by_default()  # as in the process that goes on with it
    tensor_writer.SYNC_BYTES = 20_000
    owner, name, share = hooks(where)
    original, calls = getattr(owner, name), itertools.count(1)

    def dying(*given):
        if next(calls) == count:
            if share:
                last = given[-1] if isinstance(given[-1], str) else b"".join(bytes(part) for part in given[-1])
                half = last[: int(len(last) * share)]
                try:
                    original(*given[:-1], half if isinstance(half, str) else [half])
                except CheckpointError:  # half a tensor is not enough, but its bytes are written
                    given[0].abandon()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    setattr(owner, name, dying)
    prune_checkpoint(source, out, quiet=True, **keywords)


@pytest.fixture(scope="module")
def spawn():
    """Runs `killed` in a process of its own, forked from one that has imported everything."""

    def spawn(*given):
        process = forked().Process(target=killed, args=given)
        process.start()
        process.join()
        return process.exitcode

    return spawn


@pytest.fixture(scope="module")
def whole(pristine, tmp_path_factory):
    """What runs that were left alone ended in."""
    root = tmp_path_factory.mktemp("whole")
    for name, data in (("weights", None), ("images", IMAGES)):
        prune_checkpoint(pristine["timm"], root / name, recipe=REPAIR, data=data, quiet=True)
    return {name: bytes_of(root / name) for name in ("weights", "images")}


KILLS = [
    ("weights", [("picks", 1)]),
    ("weights", [("picks", 3)]),
    ("weights", [("half a line", 1)]),
    ("weights", [("half a line", 3), ("half a line", 1), ("tensors", 1)]),
    ("weights", [("tensors", 20), ("half a tensor", 3), ("sync", 1), ("close", 1)]),
    ("weights", [("moving", 1), ("moving", 2)]),
    ("images", [("picks", 2), ("half a line", 1)]),
    ("images", [("picks", 4), ("half a tensor", 10)]),
]


@pytest.mark.parametrize("picked_on, deaths", KILLS, ids=str)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(pristine, whole, spawn, tmp_path, picked_on, deaths):
    out, data = tmp_path / "out", IMAGES if picked_on == "images" else None
    for index, (where, count) in enumerate(deaths):
        keywords = {"recipe": REPAIR, "data": data, "resume": index > 0}
        assert spawn(where, count, pristine["timm"], out, keywords) == -signal.SIGKILL
        assert not out.exists() and [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    prune_checkpoint(pristine["timm"], out, recipe=REPAIR, data=data, resume=True, quiet=True)
    assert bytes_of(out) == whole[picked_on] and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def stopped(pristine, tmp_path, monkeypatch):
    """A run into `out` that Ctrl-C stopped after two MLPs."""
    with monkeypatch.context() as patch:
        calls, append = itertools.count(), selection.append

        def interrupt(*given):
            if next(calls) == 3:
                raise KeyboardInterrupt
            append(*given)

        patch.setattr(selection, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=PRUNE, quiet=True)
    assert len((tmp_path / ".out.partial" / "picks.jsonl").read_text().splitlines()) == 3
    return tmp_path / "out"


def test_a_run_that_was_stopped_does_not_pick_twice(pristine, whole, stopped, monkeypatch):
    picked, select = [], selection.select
    monkeypatch.setattr(selection, "select", lambda *given: (picked.append(given[1].path), select(*given))[1])
    prune_checkpoint(pristine["timm"], stopped, recipe=PRUNE, resume=True, quiet=True)
    assert picked == ["blocks.2.mlp"] and bytes_of(stopped) == whole["weights"]


WRONG = {
    "recipe": lambda copied: {"recipe": Recipe(mlp_ratio=0.5)},
    "images": lambda copied: {"data": IMAGES},
    "source": lambda copied: {"source": str(copied("timm"))},
    "file": lambda copied: {"changed": 0},
}


@pytest.mark.parametrize("what", WRONG)
def test_another_run_does_not_go_on_with_it_and_leaves_it_alone(pristine, copied, whole, stopped, tmp_path, what):
    given = {"source": pristine["timm"], "recipe": PRUNE, **WRONG[what](copied)}
    file, before = Path(pristine["timm"]) / "model.safetensors", snapshot([tmp_path])
    time = file.stat().st_mtime_ns
    os.utime(file, ns=(0, given.pop("changed", time)))
    with pytest.raises(RecipeError, match=r"resume: .*another source, recipe or data"):
        prune_checkpoint(given.pop("source"), stopped, **given, resume=True, quiet=True)
    assert snapshot([tmp_path]) == before
    os.utime(file, ns=(0, time))
    prune_checkpoint(f"local-dir:{pristine['timm']}/", stopped, recipe=PRUNE, resume=True, quiet=True)
    assert bytes_of(stopped) == whole["weights"]


def test_with_overwrite_a_stopped_run_is_started_again(pristine, whole, stopped):
    prune_checkpoint(pristine["timm"], stopped, recipe=PRUNE, overwrite=True, quiet=True)
    assert bytes_of(stopped) == whole["weights"]


def test_what_follows_an_edited_line_of_a_journal_is_picked_again(pristine, whole, stopped, tmp_path, caplog):
    journal = tmp_path / ".out.partial" / "picks.jsonl"
    journal.write_text(journal.read_text().replace("blocks.1.mlp", "blocks.9.mlp"))
    prune_checkpoint(pristine["timm"], stopped, recipe=PRUNE, resume=True, quiet=True)
    assert bytes_of(stopped) == whole["weights"] and "picks.jsonl: line 3 is not used (its digest" in caplog.text


def test_nothing_to_go_on_from_is_a_fresh_run(pristine, whole, tmp_path):
    prune_checkpoint(pristine["timm"], tmp_path / "out", recipe=PRUNE, resume=True, quiet=True)
    assert bytes_of(tmp_path / "out") == whole["weights"]
