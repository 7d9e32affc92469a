from __future__ import annotations

import time

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitrim.cost import count as cost
from vitrim.cost import latency
from vitrim.cost.latency import measure_latency
from vitrim.metrics.record import relative_latency

DIM, DEPTH, HEADS, HIDDEN, SIZE, PATCH, CLASSES = 64, 2, 2, 96, 32, 4, 10
TOKENS = (SIZE // PATCH) ** 2 + 1


@pytest.fixture(scope="module")
def vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / DIM,
        num_classes=CLASSES,
    )


def closed_form_macs() -> int:
    patch_embed = (TOKENS - 1) * 3 * PATCH**2 * DIM
    qkv = TOKENS * DIM * 3 * DIM
    attention = 2 * TOKENS * TOKENS * DIM
    proj = TOKENS * DIM * DIM
    mlp = 2 * TOKENS * DIM * HIDDEN
    return patch_embed + DEPTH * (qkv + attention + proj + mlp) + DIM * CLASSES


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_macs_equal_the_closed_form(vit, batch_size, fused):
    for block in vit.blocks:
        block.attn.fused_attn = fused
    assert cost.count_macs(vit, torch.randn(batch_size, 3, SIZE, SIZE)) == closed_form_macs()


def test_macs_of_attention_do_not_count_twice_where_torch_knows_the_operator(vit, monkeypatch):
    import torch.utils.flop_counter as torch_counter

    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = torch_counter.flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
    monkeypatch.setitem(torch_counter.flop_registry, packet, known)
    for block in vit.blocks:
        block.attn.fused_attn = True
    assert cost.count_macs(vit, torch.randn(2, 3, SIZE, SIZE)) == closed_form_macs()


def test_attention_formula_equals_torchs_own():
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4))
    query, key, value = (torch.randn(shape) for shape in shapes)
    with FlopCounterMode(display=False) as counter:
        (query @ key.transpose(-1, -2)).softmax(-1) @ value
    assert cost.attention_flops(*shapes) == counter.get_total_flops()


def test_macs_restore_training_mode(vit):
    vit.train()
    vit.blocks[0].eval()
    cost.count_macs(vit, torch.randn(1, 3, SIZE, SIZE))
    assert vit.training and vit.blocks[1].training and not vit.blocks[0].training


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=True)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))


def test_parameters_and_bytes_count_shared_tensors_once():
    assert cost.num_parameters(Tied()) == 16 + 4
    assert cost.model_size(Tied()) == {"num_parameters": 20, "num_bytes": 20 * 4 + 3 * 8}


class Chain(nn.Module):
    """Its peak is known: the input is held by the caller, x and the output of `wide` live together."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(16, 1024, bias=False)
        self.narrow = nn.Linear(1024, 8, bias=False)

    def forward(self, x):
        x = self.wide(x)
        x = x * 2  # while this runs, two wide tensors are alive
        return self.narrow(x)


def test_peak_memory_equals_a_count_by_hand():
    model, batch = Chain(), 32
    weights = 4 * (16 * 1024 + 1024 * 8)
    held_input, wide = 4 * batch * 16, 4 * batch * 1024
    measured = cost.peak_memory_mib(model, torch.randn(batch, 16))
    assert measured * 2**20 == weights + held_input + 2 * wide
    assert cost.peak_memory_mib(model, torch.randn(9 * batch, 16)[:batch]) == measured


def test_peak_memory_grows_with_the_batch_and_ignores_what_was_freed(vit):
    small = cost.peak_memory_mib(vit, torch.randn(2, 3, SIZE, SIZE))
    assert cost.peak_memory_mib(vit, torch.randn(2, 3, SIZE, SIZE)) == small
    assert cost.peak_memory_mib(vit, torch.randn(8, 3, SIZE, SIZE)) > small
    one_block = 4 * 2 * TOKENS * (2 * HIDDEN + 6 * DIM)  # all that a block makes, never freed
    weights = cost.model_size(vit)["num_bytes"]
    assert small * 2**20 < weights + 4 * 2 * (3 * SIZE**2 + 2 * TOKENS * DIM) + one_block


class Slow(nn.Module):
    """Sleeps for each image, as long as it is told for the turn."""

    def __init__(self, name, seconds, seen):
        super().__init__()
        self.name, self.seconds, self.seen = name, seconds, seen

    def forward(self, images):
        self.seen.append((self.name, len(images)))
        time.sleep(self.seconds[len(self.seen) % len(self.seconds)] * len(images))
        return images


def test_latency_is_taken_by_turns_and_is_a_ratio_with_quartiles():
    seen: list = []
    models = [Slow("original", [0.004], seen), Slow("cut", [0.002], seen)]
    options = {"batch_sizes": (1, 4), "rounds": 20, "min_seconds": 0.0}
    before, after = measure_latency(models, torch.zeros(1, 3, 4, 4), **options)
    warm = ["original", "original", "cut", "cut"]
    assert [name for name, size in seen if size == 4] == [*warm, *["original", "cut"] * 20]
    for size, row in after.items():
        assert row["rounds"] == 20 and "ratio" not in before[size]
        assert row["ratio"] == row["median_ms"] / before[size]["median_ms"]
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] * 1.1 and high >= row["ratio"] * 0.9
        assert before[size]["median_ms"] >= 4 * size and row["median_ms"] >= 2 * size
        assert row["images_per_s"] == pytest.approx(size / row["median_ms"] * 1e3)


def test_the_spread_of_latency_equals_that_of_ratios_by_hand():
    turns = [(1.0, 0.5), (2.0, 1.0), (1.0, 0.9), (1.0, 0.7), (4.0, 2.4)]
    before, after = latency._summed_up(turns, 8)
    ratios = sorted(after / before for before, after in turns)  # 0.5, 0.5, 0.6, 0.7, 0.9
    assert after["ratio"] == pytest.approx(0.9 / 1.0)  # of the medians
    assert after["ratio_quartiles"] == pytest.approx([ratios[1], ratios[3]])
    assert (before["median_ms"], before["iqr_ms"]) == (1000.0, 1000.0)


@pytest.mark.parametrize(
    ("quartiles", "said"),
    [
        ((0.49, 0.54), "0.52 (0.49 to 0.54)"),
        ((0.49, 0.56), "0.52 (noisy, 0.49 to 0.56)"),
        ((0.2, 0.9), "0.52 (noisy, 0.20 to 0.90)"),
    ],
)
def test_a_latency_of_wide_spread_is_no_number(quartiles, said):
    assert relative_latency({"ratio": 0.52, "ratio_quartiles": quartiles}) == said


def test_a_batch_whose_rounds_would_take_too_long_is_left_out_and_said(caplog):
    options = {"batch_sizes": (1, 9), "rounds": 3, "min_seconds": 0.0, "max_seconds": 0.03}
    with caplog.at_level("INFO", logger="vitrim"):
        (found,) = measure_latency([Slow("original", [0.002], [])], torch.zeros(1, 3, 4, 4), **options)
    assert list(found) == [1] and "latency at batch 9: not measured; 3 rounds would take 0 s" in caplog.text


def test_latency_leaves_mode_device_and_random_state_alone(vit):
    vit.train()
    state = torch.random.get_rng_state()
    measure_latency([vit], torch.zeros(1, 3, SIZE, SIZE), batch_sizes=(1,), min_seconds=0.01)
    assert vit.training and next(vit.parameters()).device.type == "cpu"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.requires_grad for name, parameter in vit.named_parameters() if "weight" in name)
