"""What is read back: a flipped bit anywhere is found and its file named, and what came before it is used."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.support.faults import Scene
from tests.support.resumed import Job
from vitrim.compression.saved_cut import resume_cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import CheckpointError
from vitrim.storage.sealed import (
    append,
    line_of,
    read_journal,
    read_sealed,
    read_tensors,
    sealed,
    write_sealed,
    write_tensors,
)

ABOUT = {"plan": {"b": [1, 0.1, None], "a": "é"}, "errors": {}, "ratio": 1e-300}
TENSORS = {
    "b": torch.arange(5, dtype=torch.bfloat16),
    "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T,
    "c": torch.zeros(0, 2),
    "d": torch.tensor(True),
}


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return data


def test_every_bit_of_a_document_counts(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, ABOUT)
    whole = path.read_bytes()
    assert read_sealed(path, {"plan": dict, "ratio": float}) == ABOUT
    for bit in range(8 * len(whole)):
        flip(path, bit)
        try:
            assert read_sealed(path, {}) == ABOUT  # space between values
        except CheckpointError as error:
            assert re.match(rf"{path}: can't be used \(.+\)\.$", str(error))
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds list where a mapping belongs"),
        ("", "Expecting value"),
        ("{}", "digest is not that of its contents; it was damaged or edited"),
        (json.dumps(ABOUT), "digest is not that of its contents"),
        (json.dumps(sealed({"plan": []})), "has no 'plan' as this version writes it"),
        (json.dumps(sealed({})), "has no 'plan' as this version writes it"),
        ("[" * 100_000, "recursion"),
        (None, "No such file"),
    ],
)
def test_a_document_of_another_kind_is_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "cut.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"cut\.json: can't be used \(.*{words}") as caught:
        read_sealed(tmp_path / "cut.json", {"plan": dict})
    assert "\n" not in str(caught.value)


def test_every_bit_of_a_tensor_file_counts(tmp_path):
    path = tmp_path / "a.safetensors"
    digest = write_tensors(path, TENSORS, {"made": "here"})
    found, about = read_tensors(path, digest=digest)
    assert about == {"made": "here"} and found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert torch.equal(load_file(path)["a"], TENSORS["a"])  # the library reads it, too
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flip(path, bit)
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            read_tensors(path, digest=digest)
        path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="digest is not that"):  # whole, and another file's
        read_tensors(path, digest="0" * 32)


def test_lines_up_to_a_damaged_one_are_used_and_that_is_said(tmp_path, caplog):
    journal = tmp_path / "picks.jsonl"
    values = [{"site": f"blocks.{index}", "keep": [index]} for index in range(4)]
    for value in values:
        append(journal, line_of(value))
    whole, length = journal.read_bytes(), len(line_of(values[0]))
    assert read_journal(journal, {"site": str}) == values and not caplog.messages
    for bit in range(8 * 2 * length, 8 * 3 * length, 5):
        flip(journal, bit)
        caplog.clear()
        assert read_journal(journal) == values[:2]
        assert re.search(r"picks\.jsonl: line 3 is not used \(.+\)", caplog.text)
        assert journal.read_bytes() == whole[: 2 * length]
        journal.write_bytes(whole)
    journal.write_bytes(whole[:-4])  # as a crash leaves it: nothing to say
    caplog.clear()
    assert read_journal(journal) == values[:3] and not caplog.messages


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Jobs by name, each run whole and stopped once when it is first asked for."""
    root, made = tmp_path_factory.mktemp("jobs"), {}
    (root / "scene").mkdir()
    scene = Scene(root / "scene")

    def job(name):
        if name not in made:
            (root / name).mkdir()
            made[name] = Job(name, scene, root / name)
        return made[name]

    return job


@pytest.mark.parametrize(("name", "seed"), [("prune-checkpoint", 0), ("prune-checkpoint", 1), ("compress", 2)])
def test_a_stopped_run_with_a_flipped_bit_ends_the_same_or_in_one_line(jobs, name, seed):
    assert jobs(name).flipped(random.Random(seed)) is None


@pytest.mark.parametrize("file", ["cut.json", "cut.safetensors"])
def test_a_damaged_cut_is_made_again_and_training_goes_on_behind_it(jobs, caplog, file):
    job = jobs("compress")
    (path,) = [path for path in job.files() if path.name == file]
    assert job.flipped(random.Random(0), path) is None
    assert f"{file}: can't be used" in caplog.text and "The cut is made again" in caplog.text
    assert "belongs to another cut" not in caplog.text


@pytest.mark.parametrize("text", ["[]", "{}", "{", "\xff"])
def test_what_is_no_cut_is_made_again(tmp_path, text):
    (tmp_path / "cut.json").write_text(text, encoding="latin-1")
    assert resume_cut_(torch.nn.Linear(1, 1), Recipe(), tmp_path) is None
