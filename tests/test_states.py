"""Models and torch in the states people have them in: each is undone, carried through, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import timm
import torch
from torch import nn

import vitrim
from tests.support.digits import DIGITS
from vitrim.errors import VitrimError
from vitrim.torch_state import AUTOCAST

SIZE = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = list(IMAGES.split(8))


def tiny(**kwargs) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", **SIZE, **kwargs).eval()


@contextmanager
def dtype_of(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def nested_autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "float64": lambda: dtype_of(torch.float64),
    "bfloat16": lambda: dtype_of(torch.bfloat16),
    "deterministic": deterministic,
    "autocast": nested_autocast,
    "device": lambda: torch.device("meta"),
}


def state_now() -> tuple:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        [torch.is_autocast_enabled(kind) for kind in AUTOCAST],
        torch.is_autocast_cache_enabled(),
        depth,
    )


def everything(model: nn.Module) -> tuple[dict, dict, dict, dict]:
    """What the entry points give for a model: repaired and distilled, pruned in place, compared, looked at."""
    options = vitrim.RepairOptions(refit_steps=2)
    recover = {"steps": 2, "batch_size": 8, "lr": 1e-4}
    small = vitrim.compress(
        model, data=IMAGES, method="dgmr", mlp_ratio=1, repair=options, recover=recover, device="cpu", quiet=True
    ).model
    assert small is not None
    vitrim.prune_(model, "dgmr", BATCHES, mlp_ratio=1, repair=options)
    found = vitrim.evaluate(small, model, IMAGES, latency=False, device="cpu")
    seen = vitrim.inspect(model, mlp_ratio=0.5).to_json()
    return small.state_dict(), model.state_dict(), dict(found.fidelity), seen


@pytest.fixture(scope="module")
def expected() -> tuple[dict, dict, dict, dict]:
    return everything(tiny())


@pytest.mark.parametrize("name", STATES)
def test_the_callers_state_changes_nothing_and_comes_back(name, expected):
    model = tiny()
    with STATES[name]():
        before = state_now()
        small, pruned, fidelity, seen = everything(model)
        assert state_now() == before
        with pytest.raises(VitrimError):
            vitrim.compress(model, method="none such", quiet=True)
        assert state_now() == before
    for found, wanted in ((small, expected[0]), (pruned, expected[1])):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in found)
        assert not any(tensor.is_inference() for tensor in found.values())
    assert fidelity == expected[2] and seen == expected[3]


@pytest.mark.parametrize("name", ("bfloat16", "device"))
def test_files_are_written_and_read_in_any_state(name, tmp_path):
    with STATES[name]():
        out = vitrim.compress(DIGITS, method="magnitude", mlp_ratio=1, out=tmp_path / "small", quiet=True).out
        assert out is not None
        loaded = vitrim.load(out)
        vitrim.slice(out, tmp_path / "smaller", mlp_ratio=0.5)
        source = DIGITS.removeprefix("local-dir:")
        vitrim.prune_checkpoint(source, tmp_path / "pruned", method="magnitude", mlp_ratio=1, quiet=True)
    again = vitrim.load(tmp_path / "pruned")
    for key, tensor in vitrim.load(out).state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor) and torch.equal(again.state_dict()[key], tensor)
        assert tensor.dtype == loaded.state_dict()[key].dtype == torch.float32 and not tensor.is_meta


def test_every_entry_point_that_runs_models_has_a_state_of_its_own():
    without = {"doctor", "push"}
    names = [name for name in vitrim.__all__ if name.islower() and name not in ("methods", "__version__", *without)]
    assert [name for name in names if not hasattr(getattr(vitrim, name), "__wrapped__")] == []
