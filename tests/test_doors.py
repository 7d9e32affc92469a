"""Any document and any bytes at vitrim's doors, made by hypothesis: each opens, or says why not in one line.

Small numbers alone, since nothing bounds memory here: large ones, hangs and what is written elsewhere are tried in
children by tests/test_faults.py. `make faults` searches the same doors led by coverage.
"""

import importlib.util
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import doors
from tests.support.doors import DOORS, folder_of, knock, search, valid
from tests.support.faults import NAMES, PATHS, Scene, holders
from vitrim.errors import CheckpointError

TEXT = st.text(max_size=8) | st.sampled_from((*PATHS, *NAMES))
LEAF = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(width=16) | TEXT
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def folders(scene, tmp_path_factory):
    return {name: folder_of(name, scene, tmp_path_factory.mktemp(name)) for name in DOORS}


def parts_of(name, data):
    """The document in a file, and the bytes behind it."""
    if name == "recipe":
        return yaml.safe_load(data), b""
    length = int.from_bytes(data[:8], "little") + 8 if name == "safetensors" else len(data)
    return json.loads(data[8 if name == "safetensors" else 0 : length]), data[length:]


@st.composite
def near(draw, name, data):
    """A file with other JSON in one place of its document; JSON is YAML, too."""
    document, rest = parts_of(name, data)
    holder = draw(st.sampled_from(holders(document)))
    holder[draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))] = draw(JSON)
    return wrapped(name, document, rest)


def wrapped(name, document, rest=b""):
    text = json.dumps(document).encode()
    return (len(text).to_bytes(8, "little") if name == "safetensors" else b"") + text + rest


@st.composite
def patched(draw, data):
    """A file in which a few bytes became others."""
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(st.binary(max_size=16)) + data[at + draw(st.integers(0, 16)) :]


@pytest.mark.parametrize("name", DOORS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_door_opens_or_says_why_not_in_one_line(scene, folders, name, data):
    file = data.draw(st.sampled_from(valid(name, scene)))
    files = st.binary(max_size=200) | patched(file)
    if name not in ("image", "training file"):
        files |= near(name, file) | near(name, file) | JSON.map(lambda document: wrapped(name, document))
    knock(name, folders[name], data.draw(files))


@pytest.mark.parametrize("name", DOORS)
def test_a_valid_file_opens_every_door(scene, folders, name):
    assert knock(name, folders[name], valid(name, scene)[0]) is None


def test_tensors_that_the_library_can_not_rename_are_one_line(scene, folders):
    every = [json.loads(plan) for plan in valid("plan", scene)]
    about = next(plan for plan in every if plan["plan"]["edits"][0]["edit"] == "low_rank")
    about["origin"]["model_args"]["img_size"] = True  # timm would resize positions to 0 by 0
    assert "would be resampled" in knock("plan", folders["plan"], wrapped("plan", about))


@pytest.mark.parametrize("field", ["options", "versions"])
def test_a_plan_of_the_wrong_kind_is_refused(scene, folders, field):
    about = json.loads(valid("plan", scene)[0])
    about["plan"][field] = "__class__"
    assert "plan: damaged or incomplete" in knock("plan", folders["plan"], wrapped("plan", about))


def test_what_is_no_line_of_ours_is_not_let_through(tmp_path, monkeypatch):
    monkeypatch.setitem(doors.DOORS, "bad", ("a", lambda _: [][0]))
    with pytest.raises(IndexError):
        knock("bad", tmp_path, b"")


def test_a_name_in_an_error_can_not_break_its_line_or_reach_the_terminal():
    assert str(CheckpointError("a\nb\x1b[2J é\u202e\ud800")) == "a b\\x1b[2J é\\u202e\\ud800"


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_a_search_counts_what_it_tried(scene):
    assert search("recipe", scene, runs=30) == (30, [])
