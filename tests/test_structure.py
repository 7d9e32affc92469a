"""MLPs under any names are found by what feeds what, and nothing that is not one."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu

import vitrim
from tests.support.models import Residual, Tower
from vitrim.errors import SiteNotFoundError
from vitrim.models.sites import find_mlps

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
IMAGES = list(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


class Own(nn.Module):
    """Linear layers of made-up names, run by a function of its own."""

    def __init__(self, run, **layers):
        super().__init__()
        for name, sizes in layers.items():
            self.add_module(name, nn.Linear(*sizes) if isinstance(sizes, tuple) else sizes)
        self.run = run

    def forward(self, tokens):
        return self.run(self, tokens)


class Thin(nn.Module):
    """A wrapper around one linear layer, which clips."""

    def __init__(self, *sizes):
        super().__init__()
        self.inner = nn.Linear(*sizes)

    def forward(self, tokens):
        return self.inner(tokens.clamp(-9, 9)).clamp(-9, 9)


class Attention(nn.Module):
    """Square projections of which one feeds another, with heads that would take half of their channels."""

    def __init__(self, width=16):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens):
        q, k, v = (part(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.a, self.b, self.c))
        return self.d(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Grn(nn.Module):
    """Global response norm."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, 1, width)), nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, tokens):
        size = tokens.norm(dim=1, keepdim=True)
        return tokens + self.weight * tokens * size / size.mean(-1, keepdim=True) + self.bias


def halves(layer, tokens):
    first, second = layer(tokens).chunk(2, dim=-1)
    return first, second


# What runs, its layers, and what is to be found: kind, gate, value, output, norm.
MLPS = {
    "plain": (
        lambda m, t: m.shrink(gelu(m.expand(t))),
        {"shrink": (24, 16), "expand": (16, 24)},
        ("plain", None, "expand", "shrink", None),
    ),
    "relu, narrower": (
        lambda m, t: m.out(m.into(t).relu()),
        {"into": (16, 4), "out": (4, 16)},
        ("plain", None, "into", "out", None),
    ),
    "square": (
        lambda m, t: m.one(silu(m.two(t))),
        {"one": (16, 16), "two": (16, 16)},
        ("plain", None, "two", "one", None),
    ),
    "gated": (
        lambda m, t: m.c(m.b(t) * silu(m.a(t))),
        {"a": (16, 24), "b": (16, 24), "c": (24, 16)},
        ("split gated", "a", "b", "c", None),
    ),
    "gated, value first": (
        lambda m, t: m.c(m.a(t) * silu(m.b(t))),
        {"a": (16, 24), "b": (16, 24), "c": (24, 16)},
        ("split gated", "b", "a", "c", None),
    ),
    "packed": (
        lambda m, t: m.down(torch.mul(*halves(m.up, t)).tanh()),
        {"up": (16, 48), "down": (24, 16)},
        ("packed gated", None, "up", "down", None),
    ),
    "wrapped": (
        lambda m, t: m.b(gelu(m.a(t))),
        {"a": Thin(16, 24), "b": Thin(24, 16)},
        ("plain", None, "a.inner", "b.inner", None),
    ),
    "normed": (
        lambda m, t: m.b(m.between(gelu(m.a(t)))),
        {"a": (16, 24), "between": nn.LayerNorm(24), "b": (24, 16)},
        ("plain + norm", None, "a", "b", "between"),
    ),
    "response norm": (
        lambda m, t: m.b(m.between(gelu(m.a(t)))),
        {"a": (16, 24), "between": Grn(24), "b": (24, 16)},
        ("plain + norm", None, "a", "b", "between"),
    ),
    "a list": (
        lambda m, t: m.layers[1](m.layers[0](t).relu()),
        {"layers": nn.ModuleList([nn.Linear(16, 24), nn.Linear(24, 16)])},
        ("plain", None, "layers.0", "layers.1", None),
    ),
    "a map, channels first": (
        lambda m, t: m.b(gelu(m.a(m.mix(t).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2) + t,
        {"mix": nn.Conv2d(16, 16, 3, padding=1, groups=16), "a": (16, 24), "b": (24, 16)},
        ("plain", None, "a", "b", None),
    ),
}


@pytest.mark.parametrize("name", MLPS)
def test_an_mlp_is_found_under_any_names(name):
    run, layers, expected = MLPS[name]
    model = Tower(*(Residual(Own(run, **copy.deepcopy(layers)), 16) for _ in range(2)))
    for found in (find_mlps(model), find_mlps(copy.deepcopy(model).to("meta"))):
        assert [site.path for site in found] == ["layers.0.mlp", "layers.1.mlp"]
        site = found[1].within("layers.1.mlp")
        assert (site.label, site.gate, site.value, site.output, site.norm) == expected
        assert found[1].block == "layers.1" and found[1].d_model == 16


@pytest.mark.parametrize(
    "module",
    [
        Attention(),
        Own(lambda m, t: m.b(m.a(t)), a=(16, 4), b=(4, 16)),  # factors of one matrix
        Own(lambda m, t: m.b(0.5 * m.a(t)), a=(16, 4), b=(4, 16)),
        Own(lambda m, t: m.b(gelu(m.a(t)).softmax(1)), a=(16, 24), b=(24, 16)),  # over tokens
        Own(lambda m, t: m.b(gelu(m.a(t)).cumsum(-1)), a=(16, 24), b=(24, 16)),
        Own(lambda m, t: m.b(gelu(m.a(t)).flip(-1)), a=(16, 24), b=(24, 16)),
        Own(lambda m, t: m.b(torch.maximum(m.a(t), m.c(t))), a=(16, 24), b=(24, 16), c=(16, 24)),  # no product
        Own(lambda m, t: gelu(m.a(t)) @ m.b.weight.T, a=(16, 24), b=(24, 16)),  # its last layer is not called
        Own(lambda m, t: m.b(gelu(m.a(t))) + m.a(t).mean(), a=(16, 24), b=(24, 16)),
    ],
)
def test_what_is_no_mlp_is_not_found(module):
    with pytest.raises(SiteNotFoundError):
        find_mlps(Tower(Residual(module, 16)))


def test_what_can_not_be_run_on_noise_is_named():
    module = Own(lambda m, t: m.b(gelu(m.a(t["tokens"]))), a=(16, 24), b=(24, 16))
    with pytest.raises(
        SiteNotFoundError, match=r"1 of its parts with linear .* such as layers\.0\.mlp \(\w+: .*\)\.$"
    ) as caught:
        find_mlps(Tower(Residual(module, 16)))
    assert "\n" not in str(caught.value)


class Block(nn.Module):
    """Attention and linear layers, written by hand: the layers stand in the block itself."""

    def __init__(self, width=16):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.wide, self.back = nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, tokens):
        normed = self.n1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.back(self.wide(self.n2(tokens)).relu())


class Rearrange(nn.Module):
    """What a layer of einops does: another order of the same numbers."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, tokens):
        return self.function(tokens)


class Rearranging(nn.Module):
    """A ViT in the style of those that are written with einops: lists of attention and feed-forward, norms inside."""

    def __init__(self, width=16):
        super().__init__()
        patches = Rearrange(
            lambda x: x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        )
        self.embed = nn.Sequential(patches, nn.LayerNorm(192), nn.Linear(192, width))
        self.layers = nn.ModuleList(nn.ModuleList([Attention(width), self.feed(width)]) for _ in range(2))

    def feed(self, width):
        layers = (nn.Linear(width, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, width), nn.Dropout(0.1))
        return nn.Sequential(nn.LayerNorm(width), *layers)

    def forward(self, images):
        tokens = self.embed(images)
        for attention, feed in self.layers:
            tokens = attention(tokens) + tokens
            tokens = feed(tokens) + tokens
        return tokens


def build_convnext(name, config, **sizes):
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], **sizes}
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


WHOLE = {
    "by hand": (lambda: Tower(Block(), Block()), ["layers.0", "layers.1"]),
    "rearranging": (Rearranging, ["layers.0.1", "layers.1.1"]),
    "ConvNeXt V2": (
        lambda: build_convnext("ConvNextV2Model", "ConvNextV2Config", num_stages=2, patch_size=4),
        ["encoder.stages.0.layers.0", "encoder.stages.1.layers.0", "encoder.stages.1.layers.1"],
    ),
    "DINOv3 ConvNeXt": (
        lambda: build_convnext("DINOv3ConvNextModel", "DINOv3ConvNextConfig"),
        ["model.stages.0.layers.0", "model.stages.1.layers.0", "model.stages.1.layers.1"],
    ),
    "timm ConvNeXt": (  # of convolutions, as the next
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 24, 16), num_classes=5),
        [f"stages.{stage}.blocks.0.mlp" for stage in range(4)],
    ),
    "FastViT": (
        lambda: timm.create_model("fastvit_t8", layers=(1, 1), embed_dims=(16, 32), num_classes=5),
        ["stages.0.blocks.0.mlp", "stages.1.blocks.0.mlp"],
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_goes_through(tmp_path, name):
    build, paths = WHOLE[name]
    torch.manual_seed(0)
    model = build().eval()
    result = vitrim.compress(
        model, data=IMAGES, keep_ratio=0.5, repair={"refit_steps": 2}, out=tmp_path / "o", quiet=True
    )
    assert list(result.plan.widths) == paths
    loaded = vitrim.load(tmp_path / "o", model=build() if name in ("by hand", "rearranging") else None)
    with torch.inference_mode():
        outputs = [each.eval()(torch.stack(IMAGES[:2])) for each in (loaded, result.model)]
        first, second = (output if isinstance(output, torch.Tensor) else output[0] for output in outputs)
    assert torch.equal(first, second)
    assert result.metrics.after.parameters < result.metrics.before.parameters


def test_a_response_norm_is_folded_with_its_units():
    result = vitrim.compress(WHOLE["ConvNeXt V2"][0](), data=IMAGES, method="grail", keep_ratio=0.5, quiet=True)
    assert {site.label for site in find_mlps(result.model)} == {"plain + norm"}


def test_a_sequential_with_a_norm_in_front_is_refitted():
    result = vitrim.compress(Rearranging(), data=IMAGES, keep_ratio=0.5, repair={"refit_steps": 2}, quiet=True)
    assert not any("not refitted" in note for note in result.metrics.notes)


class Both(nn.Module):
    """An encoder, and a part behind it."""

    def __init__(self, name):
        super().__init__()
        self.encoder, self.name = Tower(Block(), Block()), name
        self.add_module(name, nn.ModuleList([Block()]))

    def forward(self, images):
        return getattr(self, self.name)[0](self.encoder(images)[:, None])


@pytest.mark.parametrize("name", ["decoder", "predictor", "merger", "mask_head", "enc_out_bbox_embed"])
def test_what_stands_behind_the_encoder_is_cut_if_asked(name):
    model = Both(name)
    assert [site.path for site in find_mlps(model)] == ["encoder.layers.0", "encoder.layers.1"]
    assert [site.path for site in find_mlps(model, scope=name)] == [f"{name}.0"]
    assert [site.path for site in find_mlps(nn.ModuleDict({name: Tower(Block())}))] == [f"{name}.layers.0"]


CONVOLUTIONAL = {
    **{name: partial(timm.create_model, name) for name in ("mobileone_s0", "resnet18")},
    "EdgeTAM": lambda: transformers.EdgeTamVisionModel(transformers.EdgeTamVisionConfig()),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_convolutional_model_is_called_so(name):
    with torch.device("meta"), pytest.raises(SiteNotFoundError, match=r"it is convolutional \(\d+% of its weights\)"):
        find_mlps(CONVOLUTIONAL[name]())
