"""A few rows of `benchmarks/registry.py`: what each brought to light stays mended, and nothing raw is raised."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Outcome, MLPs, their kind, what loads the result, the end of the line that says why not.
ROWS = {
    "timm/deit_base_patch16_224": ("cut", 2, "plain", "timm", ""),
    "timm/resnet18": ("no MLP", None, "", None, "no MLP found"),
    "transformers/Gemma4VisionModel": ("cut", 2, "split gated", "transformers", ""),  # pixel_position_ids
    "transformers/Qwen3VLVisionModel": ("cut", 2, "plain", "transformers", ""),  # linear_fc1
    "transformers/Glm4vVisionModel": ("cut", 2, "split gated", "own", ""),  # not its merger
    "open_clip/ViT-B-32": ("cut", 2, "plain", "open_clip", ""),
}


@pytest.fixture(scope="module")
def sweep():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("registry"), importlib.import_module("architectures")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_comes_out_as_it_did(name, sweep):
    registry, architectures = sweep
    row = registry.tried(architectures.named(*name.split("/")), seconds=3600)  # however busy the machine is
    found = tuple(row.get(key) for key in ("outcome", "sites", "format"))
    outcome, sites, kind, loader, why = ROWS[name]
    assert found == (outcome, sites, loader), row
    assert row.get("kinds", [""]) == [kind] and row.get("why", "").endswith(why)


def test_the_sweep_raised_nothing_raw_and_every_output_loads_again():
    rows = json.loads((BENCHMARKS / "results" / "registry.json").read_text())["rows"].values()
    assert {row["library"] for row in rows} == {"timm", "transformers", "open_clip"}
    assert [row for row in rows if row["outcome"] in ("raw", "late")] == []
