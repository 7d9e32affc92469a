"""Hostile files, bombs, links, a failing disk, two runs at once, too little memory: one clear line, and nothing lost.

tests/test_streaming_faults.py and tests/test_checkpoint.py hold what is damaged in particular ways; here are files
mutated at random and the explicit attacks. `make faults` tries many more of the same.
"""

import copy
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import vitrim
from tests.support.disk_faults import sweep
from tests.support.fault_kinds import MORE
from tests.support.faults import KINDS, PLANNED, SITE, Scene, door, in_child, mutated
from vitrim.cli.app import run
from vitrim.config.options import RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.cost import memory
from vitrim.data import open_images
from vitrim.errors import BudgetError, CheckpointError, ModelError, OutputError, VitrimError
from vitrim.models.load import build_empty
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps
from vitrim.output import stage
from vitrim.output.stage import staged_output

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and LD_PRELOAD")
NUM_SEEDS = 2  # make faults: 60


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("scene"))


# Files


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
@pytest.mark.parametrize("file", [*KINDS, *MORE])
def test_a_mutated_file_works_or_is_refused_in_one_line(scene, file, seed):
    outcome = scene.try_(file, seed)
    assert outcome.survived, outcome.said


def test_the_mutator_changes_documents_and_the_child_reports_what_is_not_allowed(capfd):
    rng = random.Random(0)
    assert sum(mutated(rng, PLANNED[0]) != PLANNED[0] for _ in range(50)) > 45
    assert in_child(lambda: door(lambda: None)).survived
    assert not in_child(lambda: door(lambda: [][0])).survived
    assert not in_child(lambda: time.sleep(60) or 0, seconds=0.2).survived
    assert not in_child(lambda: os.kill(os.getpid(), signal.SIGKILL) or 0).survived
    assert not in_child(lambda: len(bytearray(2**28)) and 0, memory=2**27).survived


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]"
    for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
RECIPES = {
    "an object": ("model: !!python/object/apply:os.system ['touch {0}']", "python/object"),
    "names for names": (BOMB, "stands for something above"),
    "itself": ("options: &a [*a]", "stands for something above"),
    "a deep list": ("options: " + "[" * 5000, "can't be read as YAML"),
    "no truth": ("stock: !!bool maybe", "can't be read as YAML"),
    "a long number": ("hidden_dim: " + "9" * 5000, "can't be read as YAML"),
    "no text": ("\x00", "can't be read"),
    "a wide MLP": ("hidden_dim: 1000000000000", "use 1..128"),
    "a narrow MLP": ("hidden_dim: -5", "greater than or equal to 1"),
    "no number": ("mlp_ratio: .nan", "finite"),
    "no bound": ("mlp_ratio: .inf", "finite"),
    "no share": ("keep_ratio: -.inf", "finite"),
    "no seed": ("seed: -1", "greater than or equal to 0"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_one_line_at_once(tmp_path, name):
    text, words = RECIPES[name]
    (tmp_path / "recipe.yaml").write_text(text.format(tmp_path / "ran"))
    outcome = in_child(lambda: door(lambda: Recipe.load(tmp_path / "recipe.yaml").width().of(SITE)), seconds=20)
    assert outcome.code == 2 and outcome.survived and words in outcome.said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("value", ["!!python/name:os.system", "[" * 5000, "*a"])
def test_a_hostile_option_on_the_command_line_is_one_line(tmp_path, capsys, value):
    assert run(["compress", "timm/test_vit", "--out", str(tmp_path / "out"), "--option", f"rank={value}"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "give KEY=VALUE" in printed


# Code


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def output(scene, tmp_path):
    """A copy of an output, free to be damaged."""
    return scene.copy(scene.output, tmp_path)


def rewrite(output, change):
    about = json.loads((output / "vitrim.json").read_text())
    change(about)
    (output / "vitrim.json").write_text(json.dumps(about))


def test_weights_that_are_a_pickle_are_refused_and_not_run(output, tmp_path):
    evil = pickle.dumps(Payload(tmp_path / "ran"))
    (output / "model.safetensors").write_bytes(evil)
    with pytest.raises(VitrimError, match=r"model\.safetensors"):
        vitrim.load(output)
    (output / "model.safetensors").unlink()
    (output / "pytorch_model.bin").write_bytes(evil)
    with pytest.raises(VitrimError, match=r"pytorch_model\.bin"):
        vitrim.load(output)
    with pytest.raises(VitrimError):
        vitrim.compress(f"timm/test_vit@{output / 'pytorch_model.bin'}", out=tmp_path / "out", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "cache_dir", "scriptable"])
def test_a_plan_can_not_have_timm_open_other_files(output, tmp_path, key):
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    rewrite(output, lambda about: about["origin"]["model_args"].update({key: str(tmp_path / "evil.pth")}))
    with pytest.raises(ModelError, match=f"{key} is no argument of a model"):
        vitrim.load(output)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["Trainer", "TrainingArguments", "pipeline", "__name__", "no_such"])
def test_a_plan_can_not_call_what_is_no_model(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    origin = Origin(name="x", library="transformers", architecture=name, model_args={"model_type": "vit"})
    with pytest.raises(CheckpointError, match="transformers has no model"):
        build_empty(origin)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:/etc", "../../vit", "os.system"])
def test_a_plan_can_not_have_timm_look_elsewhere(output, name):
    rewrite(output, lambda about: about["origin"].update(architecture=name))
    with pytest.raises(ModelError, match="timm has no model of that name"):
        vitrim.load(output)


# Names


ODD_NAMES = ["../../etc/passwd", "/etc/passwd", "__class__", "", "a\0b", "blocks.0.mlp.act"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("field", ["value", "output"])
def test_a_plan_that_cuts_modules_of_odd_names_is_refused(output, field, name):
    rewrite(output, lambda about: about["plan"]["edits"][0]["site"].update({field: name}))
    with pytest.raises(VitrimError) as caught:
        vitrim.load(output)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_that_are_only_shown_lead_nowhere(output, tmp_path, name):
    expected = vitrim.load(output)(torch.zeros(1, 3, 32, 32))
    rewrite(output, lambda about: about["plan"]["edits"][0]["site"].update(path=name, block=name))
    assert torch.equal(vitrim.load(output)(torch.zeros(1, 3, 32, 32)), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_tensors_with_odd_names_are_refused(output, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(output / "model.safetensors")
    save_file({**tensors, "../../escaped": torch.ones(1)}, output / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\.\./\.\./escaped is unknown"):
        vitrim.load(output)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_model_of_endless_depth_is_not_built(output, monkeypatch):
    monkeypatch.setattr(vitrim.models.origin, "MAX_MODULES", 1000)
    rewrite(output, lambda about: about["origin"]["model_args"].update(depth=10**5))
    outcome = in_child(lambda: door(lambda: vitrim.load(output)), seconds=120)
    assert outcome.survived and "more than 1,000 modules" in outcome.said


@pytest.mark.parametrize("data_offsets", [[0, 10**15], [10**15, 10**15 + 4], [0, 2**63], [-4, 0], [4, 0]])
def test_a_header_that_claims_what_is_not_there_is_refused(tmp_path, data_offsets):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": data_offsets}}).encode()
    (tmp_path / "evil.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(VitrimError, match=r"evil\.safetensors: truncated or damaged"):
        vitrim.compress(f"timm/test_vit@{tmp_path / 'evil.safetensors'}", out=tmp_path / "out", quiet=True)


# Images


def png(width, height):
    """A black picture of one bit a pixel, in as few bytes as that takes."""
    chunk = lambda kind, data: (  # noqa: E731
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    )
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows, packer = bytes(1 + (width + 7) // 8), zlib.compressobj(9)
    data = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
BOMBS = {"a plane": png(30_000, 30_000), "a strip": png(500_000, 1), "a pole": png(1, 500_000), "a program": EPS}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_left_out_and_counted_within_bounded_memory(scene, tmp_path, name):
    assert len(BOMBS[name]) < 150_000
    (tmp_path / "bomb.png").write_bytes(BOMBS[name])
    shutil.copy(scene.root / "images" / "0.png", tmp_path / "fine.png")

    def work():
        from tests.support.faults import INPUTS
        from vitrim.data import transform_for

        (batch,) = open_images(tmp_path, transform=transform_for(INPUTS)).loader(batch_size=2)
        assert (len(batch.images_BCHW), batch.num_skipped) == (1, 1)
        return 0

    outcome = in_child(work, memory=2**29)
    assert outcome.code == 0, outcome.said


def test_a_panorama_is_no_bomb(tmp_path):
    Image.new("RGB", (1990, 10)).save(tmp_path / "wide.png")
    assert open_images(tmp_path)[0] is not None


def test_shards_are_never_unpacked_and_odd_labels_are_none(scene, tmp_path):
    picture = (scene.root / "images" / "0.png").read_bytes()
    (tmp_path / "inner").mkdir()
    with tarfile.open(tmp_path / "inner" / "a.tar", "w") as tar:
        for name, data in (("../../up.png", picture), ("../../up.cls", b"9" * 30), ("/root/b.png", picture)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    images = open_images(tmp_path / "inner" / "a.tar")
    assert len(images) == 2 and images[0][1] == -1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "inner"]


# Places


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_an_output_that_is_a_link_is_not_followed(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(OutputError, match="exists already"), staged_output(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "out"]


def test_a_link_in_the_place_of_the_working_folder_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "output").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"), staged_output(tmp_path / "out"):
        pass
    assert (tmp_path / "elsewhere" / "output").is_dir() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "a/../b" * 900])
def test_an_output_of_an_impossible_name_is_one_line(tmp_path, name):
    with pytest.raises(OutputError, match="can't be written"), staged_output(tmp_path / name):
        pass
    assert list(tmp_path.iterdir()) == []


# Two runs


def test_a_second_run_into_the_same_output_is_refused_and_leaves_the_first_alone(scene, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["prune-checkpoint", str(scene.source), str(out), "--quiet"]
    with staged_output(out) as (folder, work):
        (folder / "mine").write_text("mine")
        (work / "picks.jsonl").write_text("")
        for again in (command, [*command, "--resume"]):
            assert run(again) == 2
            assert "another run is writing it" in capsys.readouterr().err
    assert (out / "mine").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_a_run_that_was_killed_is_free(tmp_path):
    def dies():
        with staged_output(tmp_path / "out") as (_, work):
            (work / "picks.jsonl").write_text("what was picked")
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert in_child(dies).code == -signal.SIGKILL
    with staged_output(tmp_path / "out", resume=True) as (_, work):
        assert (work / "picks.jsonl").read_text() == "what was picked"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_ended_while_another_began_is_not_written_over(tmp_path, monkeypatch):

    hold = stage._hold
    monkeypatch.setattr(stage, "_hold", lambda lock: (tmp_path / "out").mkdir() or hold(lock))
    with pytest.raises(OutputError, match="exists already"), staged_output(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The disk


@pytest.mark.skipif(shutil.which("cc") is None, reason="the failing disk is written in C")
def test_a_disk_that_fails_loses_nothing(scene):
    found = sweep("slice", scene, every={"disk full": 8, "killed": 9})
    assert sorted({each["fault"] for each in found}) == ["disk full", "killed"] and len(found) >= 5
    assert [each for each in found if each["wrong"] is not None] == []


# Memory


def test_a_run_that_can_never_fit_is_refused_before_the_cut(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_memory_of", lambda _: (2**40, 10_000))
    with pytest.raises(BudgetError, match=r"calibration needs about .* there are 0\.1 MB; lower calibrate\.num_images"):
        vitrim.compress(str(scene.source), data=scene.root / "images", out=tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_needs_is_logged_first(scene, caplog, monkeypatch):
    caplog.set_level("INFO", logger="vitrim")
    model = vitrim.load(scene.output)
    given = model, find_mlps(model), [16]
    batches = [torch.randn(4, 3, 32, 32)] * 2
    monkeypatch.setattr(memory, "_memory_of", lambda _: (10_000, 2**40))  # not free now may be free in a moment
    memory.check_memory(*given, Recipe(mlp_ratio=0.5, recover={"steps": 2}), batches)
    (said,) = caplog.messages
    assert "needs about" in said and "0.1 MB are free" in said
    memory.check_memory(*given, Recipe(mlp_ratio=0.5), None)
    assert caplog.messages == [said]


def test_needs_are_the_same_by_shapes_alone_and_leave_the_model_as_it_was(scene):
    model = vitrim.load(scene.output).train()
    given = find_mlps(model), [16], RepairOptions()
    shape = {"num_images": 8, "batch_size": 4}
    real = memory.estimate_memory(*given, model, torch.zeros(3, 32, 32), **shape)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert real == memory.estimate_memory(*given, copy.deepcopy(model).to("meta"), torch.zeros(3, 32, 32), **shape)
    assert real.activations == 3 * 8 * 17 * 32 * 4  # three times 17 tokens an image
