"""Every kind of MLP is found under its right names, and nothing that only looks like one."""

from collections import OrderedDict

import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from tests.support.models import CASES, Gated, Packed, Residual, Tower, c_fc, timm_vit
from vitrim.errors import SiteNotFoundError
from vitrim.models.sites import find_mlps

# Number of sites, kind, model width, hidden width, block, path below the block, gate, value, output, norm.
EXPECTED = {
    "timm-vit": (2, "plain", 32, 96, "blocks.1", "mlp", None, "fc1", "fc2", None),
    "timm-vit-scaled": (2, "plain", 32, 96, "blocks.1", "mlp", None, "fc1", "fc2", None),
    "timm-packed": (2, "packed_gated", 32, 85, "blocks.1", "mlp", None, "fc1", "fc2", None),
    "timm-split": (2, "split_gated", 32, 128, "blocks.1", "mlp", "fc1_g", "fc1_x", "fc2", None),
    "timm-split-norm": (2, "split_gated", 32, 85, "blocks.1", "mlp", "fc1_g", "fc1_x", "fc2", "norm"),
    "timm-eva-packed": (2, "packed_gated", 32, 85, "blocks.1", "mlp", None, "fc1", "fc2", None),
    "timm-post-norm": (2, "plain", 32, 64, "blocks.1", "mlp", None, "fc1", "fc2", None),
    "timm-parallel": (4, "plain", 32, 96, "blocks.1", "ffns.1.mlp", None, "fc1", "fc2", None),
    "timm-swin": (3, "plain", 32, 128, "layers.1.blocks.0", "mlp", None, "fc1", "fc2", None),
    "timm-swin-v2": (3, "plain", 32, 128, "layers.1.blocks.0", "mlp", None, "fc1", "fc2", None),
    "timm-hiera": (3, "plain", 32, 128, "blocks.2", "mlp", None, "fc1", "fc2", None),
    "timm-mixer": (4, "plain", 32, 128, "blocks.1", "mlp_channels", None, "fc1", "fc2", None),
    "torchvision": (2, "plain", 32, 48, "encoder.layers.encoder_layer_1", "mlp", None, "0", "3", None),
    "encoder": (2, "plain", 32, 48, "layers.0.layers.1", "", None, "linear1", "linear2", None),
    "encoder-pre-norm": (2, "plain", 32, 48, "layers.1", "", None, "linear1", "linear2", None),
    "hf-vit": (2, "plain", 32, 48, "layers.1", "mlp", None, "fc1", "fc2", None),
    "hf-dinov2": (2, "split_gated", 32, 88, "encoder.layer.1", "mlp", "gate_proj", "up_proj", "down_proj", None),
    "hf-clip": (2, "plain", 32, 48, "encoder.layers.1", "mlp", None, "fc1", "fc2", None),
    "hf-bert": (2, "plain", 32, 48, "encoder.layer.1", "", None, "intermediate.dense", "output.dense", None),
    "hf-llama": (2, "split_gated", 32, 48, "layers.1", "mlp", "gate_proj", "up_proj", "down_proj", None),
    "c_fc": (2, "plain", 16, 24, "layers.1", "mlp", None, "c_fc", "c_proj", None),
    "w12": (2, "packed_gated", 16, 24, "layers.1", "mlp", None, "w12", "w3", None),
    "eva-order": (2, "split_gated", 16, 24, "layers.1", "mlp", "w1", "w2", "w3", None),
    "llama-order": (2, "split_gated", 16, 24, "layers.1", "mlp", "w1", "w3", "w2", None),
}


def check(sites, expected):
    count, kind, d_model, d_hidden, block, below, *names = expected
    site = sites[-1]
    path = f"{block}.{below}" if below else block
    assert len(sites) == count
    assert (site.kind, site.d_model, site.d_hidden) == (kind, d_model, d_hidden)
    assert (site.block, site.path) == (block, path)
    full = [name and f"{path}.{name}" for name in names]
    assert [site.gate, site.value, site.output, site.norm] == full


@pytest.mark.parametrize("name", CASES)
def test_each_kind_is_found_under_its_names(build, name):
    case = build(name)
    check(case.sites, EXPECTED[name])
    assert len({site.output for site in case.sites}) == len(case.sites)
    for site in case.sites:
        bias = getattr(case.model.get_submodule(site.value), "bias", None)
        assert site.has_bias == (bias is not None)


@pytest.mark.parametrize("name", ["timm-vit", "timm-packed", "timm-split-norm", "llama-order", "hf-dinov2"])
def test_parameters_on_the_meta_device_give_the_same_sites(build, name):
    case = build(name)
    assert find_mlps(case.copy().to("meta")) == case.sites


def test_the_model_itself_may_be_the_mlp():
    mlp = Gated(("w1", "w2", "w3"), 8, 12)
    (site,) = find_mlps(mlp)
    assert (site.path, site.gate, site.value, site.output) == ("", "w1", "w2", "w3")
    (site,) = find_mlps(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)))
    assert (site.path, site.value, site.output) == ("", "0", "2")


@pytest.mark.parametrize(("names", "output"), [(("w1", "w2", "w3"), "w3"), (("w1", "w3", "w2"), "w2")])
def test_a_square_gated_mlp_is_told_apart_by_running_it(names, output):
    (site,) = find_mlps(Gated(names, 12, 12))
    assert site.output == output and site.gate == "w1"


class Dotted(nn.Module):
    """A linear layer within a module of its own, as in Gemma 4's towers."""

    def __init__(self, *widths, bias):
        super().__init__()
        self.linear = nn.Linear(*widths, bias=bias)

    def forward(self, tokens):
        return self.linear(tokens)


@pytest.mark.parametrize("names", [("w0", "w1", "w2"), ("wi_0", "wi_1", "wo")])  # ViTamin; T5's kin
def test_more_names_of_gated_mlps(names):
    (site,) = find_mlps(Tower(Residual(Gated(names, 16, 24), 16)))
    assert (site.kind, site.gate, site.value, site.output) == (
        "split_gated",
        *(f"layers.0.mlp.{name}" for name in names),
    )


def test_a_gated_mlp_of_wrapped_layers_is_found():
    mlp = Gated(("gate_proj", "up_proj", "down_proj"), 16, 24)
    mlp.gate_proj, mlp.up_proj = Dotted(16, 24, bias=False), Dotted(16, 24, bias=False)
    mlp.down_proj = Dotted(24, 16, bias=False)
    (site,) = find_mlps(Tower(Residual(mlp, 16)))
    assert (site.path, site.output) == ("layers.0.mlp", "layers.0.mlp.down_proj.linear")


# PVT, Qwen3-VL, SAM 2, T5, GPT-NeoX
PLAIN = ("dense1 dense2", "linear_fc1 linear_fc2", "proj_in proj_out", "wi wo", "dense_h_to_4h dense_4h_to_h")


@pytest.mark.parametrize("names", PLAIN)
def test_more_names_of_plain_mlps(names):
    mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    first, last = names.split()
    mlp = nn.Sequential(OrderedDict({first: mlp[0], "act": mlp[1], last: mlp[2]}))
    (site,) = find_mlps(Tower(Residual(mlp, 16)))
    assert (site.kind, site.value, site.output) == ("plain", f"layers.0.mlp.{first}", f"layers.0.mlp.{last}")


def test_a_second_part_that_leaves_the_residual_to_its_block_is_run_on_hidden_units_alone():
    swin = transformers.MaskFormerSwinModel(
        transformers.MaskFormerSwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    assert len(find_mlps(swin)) == 2


def test_hidden_width_below_the_model_width_is_found():
    (site,) = find_mlps(Tower(Residual(Packed(16, 4), 16)))
    assert (site.kind, site.d_hidden) == ("packed_gated", 4)


class Plain(nn.Module):
    """An honest MLP, from which the ones that can't be cut derive."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def hidden(self, tokens):
        return nn.functional.gelu(self.fc1(tokens))

    def forward(self, tokens):
        return self.fc2(self.hidden(tokens))


class Written(Plain):
    def forward(self, tokens):
        return self.fc2(self.hidden(tokens).reshape(-1, 24).reshape(*tokens.shape[:-1], 24))


class Elsewhere(Plain):
    def forward(self, tokens):
        hidden = self.hidden(tokens)
        return self.fc2(hidden) + hidden.mean(-1, keepdim=True)


class Softmaxed(Plain):
    def forward(self, tokens):
        return self.fc2(self.hidden(tokens).softmax(-1))


class Convolved(Plain):
    """As in PVT v2: a depthwise convolution between, and a forward that wants to know the grid."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(24, 24, 1, groups=24)

    def forward(self, tokens, grid):
        return self.fc2(self.mix(self.hidden(tokens).transpose(1, 2)).transpose(1, 2))


class Counting(Plain):
    def forward(self, tokens):
        assert tokens.shape[1] == 16, "trained for 16 tokens"
        return self.fc2(self.hidden(tokens))


def test_the_honest_mlp_is_found():
    (site,) = find_mlps(Tower(Residual(Plain(), 16)))
    assert site.path == "layers.0.mlp"


@pytest.mark.parametrize("unsafe", [Written, Elsewhere, Softmaxed, Convolved, Counting])
def test_an_mlp_that_needs_its_hidden_units_elsewhere_is_not_reported(unsafe):
    model = Tower(Residual(unsafe(), 16), Residual(Plain(), 16))
    assert [site.path for site in find_mlps(model)] == ["layers.1.mlp"]


@pytest.mark.parametrize("order", [(nn.GELU(), nn.Softmax(-1)), (nn.Softmax(-1), nn.GELU())])
def test_containers_of_one_class_with_other_activations_are_confirmed_apart(order):
    mlps = [nn.Sequential(nn.Linear(16, 24), activation, nn.Linear(24, 16)) for activation in order]
    found = [site.path for site in find_mlps(Tower(*(Residual(mlp, 16) for mlp in mlps)))]
    assert found == [f"layers.{[isinstance(a, nn.GELU) for a in order].index(True)}.mlp"]


@pytest.mark.parametrize("between", [[nn.LayerNorm(24)], [nn.Linear(24, 24)], [nn.PReLU(24)]])
def test_a_numbered_container_with_parameters_between_is_not_reported(between):
    mlp = nn.Sequential(nn.Linear(16, 24), *between, nn.Linear(24, 16))
    with pytest.raises(SiteNotFoundError):
        find_mlps(Tower(Residual(mlp, 16)))


def test_a_search_changes_neither_values_nor_modes(build):
    case = build("timm-split-norm")
    model = case.copy().train()
    model.blocks[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    assert find_mlps(model) == case.sites
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), case.model.parameters(), strict=True))


def test_bfloat16_models_are_confirmed_too(build):
    case = build("timm-packed")
    assert find_mlps(case.copy().bfloat16()) == case.sites


def test_scope_limits_the_search():
    model = nn.ModuleDict({"vision": Tower(Residual(c_fc(), 16)), "text": Tower(Residual(Packed(16, 24), 16))})
    assert [site.path for site in find_mlps(model)] == ["vision.layers.0.mlp", "text.layers.0.mlp"]
    assert [site.path for site in find_mlps(model, scope="text")] == ["text.layers.0.mlp"]
    (site,) = find_mlps(model, scope="vision.layers.0.mlp")
    assert (site.path, site.block) == ("vision.layers.0.mlp", "vision.layers.0")


def test_a_wrong_scope_says_what_there_is():
    with pytest.raises(SiteNotFoundError, match=r"scope 'visual': no such module.*patches, layers\.") as caught:
        find_mlps(Tower(Residual(c_fc(), 16)), scope="visual")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "scope"),
    [
        (Tower(nn.Linear(16, 16)), None),
        (Tower(Residual(c_fc(), 16)), "patches"),
        (timm_vit(block_fn=ParallelScalingBlock), None),  # its first matrix holds queries, keys and values too
    ],
)
def test_no_mlp_is_one_clear_line(model, scope):
    with pytest.raises(SiteNotFoundError, match=r"no MLP found in \w+ \(\d+ modules seen\)") as caught:
        find_mlps(model, scope=scope)
    assert "\n" not in str(caught.value)


def test_a_gated_mlp_that_mixes_tokens_does_not_stop_the_search():
    model = timm.create_model("gmlp_ti16_224", img_size=32, num_classes=0)
    with pytest.raises(SiteNotFoundError, match="with half of its hidden units"):
        find_mlps(model)
