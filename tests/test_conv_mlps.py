"""MLPs made of convolutions of 1 x 1: whatever is done to one is what is done to the same MLP of linear layers."""

import copy

import pytest
import torch
from torch import nn

import vitrim
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import RecipeError, SiteNotFoundError
from vitrim.methods.registry import METHODS
from vitrim.models.sites import find_mlps

IMAGES = list(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


class Block(nn.Module):
    """A layer across channels, then an MLP with a layer scale, on maps (channels first) or on tokens."""

    def __init__(self, layer, width, hidden):
        super().__init__()
        self.mix, self.mlp, self.on_maps = layer(width, width), Mlp(layer, width, hidden), layer is pointwise
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, tokens):
        tokens = tokens + self.mix(tokens)
        scale = self.scale[:, None, None] if self.on_maps else self.scale
        return tokens + scale * self.mlp(tokens)


class Mlp(nn.Module):
    def __init__(self, layer, width, hidden):
        super().__init__()
        self.into, self.act, self.out = layer(width, hidden), nn.GELU(), layer(hidden, width)

    def forward(self, tokens):
        return self.out(self.act(self.into(tokens)))


class Tower(nn.Module):
    """Two blocks on patches, then a norm and the mean."""

    def __init__(self, layer, width=16, hidden=24):
        super().__init__()
        self.on_maps = layer is pointwise
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.layers = nn.ModuleList(Block(layer, width, hidden) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, images):
        tokens = self.patches(images)
        tokens = tokens if self.on_maps else tokens.flatten(2).mT
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm((tokens.flatten(2).mT if self.on_maps else tokens).mean(1))


def pointwise(num_in, num_out):
    return nn.Conv2d(num_in, num_out, 1)


def twins():
    """The same model on maps and on tokens."""
    torch.manual_seed(0)
    maps, tokens = Tower(pointwise).eval(), Tower(nn.Linear).eval()
    state = {
        name: tensor.flatten(1) if "layers" in name and tensor.ndim == 4 else tensor
        for name, tensor in maps.state_dict().items()
    }
    tokens.load_state_dict(state)
    return maps, tokens


FEW = {
    "fips": {"steps": 2},
    "lora-prune": {"steps": 3, "rank": 2},
    "amp": {"rounds": 2, "trials": 3},
    "moefication": {"router": "similarity"},
}


def run(model):
    with torch.inference_mode():
        return model(torch.stack(IMAGES))


def test_they_are_found_and_squeezes_are_not():
    maps, tokens = twins()
    assert find_mlps(maps) == find_mlps(tokens)
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))
    strided = nn.Sequential(nn.Conv2d(16, 24, 1, stride=2), nn.ReLU(), nn.Conv2d(24, 16, 1))
    depthwise = nn.Sequential(nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 16, 1))
    for odd in (squeeze, strided, depthwise):
        with pytest.raises(SiteNotFoundError, match="no MLP found"):
            find_mlps(nn.ModuleList([odd]))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("patch-slimming", "tome")])
def test_every_method_cuts_them_as_linear_layers(method):
    """Methods that replace linear layers refuse convolutions in one line, or leave them alone."""
    students = []
    for teacher in twins():
        student, repair = copy.deepcopy(teacher), {"refit": False} if METHODS[method].repairs else None
        budget = {} if METHODS[method].takes == "nothing" else {"keep_ratio": 0.6}
        recipe = Recipe.parse({"method": method, "options": FEW.get(method, {}), "repair": repair, **budget})
        try:
            cut_(student, teacher, find_mlps(teacher), recipe, torch.stack(IMAGES).split(8), quiet=True)
        except (SiteNotFoundError, RecipeError) as error:
            assert any(word in str(error) for word in ("convolution", "Conv2d", "linear layer")), error
            return
        students.append(student)
    if method not in ("lortsar", "int8"):  # they take layers that are linear in one of the two alone
        torch.testing.assert_close(run(students[0]), run(students[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_they_are_written_and_read(tmp_path, dtype):
    maps = twins()[0].to(dtype)
    few = {"refit_steps": 2}
    result = vitrim.compress(maps, data=IMAGES, keep_ratio=0.5, repair=few, out=tmp_path / "o", quiet=True)
    loaded = vitrim.load(tmp_path / "o", model=twins()[0])
    assert loaded.layers[0].mlp.into.out_channels == loaded.layers[0].mlp.out.in_channels == 12
    assert torch.equal(loaded(torch.stack(IMAGES).to(dtype)), result.model(torch.stack(IMAGES).to(dtype)))
    assert not any("refitted" in note or "feedback" in note for note in result.metrics.notes)
