"""YAML: what is read as what, what is refused, how fast, and that what is written is read as it was."""

import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.digits import DIGITS
from vitrim.cli.app import run
from vitrim.clip.tasks import tune_text
from vitrim.config.recipe import Recipe
from vitrim.config.yaml_files import read_yaml, write_yaml
from vitrim.errors import RecipeError

BOMB = "a: &a {x: 1}\n" + "\n".join(
    f"{b}: &{b} {{<<: [{f'*{a}, ' * 9}]}}" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            (text, text)
            for text in ("yes", "no", "on", "Off", "y", "010", "1_000", "0x1F", "0b1", "1:30", "2001-01-01")
        ],
        *[(text, text) for text in ("00.5", "=", "<<", "2001-13-45", "1e", "e5", ".", "--1", "1:30.5")],
        *[("1e-4", 1e-4), ("1.", 1.0), (".5", 0.5), ("+12", 12), ("-0", 0), ("0", 0), ("12", 12), ("1e5", 1e5)],
        *[("true", True), ("FALSE", False), ("~", None), ("", None), ("null", None), (".inf", math.inf)],
    ],
)
def test_a_number_is_decimal_and_a_truth_is_true_or_false(text, value):
    found = read_yaml(f"a: {text}", where="x")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 010", r"seed: give a number, without quotes and in decimal digits \(got '010'\)"),
        ("recover: {steps: 1:30}", r"recover\.steps: give a number, .*got '1:30'"),
        ("exact: yes", r"exact: give true or false \(got 'yes'\)"),
        ("exact: 1", r"exact: give true or false \(got 1\)"),
        ("seed: true", r"seed: give a number \(got True\)"),
        ("repair: {refit: on}", r"repair\.refit: give true or false \(got 'on'\)"),
        ("repair: 1", r"repair: give true or false \(got 1\)"),
        ("widths: {blocks.0.mlp: '8'}", "widths: give a number"),
        ("recover: {steps: 1, elastic: [010, 1]}", r"recover\.elastic: give a number"),
        ("{method: amp, options: {delta: .nan}}", r"options\.delta of method amp: Input should be a finite number"),
        ("{method: low-rank, options: {rank: .inf}}", r"options\.rank"),
        ("{method: amp, options: {delta: '1'}}", r"options\.delta of method amp: give a number"),
        ("{keep_ratio: 0.5, keep_ratio: 0.6}", "key 'keep_ratio' is there twice"),
        ("{recover: {steps: 5, 'steps': 6}}", "key 'steps' is there twice"),
        ("{a: &a 1, b: *a}", r"\*a stands for something above; write that out"),
        (f"steps: [{'{},' * 1500}]", r"steps: Tuple should have at most 16 items .*not 1500"),
        (f"seed: {2**64}", "seed: Input should be less than"),
    ],
)
def test_what_would_be_taken_for_something_else_is_refused(text, words):
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.parse(read_yaml(text, where="x"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text", ["- 1\n" * 10**6, BOMB, "[" * 60_000, "a" * 70_000, "- 1\n" * 16_000], ids=lambda text: text[:9]
)
def test_a_file_is_read_or_refused_in_seconds(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"longer than 64 KiB|stands for something above|recursion|holds list"):
        Recipe.load(tmp_path / "recipe.yaml")
    assert time.monotonic() - started < 10  # the first took minutes


def test_a_recipe_with_a_bad_byte_is_one_line(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes(b"seed: 1\nmodel: \xff\n")
    assert run(["compress", DIGITS, "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "recipe.yaml: can't be read" in said


TEXT = st.text(st.characters(codec="utf-8"), max_size=8) | st.from_regex(r"[-+.0-9eE:_xoyYnN~]{0,6}", fullmatch=True)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(DATA)
@example({"data": "1e4", "model": "yes", "scope": "010", "a": "1:30", "b": "*a", "c": "true", "d": ["=", "<<", "0o7"]})
@settings(deadline=None, max_examples=150)
def test_what_is_written_is_read_as_it_was(value):
    assert read_yaml(write_yaml(value), where="x") == value


def test_equal_parts_are_written_out():
    part = {"a": [1]}
    assert read_yaml(write_yaml([part, part]), where="x") == [part, part]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "1"])
def test_a_seed_outside_a_recipe_is_checked_too(seed):
    with pytest.raises(RecipeError, match=r"seed: is .*; give an integer from 0 to 4294967295"):
        tune_text("nothing", "nowhere", seed=seed)
