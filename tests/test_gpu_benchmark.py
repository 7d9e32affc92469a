"""The pieces of benchmarks/gpu.py on the CPU, with tiny models; what needs CUDA is not run here."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from vitrim.cost.count import num_parameters

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
assert SPEC is not None and SPEC.loader is not None
gpu = sys.modules["gpu"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu)
CPU = torch.device("cpu")
TINY = ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(gpu.MODELS, "tiny", TINY)
    monkeypatch.setattr(gpu, "ROUNDS", 1)


def test_half_of_a_model_has_half_of_its_parameters_and_the_same_first_units():
    whole, half = gpu.pair(*TINY, CPU)
    assert 0.4 < num_parameters(half) / num_parameters(whole) <= 0.5
    kept = half.blocks[0].mlp.fc1.weight
    assert torch.equal(kept, whole.blocks[0].mlp.fc1.weight[: len(kept)])


def test_rows_are_of_every_type_mode_and_batch(tiny):
    clock = gpu.Clock(5, 60)
    rows = list(gpu.rows_of("tiny", CPU, (1, 2), ("eager", "compiled"), clock, backend="eager"))
    assert [(row["dtype"], row["mode"], row["batch"]) for row in rows] == [
        (dtype, mode, batch) for dtype in gpu.DTYPES for mode in ("eager", "compiled") for batch in (1, 2)
    ]
    for row in rows:
        assert row["latency"]["half"]["ratio"] > 0 and row["peak_mib"] == {"original": None, "half": None}
    table = gpu.markdown({"rows": rows})
    assert table.count("\n") == 1 + len(rows) and "| tiny | bf16 | compiled | 2 |" in table


def test_compiled_blocks_compute_the_same_and_are_undone():
    whole, half = gpu.pair(*TINY, CPU)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        before = half(images)
        gpu.prepare_((whole, half), "compiled", "eager")
        assert all(block._compiled_call_impl is not None for block in half.blocks)
        torch.testing.assert_close(half(images), before)
        gpu.prepare_((whole, half), "eager", "eager")
        assert all(block._compiled_call_impl is None for block in half.blocks)


def test_what_would_take_too_long_or_fails_is_left_out_and_said(tiny):
    late = gpu.Clock(minutes=-1, seconds=60)
    assert late.refusal(0.0) == "left out: -1 minutes are over"
    assert gpu.Clock(1, 2).refusal(3.0) == "left out: 3 s expected" and gpu.Clock(1, 2).refusal(1.0) is None
    found = gpu.measure(gpu.pair(*TINY, CPU), torch.randn(1, 5, 32, 32), "eager", 1, gpu.Clock(1, 60))
    assert found["refused"].startswith("failed: ")
    row = {"model": "tiny", "dtype": "bf16", "mode": "eager", "batch": 1, **found}
    assert "failed" in gpu.line(row) and "failed" in gpu.markdown({"rows": [row]})


def test_two_runs_on_one_device_agree(monkeypatch):
    monkeypatch.setattr(gpu, "CORRECT", {"closed form": {"method": "dgmr", "repair": {"refit": False}}})
    found = gpu.correctness("cpu", "cpu", num_images=64)["closed form"]
    assert found["equal_picks"] == 1 and found["difference"] == 0 and 0 < found["relative_error_cpu"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without one")
def test_without_a_gpu_it_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert capsys.readouterr().out.startswith("gpu: torch sees no CUDA device here")
