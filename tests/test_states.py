"""Models and torch in the states people have them in: each is undone, carried through, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import nn

import vitrim
from tests.support.digits import DIGITS
from vitrim.errors import ModelError, SiteNotFoundError, VitrimError
from vitrim.models.given import check_weights
from vitrim.models.sites import find_mlps
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


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def in_ddp(model: nn.Module) -> nn.Module:
    with one_process():
        return nn.parallel.DistributedDataParallel(model)


def with_compiled_block(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile a block": with_compiled_block,
    "compile in place": compiled_in_place,
    "nested": lambda model: torch.compile(in_ddp(torch.compile(nn.DataParallel(model)))),
}


@pytest.fixture(scope="module")
def halved() -> vitrim.Result:
    return vitrim.compress(tiny(), method="magnitude", mlp_ratio=1, quiet=True)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name, halved):
    wrapped = WRAPPERS[name](tiny())
    before = {key: tensor.clone() for key, tensor in wrapped.state_dict().items()}
    found = vitrim.compress(wrapped, method="magnitude", mlp_ratio=1, quiet=True)
    assert found.metrics.stock and found.plan == halved.plan
    assert halved.model is not None and found.model is not None
    kept, wanted = found.model.state_dict(), halved.model.state_dict()
    assert kept.keys() == wanted.keys() and all(torch.equal(kept[key], tensor) for key, tensor in wanted.items())
    assert vitrim.inspect(wrapped).parameters == vitrim.inspect(tiny()).parameters
    after = wrapped.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_in_place_a_wrapper_that_only_passes_calls_on_stays():
    for wrap in (nn.DataParallel, torch.compile):
        model = tiny()
        assert vitrim.prune_(wrap(model), "magnitude", mlp_ratio=1).widths == {"blocks.0.mlp": 32, "blocks.1.mlp": 32}
        assert model.blocks[0].mlp.fc1.weight.shape == (32, 32)
    with pytest.raises(ModelError, match=r"prune_\(model.module\)"):
        vitrim.prune_(in_ddp(tiny()), "magnitude")
    with pytest.raises(ModelError, match=r"blocks.1: is wrapped \(OptimizedModule\)"):
        vitrim.prune_(with_compiled_block(tiny()), "magnitude")


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1"]))


def with_injected_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), model)


def masked(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        nn.utils.prune.l1_unstructured(block.attn.proj, "weight", amount=0.5)
    return model


def sharded(model: nn.Module) -> nn.Module:
    with one_process():
        return torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))


def half_on_meta(model: nn.Module) -> nn.Module:
    model.blocks[1].to("meta")
    return model


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "peft": (with_lora, r"adapters of PEFT .* model = model.merge_and_unload\(\)\."),
    "peft, injected": (with_injected_lora, r"blocks.0.attn.qkv has adapters of PEFT"),
    "peft, compiled": (lambda model: torch.compile(with_lora(model)), r"merge_and_unload"),
    "masks": (
        masked,
        r'blocks.0.attn.proj .*\(and 1 more modules\).*get_submodule\("blocks.0.attn.proj"\), "weight"\)',
    ),
    "shards": (sharded, r"sharded"),
    "meta": (half_on_meta, r"blocks.1.norm1.weight \(and 11 more\) is on the meta device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_in_the_weights_is_refused_before_the_first_image(name):
    def images() -> Iterator[torch.Tensor]:
        raise AssertionError("an image was read")
        yield

    spoil, reason = REFUSED[name]
    model = spoil(tiny())
    for use in (
        lambda: vitrim.compress(model, data=images(), method="dgmr", quiet=True),
        lambda: vitrim.prune_(model, "magnitude"),
        lambda: vitrim.evaluate(tiny(), model, images(), limit=4),
        lambda: vitrim.inspect(model, activity=images()),
    ):
        with pytest.raises(ModelError, match=reason):
            use()


def test_the_line_for_adapters_and_for_masks_is_the_way_on():
    merged = with_lora(tiny()).merge_and_unload()
    assert vitrim.prune_(merged, "magnitude", mlp_ratio=1).widths["blocks.0.mlp"] == 32
    model = masked(tiny())
    for block in model.blocks:
        nn.utils.prune.remove(block.attn.proj, "weight")
    vitrim.prune_(model, "magnitude", mlp_ratio=1)
    assert float((model.blocks[0].attn.proj.weight == 0).float().mean()) == 0.5


def test_a_model_built_in_inference_mode_is_copied_or_refused(expected):
    with torch.inference_mode():
        model = tiny()
    assert vitrim.evaluate(tiny(), model, IMAGES, latency=False, device="cpu").fidelity["relative_error"] == 0
    with pytest.raises(ModelError, match=r"made under torch.inference_mode"):
        vitrim.prune_(model, "magnitude")
    recovered = vitrim.compress(
        model,
        data=IMAGES,
        method="dgmr",
        mlp_ratio=1,
        repair=vitrim.RepairOptions(refit_steps=2),
        recover={"steps": 2, "batch_size": 8, "lr": 1e-4},
        device="cpu",
        quiet=True,
    ).model
    assert recovered is not None
    assert all(torch.equal(tensor, expected[0][key]) for key, tensor in recovered.state_dict().items())


class WritesItsWidth(nn.Module):
    """An MLP that runs only at the width that is written into its forward, or only beside a mask."""

    def __init__(self, *, mask: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.mask = nn.Linear(16, 24), nn.Linear(24, 16), mask

    def forward(self, tokens: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        if self.mask and not masks:
            raise TypeError("the mask is missing")
        return self.fc2(self.fc1(tokens).relu().view(*tokens.shape[:-1], 24))


def test_a_probe_that_fails_is_not_an_absent_mlp(caplog):
    with pytest.raises(SiteNotFoundError, match=r"1 left open: 0: .* with half of its hidden units \(RuntimeError"):
        find_mlps(nn.Sequential(WritesItsWidth(mask=False)))
    with pytest.raises(SiteNotFoundError, match=r"can't be run on noise \(TypeError: the mask is missing\)"):
        find_mlps(nn.Sequential(WritesItsWidth(mask=True)))
    good = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    assert [site.path for site in find_mlps(nn.Sequential(good, WritesItsWidth(mask=True)))] == ["0"]
    assert "1: looks like an MLP and can't be run on noise" in caplog.text
    lookalike = nn.Sequential(nn.Linear(16, 24), nn.Softmax(-1), nn.Linear(24, 16))  # its units depend on each other
    with pytest.raises(SiteNotFoundError, match="no MLP found"):
        find_mlps(nn.Sequential(lookalike))
    with torch.no_grad():
        good[2].bias[1] = torch.nan
    with pytest.raises(SiteNotFoundError, match=r"0.2.bias: holds NaN or infinite values \(1 of 16\)"):
        find_mlps(nn.Sequential(good))
    with torch.no_grad():
        good[2].bias[1] = 0
        good[0].weight[2] = good[2].weight[:, 2] = 1e30
    with pytest.raises(SiteNotFoundError, match=r"puts out NaN or infinite .* is in 0\.[02]\.weight \(1e\+30\)"):
        find_mlps(nn.Sequential(good))


@pytest.mark.parametrize("name", ("blocks.1.attn.qkv.weight", "pos_embed", "blocks.0.mlp.fc2.bias"))
def test_one_bad_weight_is_named_before_the_first_image(name, tmp_path):
    def images() -> Iterator[torch.Tensor]:
        raise AssertionError("an image was read")
        yield

    model = tiny()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = torch.inf if "bias" in name else torch.nan
    timm.models.save_for_hf(model, tmp_path / "source", model_args=SIZE, safe_serialization=True)
    source = str(tmp_path / "source")
    for use in (
        lambda: vitrim.compress(model, data=images(), method="dgmr", quiet=True),
        lambda: vitrim.compress(source, method="magnitude", quiet=True),
        lambda: vitrim.prune_(model, "magnitude"),
        lambda: vitrim.evaluate(tiny(), model, images(), limit=4),
        lambda: vitrim.inspect(model),
        lambda: vitrim.prune_checkpoint(source, tmp_path / "out", method="magnitude", quiet=True),
        lambda: vitrim.prune_checkpoint(source, tmp_path / "out", data=images(), method="dgmr", quiet=True),
    ):
        with pytest.raises(VitrimError, match=rf"{name}:? holds NaN or infinite values \(1 of"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_buffer_may_hold_infinity_as_a_mask_or_the_end_of_a_range_and_no_nan():
    model = tiny()
    model.register_buffer("mask", torch.tensor([-torch.inf, torch.inf]))
    check_weights(model, "x")
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        model.mask = torch.tensor([0, torch.nan]).to(dtype)
        with pytest.raises(ModelError, match=r"x: mask holds NaN or infinite values \(1 of 2\)"):
            check_weights(model, "x")
