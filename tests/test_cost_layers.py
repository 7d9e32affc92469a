"""What each layer of vitrim's own costs, beside formulas written by hand: products that run, bytes that are stored."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitrim.cost.count import count_macs, model_size
from vitrim.layers.adapters import Lora, OpLora, Place, attach_adapter_
from vitrim.layers.attention import SlimAttention
from vitrim.layers.fips import SharedBasisLinear, pack
from vitrim.layers.int8 import Int8Linear, rounded
from vitrim.layers.low_rank import LowRankConv, LowRankLinear
from vitrim.layers.moefication import ExpertMlp
from vitrim.layers.top_k import TopKLinear

T, D, H, R = 6, 24, 40, 5  # tokens, inputs, outputs, rank
F32 = 4


def check(layer, *, macs, num_bytes, shape=(T, D), tmp_path=None):
    """Both counts, for one "image" and for three at once; the bytes also against a file."""
    for batch in (1, 3):
        assert count_macs(layer, torch.randn(batch, *shape)) == macs
    assert model_size(layer)["num_bytes"] == num_bytes
    if tmp_path is not None:
        stored = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in layer.state_dict().items()
        }
        save_file(stored, tmp_path / "layer.safetensors")
        file = (tmp_path / "layer.safetensors").read_bytes()
        assert len(file) - 8 - int.from_bytes(file[:8], "little") == num_bytes


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_top_k_costs_the_columns_that_it_picks(gather, bias, tmp_path):
    layer = TopKLinear.of(nn.Linear(D, H, bias=bias), 7, by="magnitude")
    layer = layer.gather_() if gather else layer
    read = 7 if gather else D  # without gathering it multiplies zeros, too
    check(layer, macs=T * read * H, num_bytes=F32 * (D * H + bias * H), tmp_path=tmp_path)


def test_a_sum_of_rows_without_weights_is_no_product():
    class Sums(nn.EmbeddingBag):
        def forward(self, tokens):
            return super().forward(tokens.long())

    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = Sums(9, 4, mode="sum")

        def forward(self, images):
            return self.bag(images.abs().clamp(0, 8))

    assert count_macs(Numbers(), torch.randn(2, 6)) == 0


@pytest.mark.parametrize("role", ["input", "output"])
@pytest.mark.parametrize("tokens", [2, 400])
def test_fips_costs_the_cheaper_order_and_stores_its_mask(role, tokens, tmp_path):
    rows, columns = (D, H) if role == "input" else (H, D)
    layer = SharedBasisLinear(D, H, R, role=role, num_values=70)
    mask = torch.zeros(R, columns, dtype=torch.bool).flatten()
    mask[torch.randperm(R * columns)[:70]] = True
    layer.places.copy_(pack(mask))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    macs = min(tokens * R * (rows + columns), rows * columns * (R + tokens))
    assert count_macs(layer, torch.randn(1, tokens, D)) == macs
    stored = F32 * (rows * R + 70 + H) + -(-R * columns // 8)  # basis, values, bias, and one bit a place
    check(layer, macs=T * R * (rows + columns), num_bytes=stored, tmp_path=tmp_path)


def test_fips_stores_a_shared_basis_once():
    owner = SharedBasisLinear(D, H, R, role="input", num_values=70, bias=False)
    user = SharedBasisLinear(D, H, R, role="input", num_values=70, bias=False, owner=owner)
    assert model_size(nn.ModuleList([owner, user]))["num_bytes"] == F32 * (D * R + 2 * 70) + 2 * (R * H // 8)


def test_low_rank_layers_cost_both_factors(tmp_path):
    check(LowRankLinear(D, H, R), macs=T * R * (D + H), num_bytes=F32 * (R * (D + H) + H), tmp_path=tmp_path)
    conv = LowRankConv(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), 2)
    out = 4 * 4  # of 8 x 8 pixels, every second
    down, up = out * 2 * 2 * 2 * 9, out * 6 * 2  # groups, rank, inputs of a group, kernel; outputs, rank
    check(conv, macs=down + up, num_bytes=F32 * (4 * 2 * 9 + 6 * 2 + 6), shape=(4, 8, 8), tmp_path=tmp_path)


@pytest.mark.parametrize("activations", [False, True])
def test_int8_layers_cost_a_product_and_a_byte_a_weight(activations, tmp_path):
    pytest.importorskip("torchao")
    layer = Int8Linear(D, H, activations=activations)
    layer.weight.data, layer.scale.data = rounded(torch.randn(H, D))
    nn.init.zeros_(layer.bias)
    check(layer, macs=T * D * H, num_bytes=D * H + F32 * (H + H), tmp_path=tmp_path)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, tokens):
        return self.fc2(self.fc1(tokens).relu())


@pytest.mark.parametrize("router_kind", ["mlp", "similarity"])
def test_experts_cost_the_router_and_those_that_run(router_kind, tmp_path):
    sizes = {"d_model": D, "d_hidden": H, "num_experts": 8, "num_active": 3}
    layer = ExpertMlp(Mlp(), value="fc1", gate=None, output="fc2", packed=False, kind=router_kind, **sizes)
    router = D * 8 + (8 * 8 if router_kind == "mlp" else 0)
    experts = 3 * 2 * D * (H // 8)
    stored = F32 * (2 * D * H + H + D + router)
    check(layer, macs=T * (router + experts), num_bytes=stored, tmp_path=tmp_path)


@pytest.mark.parametrize("score", ["sum", "norm"])
def test_an_oracle_costs_the_dense_products(score, tmp_path):
    sizes = {"d_model": D, "d_hidden": H, "num_experts": 8, "num_active": 3, "score": score}
    layer = ExpertMlp(Mlp(), value="fc1", gate=None, output="fc2", packed=False, kind="oracle", **sizes)
    check(layer, macs=T * 2 * D * H, num_bytes=F32 * (2 * D * H + H + D), tmp_path=tmp_path)


def test_slim_attention_costs_its_own_widths(tmp_path):
    heads, qk, v = 3, 2, 5
    layer = SlimAttention(
        D, num_heads=heads, num_qk=qk, num_v=v, scale=1.0, qkv_bias=False, proj_bias=True, as_tuple=False
    )
    projections = T * D * heads * (2 * qk + 2 * v)
    check(
        layer,
        macs=projections + heads * T * T * (qk + v),
        num_bytes=F32 * (D * heads * (2 * qk + 2 * v) + D),
        tmp_path=tmp_path,
    )


@pytest.mark.parametrize("adapted_by", ["lora", "op-lora"])
def test_adapters_cost_the_product_of_their_factors_once_a_pass(adapted_by):
    layer, generator = nn.Linear(D, H, bias=False), torch.Generator().manual_seed(0)
    hidden, latent = 4, 3
    if adapted_by == "lora":
        adapter = Lora(layer.weight, rank=R, alpha=1.0, generator=generator)
        values, making = R * (D + H), 0
    else:
        adapter = OpLora(layer.weight, rank=R, alpha=1.0, hidden=hidden, latent=latent, generator=generator)
        values = R * (D + H) * (hidden + 1) + hidden * latent + hidden + latent
        making = hidden * latent + R * (D + H) * hidden
    attach_adapter_(Place("", layer, "weight"), adapter)
    assert count_macs(layer, torch.randn(1, T, D)) == T * D * H + R * D * H + making
    assert model_size(layer) == {"num_parameters": D * H + values, "num_bytes": F32 * (D * H + values)}


def test_bytes_are_those_of_files_each_in_its_own_type(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
            self.register_buffer("index", torch.arange(7))
            self.register_buffer("made_again", torch.zeros(100), persistent=False)
            self.view = nn.Parameter(torch.zeros(1000)[:3])

        def forward(self, images):
            return images

    check(Odd(), macs=0, num_bytes=5 * 2 + 7 * 8 + 3 * 4, tmp_path=tmp_path)
