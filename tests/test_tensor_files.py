"""Checkpoints read and written tensor by tensor: whatever they hold, and wherever a run was stopped."""

import json
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vitrim.errors import CheckpointError
from vitrim.storage import tensor_writer
from vitrim.storage.sealed import append, line_of, read_journal
from vitrim.storage.tensor_files import CODES, DTYPES, open_tensors, tensor_bytes
from vitrim.storage.tensor_writer import TensorWriter

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def tensors(draw):
    """Tensors of any type and shape, scalars and empty ones too, by any name."""
    names = draw(st.lists(st.text(max_size=8).filter(lambda name: name != "__metadata__"), unique=True, max_size=8))
    found = {}
    for name in names:
        dtype, shape = draw(st.sampled_from(list(CODES))), tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        values = draw(st.binary(min_size=math.prod(shape) * dtype.itemsize, max_size=math.prod(shape) * dtype.itemsize))
        if dtype == torch.bool:
            values = bytes(value & 1 for value in values)
        flat = torch.frombuffer(bytearray(values), dtype=dtype) if values else torch.empty(0, dtype=dtype)
        found[name] = flat.reshape(shape)
    return found


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "out").mkdir()
        yield Path(path) / "out"


def writer_for(values, out, *, limit=None, resume=False):
    layout = [(name, tensor.dtype, tensor.shape) for name, tensor in values.items()]
    journal = out.parent / "journal"
    return TensorWriter(out, layout, stem="model", shard_bytes=limit, journal=journal, resume=resume)


def write(writer, values, names):
    for name in names:
        data = bytes(tensor_bytes(values[name]))
        middle = len(data) // 2
        writer.write(name, [data[:middle], data[middle:]])


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@quick
@given(values=tensors(), limit=st.one_of(st.none(), st.integers(1, 200)), seed=st.randoms())
def test_the_library_reads_what_was_written_in_any_order(values, limit, seed):
    with folder() as out:
        writer = writer_for(values, out, limit=limit)
        assert all(writer.places[name].start % tensor.element_size() == 0 for name, tensor in values.items())
        names = list(values)
        seed.shuffle(names)
        write(writer, values, names)
        writer.close()
        read = {}
        for file in out.glob("*.safetensors"):
            part = load_file(file)
            assert limit is None or len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
            assert not read.keys() & part.keys()
            read |= part
        assert read.keys() == values.keys() and all(same(read[name], values[name]) for name in values)
        ours = open_tensors(out)
        assert ours.keys() == values.keys() and all(same(ours[name], values[name]) for name in values)
        assert not list(writer.wrong(ours))
        index = out / "model.safetensors.index.json"
        if index.exists():
            known = json.loads(index.read_text())
            assert known["weight_map"].keys() == values.keys()
            assert known["metadata"]["total_size"] == sum(tensor.nbytes for tensor in values.values())
        else:
            assert [file.name for file in out.iterdir()] == ["model.safetensors"]


@quick
@given(values=tensors())
def test_what_the_library_wrote_is_read(values):
    with folder() as out:
        save_file(values, out / "model.safetensors", metadata={"format": "pt", "note": "x"})
        ours = open_tensors(out)
        assert ours.keys() == values.keys() and all(same(ours[name], values[name]) for name in values)
        assert all(b"".join(ours.chunks(name)) == bytes(tensor_bytes(values[name])) for name in values)
        assert all(fake.shape == values[name].shape and fake.is_meta for name, fake in ours.fakes().items())


@quick
@given(values=tensors(), limit=st.one_of(st.none(), st.integers(1, 200)), data=st.data())
def test_a_writer_goes_on_after_any_number_of_tensors_and_any_cut_through_its_journal(values, limit, data):
    assume(values)
    with folder() as out:
        whole = writer_for(values, out, limit=limit)
        write(whole, values, values)
        whole.close()
        expected = contents(out)
    with folder() as out:
        first = writer_for(values, out, limit=limit)
        done = list(values)[: data.draw(st.integers(0, len(values)))]
        write(first, values, done)
        if data.draw(st.booleans()):
            first.sync()
        first.abandon()
        journal = out.parent / "journal"
        text = journal.read_bytes() if journal.exists() else b""
        journal.write_bytes(text[: data.draw(st.integers(0, len(text)))] + data.draw(st.binary(max_size=5)))
        second = writer_for(values, out, limit=limit, resume=True)
        assert second.digests.keys() <= set(done)
        assert all(second.digests[name] == whole.digests[name] for name in second.digests)
        write(second, values, [name for name in values if name not in second.digests])
        second.close()
        assert contents(out) == expected and not list(second.wrong(open_tensors(out)))
        lines = read_journal(journal)
        assert {line["tensor"]: line["values"] for line in lines} == second.digests == whole.digests


VALUES = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(())}


def test_another_layout_starts_again_and_leaves_nothing_of_the_first(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = writer_for(VALUES, out, limit=10)
    write(first, VALUES, VALUES)
    first.close()
    assert len(list(out.iterdir())) == 4
    second = writer_for(VALUES, out, resume=True)
    assert second.digests == {} and [file.name for file in out.iterdir()] == ["model.safetensors"]
    shorter = out / "model.safetensors"
    write(second, VALUES, VALUES)
    second.close()
    shorter.write_bytes(shorter.read_bytes()[:-1])
    assert writer_for(VALUES, out, resume=True).digests == {}


def test_a_journal_is_on_disk_only_after_the_values(tmp_path, monkeypatch):
    out, order = tmp_path / "out", []
    out.mkdir()
    monkeypatch.setattr(tensor_writer.os, "fsync", lambda _: order.append("values"))
    monkeypatch.setattr(tensor_writer, "append", lambda *_: order.append("journal"))
    monkeypatch.setattr(tensor_writer, "SYNC_BYTES", 1)
    writer = writer_for(VALUES, out)
    write(writer, VALUES, ["a"])
    assert order == ["values", "journal"]
    writer.abandon()


@pytest.mark.parametrize("chunks", [[b"1234"], [b"1" * 24, b"1"]])
def test_a_tensor_of_the_wrong_size_is_refused(tmp_path, chunks):
    (tmp_path / "out").mkdir()
    writer = writer_for(VALUES, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"a: has \d+ bytes, its shape says 24"):
        writer.write("a", chunks)
    writer.abandon()


def test_values_that_changed_on_disk_are_noticed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    writer = writer_for(VALUES, out)
    write(writer, VALUES, VALUES)
    writer.close()
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[writer.places["b"].start] ^= 1
    file.write_bytes(data)
    assert list(writer.wrong(open_tensors(out))) == ["b"]


def test_lines_behind_a_torn_one_are_never_glued_to_it(tmp_path):
    journal = tmp_path / "journal"
    append(journal, line_of({"a": 1}))
    with journal.open("ab") as file:
        file.write(line_of({"a": 2}).encode()[:-5])
    assert read_journal(journal) == [{"a": 1}]
    append(journal, line_of({"a": 3}))
    assert read_journal(journal) == [{"a": 1}, {"a": 3}]


# Torch files


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_torch_files_are_read_without_their_wrapping(tmp_path, wrap, zipped):
    path = tmp_path / "file.pth"
    torch.save(wrap({**VALUES, "step": 3}), path, _use_new_zipfile_serialization=zipped)
    for ours in (open_tensors(path), open_tensors(tmp_path)):
        assert ours.keys() == VALUES.keys() and all(same(ours[name], VALUES[name]) for name in VALUES)
        assert b"".join(ours.chunks("a")) == bytes(tensor_bytes(VALUES["a"]))
    renamed = open_tensors(path).renamed({"a": "x"})
    assert list(renamed) == ["x"] and same(renamed["x"], VALUES["a"])


# Folders with several files


def test_each_library_gets_its_own_file(tmp_path):
    for name in ("model", "open_clip_model"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert list(open_tensors(tmp_path)) == ["model"]
    assert list(open_tensors(tmp_path, prefer="open_clip")) == ["open_clip_model"]
    assert list(open_tensors(tmp_path, prefer="model.safetensors")) == ["model"]


def test_a_folder_that_does_not_say_which_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_tensors(tmp_path)
    for name in ("one", "two"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 weight files and no index"):
        open_tensors(tmp_path)
    assert list(open_tensors(tmp_path / "two.safetensors")) == ["two"]


def sharded(path):
    writer = writer_for(VALUES, path, limit=10)
    write(writer, VALUES, VALUES)
    writer.close()
    return path / "model.safetensors.index.json"


INDEX_FAULTS = {
    "a missing shard": (lambda m: m | {"a": "model-00009-of-00003.safetensors"}, "missing, named by model"),
    "a tensor that the shard lacks": (lambda m: m | {"d": m["a"]}, "holds d, and it does not"),
    "the wrong shard": (lambda m: m | {"a": m["b"]}, "holds a, and it does not"),
    "a file elsewhere": (lambda m: m | {"a": "../secret.safetensors"}, "not a file beside it"),
    "an absolute path": (lambda m: m | {"a": "/etc/passwd"}, "not a file beside it"),
    "the folder itself": (lambda m: m | {"a": ".."}, "missing, named by model"),
    "a number": (lambda m: m | {"a": 3}, "missing, named by model"),
    "a list": (lambda m: list(m), "is no index of shards"),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_a_wrong_index_is_one_line(tmp_path, name):
    change, words = INDEX_FAULTS[name]
    out = tmp_path / "out"
    out.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    index = sharded(out)
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_tensors(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no index of shards"):
        open_tensors(tmp_path)


def header(**said):
    text = json.dumps(said).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGED = {
    "empty": b"",
    "noise": b"no safetensors at all",
    "header cut": header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})[:20],
    "values cut": header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + b"123",
    "values missing": header(a={"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}) + b"1234",
    "values outside": header(a={"dtype": "F32", "shape": [1], "data_offsets": [96, 100]}) + b"1234",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[name])
    with pytest.raises(CheckpointError, match="truncated or damaged") as caught:
        open_tensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_type_that_torch_lacks_is_named(tmp_path):
    said = header(a={"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]})
    (tmp_path / "model.safetensors").write_bytes(said + b"1234")
    with pytest.raises(CheckpointError, match="a has type F8_E8M0; allowed are F64") as caught:
        open_tensors(tmp_path)
    assert all(code in str(caught.value) for code in DTYPES)


def test_a_file_that_shrinks_or_goes_while_it_is_read_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(VALUES, path)
    ours = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        [list(ours.chunks(name)) for name in ours]
    path.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        ours["a"]
