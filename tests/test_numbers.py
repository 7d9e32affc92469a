"""Every table of numbers in README and docs is what a benchmark wrote, to the letter."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "name, page, made_by",
    [
        ("headline", "README.md", "before_after"),
        ("headline", "docs/choosing.md", "markdown"),
        ("repair", "docs/choosing.md", "markdown"),
        ("selection", "docs/checkpoints.md", "markdown"),
        ("streaming", "docs/checkpoints.md", "markdown"),
        ("streaming", "docs/checkpoints.md", "calibration_table"),
        ("adapters", "docs/methods/op-lora.md", "markdown"),
        ("tiny_clip", "docs/clip.md", "markdown"),
        ("corp", "docs/methods/corp.md", "mlp_table"),
        ("corp", "docs/methods/corp.md", "head_table"),
        ("moefication", "docs/methods/moefication.md", "time_table"),
        ("moefication", "docs/methods/moefication.md", "fidelity_table"),
        ("lazy_neuron", "docs/methods/top-k.md", "noise_table"),
        ("lazy_neuron", "docs/methods/top-k.md", "label_table"),
        ("lazy_neuron", "docs/methods/top-k.md", "time_table"),
        ("distillation", "docs/recovery.md", "speed_table"),
        ("distillation", "docs/recovery.md", "blockwise_table"),
        ("distillation", "docs/scaling.md", "processes_table"),
        ("faults", "docs/reliability.md", "table"),
        ("elastic", "docs/recovery.md", "markdown"),
        ("export", "docs/sharing.md", "markdown"),
        ("lora_prune-cifar10", "docs/methods/lora-prune.md", "markdown"),
        ("patch_slimming-cifar10", "docs/methods/patch-slimming.md", "markdown"),
        ("lora_prune-deep", "docs/methods/lora-prune.md", "markdown"),
        ("patch_slimming-deep", "docs/methods/patch-slimming.md", "markdown"),
        ("recursive-cifar10", "docs/methods/recursive.md", "markdown"),
        ("recursive-deep", "docs/methods/recursive.md", "markdown"),
        ("recursive-minilm", "docs/methods/recursive.md", "markdown"),
        ("lortsar-small", "docs/methods/lortsar.md", "markdown"),
        ("registry", "docs/models.md", "summary"),
        ("registry", "docs/models.md", "families"),
        ("registry", "docs/models.md", "refusals"),
    ],
)
def test_the_table_is_the_one_that_the_benchmark_wrote(name, page, made_by, monkeypatch):
    benchmark = imported(name.partition("-")[0], monkeypatch)  # what follows names the model
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert getattr(benchmark, made_by)(result) in (ROOT / page).read_text()
    assert {"command", "machine", "torch", "time"} <= result["environment"].keys()


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_can_be_imported(name, monkeypatch):
    assert imported(name, monkeypatch).__doc__


def imported(name, monkeypatch):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # they share code as scripts in one folder do
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, benchmark)  # dataclasses look their module up there
    spec.loader.exec_module(benchmark)
    return benchmark
