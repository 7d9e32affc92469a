"""The documentation keeps its word: recipes load, Python blocks run, command lines parse, make targets exist.

A block is left alone (compiled or parsed, not run) behind a comment `<!-- needs: ... -->` that says what it would need.
The Python blocks of a page run in order, in a process of their own and an empty folder, as a backend would type them.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from cyclopts import CycloptsError

from tests.support.documents import DOCS, PAGES, ROOT, blocks_of, commands_of, name
from tests.support.processes import run_python
from vitrim.cli.app import app
from vitrim.config.options import (
    AdapterOptions,
    AllocateOptions,
    AtOnceOptions,
    BlockwiseOptions,
    CacheOptions,
    CalibrateOptions,
    ExitOptions,
    RecoverOptions,
    RepairOptions,
)
from vitrim.config.recipe import Recipe
from vitrim.config.steps import Step
from vitrim.methods import METHODS

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# As `python PAGE`, but nothing is timed for long, images and refit are few where a page leaves them at their defaults
# (tests/support/effort.py), and results are not loaded in fresh processes, which test_checkpoint.py tries.
RUN = """
import runpy, sys
from vitrim.cost.latency import measure_latency
from vitrim.output.verify import checking_with
from tests.support.effort import quick_by_default
measure_latency.__kwdefaults__ |= {"rounds": 1, "min_seconds": 0.0}
quick_by_default(num_images=64)
with checking_with(lambda check: 0.0):
    runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_loads(path: Path):
    recipe = Recipe.load(path)
    assert path.name.startswith(f"{recipe.steps[0].method}_")
    assert len(path.read_text().splitlines()) <= 25


def test_every_method_has_a_recipe():
    assert {step.method for path in RECIPES for step in Recipe.load(path).steps} >= METHODS.keys()


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_yaml_blocks_are_recipes(page: Path):
    for block in blocks_of(page, "yaml"):
        Recipe.parse(yaml.safe_load(block.code), where=f"{name(page)}:{block.line}")


@pytest.mark.defaults
def test_the_reference_has_every_key_of_a_recipe_with_its_default():
    data = yaml.safe_load(blocks_of(ROOT / "docs" / "api.md", "yaml")[0].code)
    keys = {*data} | {f"{part}.{key}" for part in data if isinstance(data[part], dict) for key in data[part]}
    deeper = ("cache_teacher", "adapter")
    keys |= {f"recover.{part}.{key}" for part in deeper for key in data["recover"][part]}
    assert keys - {"options.select_on"} == {*Recipe.keys()} - {"steps"}
    recipe = Recipe.parse(data)
    assert recipe.calibrate == CalibrateOptions()
    assert recipe.steps[0].repair == RepairOptions()
    assert recipe.steps[0].allocate == AllocateOptions()
    assert recipe.blockwise == BlockwiseOptions() and recipe.at_once == AtOnceOptions()
    assert recipe.exits == ExitOptions()
    assert recipe.recover == RecoverOptions(epochs=2, cache_teacher=CacheOptions(), adapter=AdapterOptions())
    fields = {**Recipe.model_fields, **Step.model_fields}
    assert {"round_to", "exact", "seed", "device", "scope", "method"} <= {
        key for key, value in data.items() if key in fields and value == fields[key].default
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_compile(page: Path):
    for block in blocks_of(page, "python"):
        compile("\n" * (block.line - 1) + block.code, name(page), "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.runs for b in blocks_of(page, "python"))], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    script = ""
    for block in blocks_of(page, "python"):
        if block.runs:  # at its own line, so that a traceback points into the page
            script += "\n" * (block.line - 1 - script.count("\n")) + block.code
    (tmp_path / "work").mkdir()
    (tmp_path / page.name).write_text(script, encoding="utf-8")
    (tmp_path / "run.py").write_text(RUN)
    done = run_python(tmp_path / "run.py", tmp_path / page.name, cwd=tmp_path / "work")
    assert done.returncode == 0, f"{name(page)}:\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_parse(page: Path):
    for line, (command, *arguments) in commands_of(page):
        where = f"{name(page)}, block at line {line}: {command} {' '.join(arguments)}"
        if command == "vitrim":
            try:
                app.parse_args(arguments, exit_on_error=False, print_error=False)
            except CycloptsError as error:
                pytest.fail(f"{where}\n{error}")
            for before, value in pairwise(arguments):
                if before == "--recipe" and value.startswith("recipes/"):
                    assert (ROOT / value).is_file(), where
        if command == "make":
            targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
            assert {word for word in arguments if "=" not in word} <= targets, where
