"""The examples in docstrings run, and print what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import vitrim

ROOT = Path(vitrim.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text()
)
# What users call from Python; each has an example.
SHOWN = (
    "vitrim.clip.tasks",
    "vitrim.compression.file_to_file",
    "vitrim.compression.in_place",
    "vitrim.compression.leaderboard",
    "vitrim.compression.pipeline",
    "vitrim.compression.slicing",
    "vitrim.evaluation",
    "vitrim.inspection",
    "vitrim.machine",
    "vitrim.models.features",
    "vitrim.models.sites",
    "vitrim.ops.allocation",
    "vitrim.ops.forward_selection",
    "vitrim.ops.gram_schmidt",
    "vitrim.ops.least_squares",
    "vitrim.ops.low_rank",
    "vitrim.output.export",
    "vitrim.output.hub",
    "vitrim.output.load",
    "vitrim.surgery.edits",
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_do_what_they_show(name):
    done = doctest.testmod(import_module(name))
    assert done.attempted and not done.failed


def test_what_users_call_has_an_example():
    assert set(SHOWN) <= set(WITH_EXAMPLES)
