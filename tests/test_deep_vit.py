"""benchmarks/deep_vit.py at toy size: what it trains on, that it goes on where it stopped, and what it writes."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("deep_vit", ROOT / "benchmarks" / "deep_vit.py")
assert SPEC is not None and SPEC.loader is not None
deep_vit = sys.modules["deep_vit"] = importlib.util.module_from_spec(SPEC)  # dataclasses look their module up there
SPEC.loader.exec_module(deep_vit)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two blocks in place of twelve, and noise in place of images."""
    monkeypatch.setitem(deep_vit.MODEL_ARGS, "depth", 2)
    generator = torch.Generator().manual_seed(1)
    noise = {size: torch.randint(256, (20, 3, size, size), generator=generator).byte() for size in (32, 64)}
    monkeypatch.setattr(deep_vit, "pixels", lambda path, limit, size: noise[size][:limit])


def trained(path, steps, every=1):
    args = argparse.Namespace(steps=steps, batch_size=4, num_train=20, rate=1e-3, every=every)
    state = deep_vit.Training.start(0, args.rate)
    state.resume(path, {"seed": 0})
    deep_vit.train(state, args, path, {"seed": 0})
    return state


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole.pt", 3)
    learn, calls = deep_vit.learn, []

    def stops(state, *rest):
        calls.append(state.step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(state, *rest)

    monkeypatch.setattr(deep_vit, "learn", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts.pt", 3)
    again = trained(tmp_path / "parts.pt", 3)
    assert calls == [0, 1, 2, 2]
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(again.average.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(SystemExit, match="belongs to a run with"):
        whole.resume(tmp_path / "parts.pt", {"seed": 1})


def test_patches_are_visible_or_hidden_and_every_second_image_shows_one_region():
    visible, hidden = deep_vit.choose(4, torch.Generator().manual_seed(0))
    assert visible.shape == (4, deep_vit.VISIBLE)
    for mine, others in zip(visible, hidden, strict=True):
        assert sorted([*mine.tolist(), *others.tolist()]) == list(range(64))
    rows, columns = visible[1] // 8, visible[1] % 8
    assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) <= 40


def test_crops_and_colours_stay_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 64, 64), generator=generator).byte()
    found = deep_vit.coloured(deep_vit.crops(images, 0.3, generator), generator)
    assert found.shape == (6, 3, 32, 32) and 0 <= found.min() < found.max() <= 1


def test_what_is_written_is_a_timm_model_with_layer_scale_and_registers(tmp_path):
    vit = deep_vit.build()
    deep_vit.write_model(vit, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.num_reg_tokens == 4 and loaded.blocks[0].ls1.gamma.shape == (192,)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(images), vit.eval()(images))
