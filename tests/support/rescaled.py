"""A timm ViT written in other ways that compute the same: rescaled, permuted, with its layer scale folded or not.

A result that differs between two of them depends on how somebody's weights happen to be scaled. All factors are powers
of two, so that float32 loses nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import timm
import torch
from timm.layers.layer_scale import LayerScale
from torch import Tensor, nn

FACTORS = (1 / 64, 1 / 8, 8.0, 64.0)
KINDS = ("gelu", "layer-scale", "swiglu")

Rescale = Callable[[nn.Module], nn.Module]


def tiny_vit(kind: str, *, depth: int = 3) -> nn.Module:
    """Return a small ViT with random values everywhere, also in norms, biases and layer scales."""
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": depth, "num_heads": 2, "num_classes": 0}
    name, own = {
        "gelu": ("vit_tiny_patch16_224", {"mlp_ratio": 3}),
        "layer-scale": ("vit_tiny_patch16_224", {"mlp_ratio": 3, "init_values": 1.0, "reg_tokens": 2}),
        "swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 3, "init_values": 1.0}),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **size, **own).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * (0.3 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1))
            for scale in (m for m in model.modules() if isinstance(m, LayerScale)):
                scale.gamma.copy_(torch.exp2(torch.randint(-6, 1, scale.gamma.shape).float()))
    return model


def images(num_images: int, seed: int) -> list[torch.Tensor]:
    """Correlated images in batches of 16."""
    mix = torch.randn(24, 3 * 16 * 16, generator=torch.Generator().manual_seed(0)) / 24**0.5
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(num_images, 24, generator=generator) @ mix, torch.randn(num_images, 768, generator=generator)
    return list((parts[0] + 0.2 * parts[1]).view(-1, 3, 16, 16).split(16))


def rescalings(model: nn.Module, factors: tuple[float, ...] = FACTORS) -> dict[str, Rescale]:
    """Return all ways to write a model anew that it has the parts for, by name."""
    block = model.blocks[0]
    ways: dict[str, Callable[[nn.Module, float], nn.Module]] = {"norms": norms, "stream": stream}
    if _is_packed(block.mlp):
        ways |= {"values": values, "single values": single_values}
    found = {f"{name} x {factor:g}": _given(way, factor) for name, way in ways.items() for factor in factors}
    found["permuted"] = permuted
    if isinstance(block.ls2, LayerScale):
        found["layer scale folded"] = folded
    return found


def _given(way: Callable[[nn.Module, float], nn.Module], factor: float) -> Rescale:
    return lambda model: way(model, factor)


@torch.no_grad()
def norms(model: nn.Module, factor: float) -> nn.Module:
    """Gain and bias of each norm in a block times a factor, the weights that read it divided by it."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            layer.weight.div_(factor)
    return model


@torch.no_grad()
def stream(model: nn.Module, factor: float) -> nn.Module:
    """The whole residual stream times a factor: tokens, positions and whatever is added; each norm's eps goes along."""
    model = copy.deepcopy(model)
    into = [model.patch_embed.proj, *(layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2))]
    own = (getattr(model, name, None) for name in ("cls_token", "reg_token", "pos_embed"))
    for p in (*(p for layer in into for p in (layer.weight, layer.bias)), *own):
        if p is not None:
            p.mul_(factor)
    for norm in (*(norm for block in model.blocks for norm in (block.norm1, block.norm2)), model.norm):
        norm.eps *= factor**2
    return model


def values(model: nn.Module, factor: float) -> nn.Module:
    """Value rows of gated MLPs times a factor, output columns divided by it."""
    return _values(model, lambda num_units: torch.full((num_units,), factor))


def single_values(model: nn.Module, factor: float) -> nn.Module:
    """The same with a factor for every second unit alone."""
    return _values(model, lambda num_units: torch.where(torch.arange(num_units) % 2 == 0, factor, 1.0))


@torch.no_grad()
def _values(model: nn.Module, factors_of: Callable[[int], Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for mlp in (block.mlp for block in model.blocks):
        factor_H = factors_of(mlp.fc2.in_features)
        both = torch.cat([torch.ones_like(factor_H), factor_H])  # the gate's rows come first
        mlp.fc1.weight.mul_(both[:, None])
        mlp.fc1.bias.mul_(both)
        mlp.fc2.weight.div_(factor_H)
    return model


@torch.no_grad()
def permuted(model: nn.Module) -> nn.Module:
    """Hidden units of every MLP in another order, that of `order_of`."""
    model = copy.deepcopy(model)
    for number, mlp in enumerate(block.mlp for block in model.blocks):
        order = order_of(number, mlp.fc2.in_features)
        rows = torch.cat([order, order + len(order)]) if _is_packed(mlp) else order
        mlp.fc1.weight.copy_(mlp.fc1.weight[rows])
        mlp.fc1.bias.copy_(mlp.fc1.bias[rows])
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
    return model


def order_of(number: int, num_units: int) -> Tensor:
    """Return the unit of the original at each place of MLP `number` of a permuted model."""
    return torch.randperm(num_units, generator=torch.Generator().manual_seed(number))


def original_units(name: str, keeps: Mapping[int, tuple[int, ...]], num_units: int) -> dict[int, list[int]]:
    """Return kept units by MLP number, in the original's numbers, for a model rescaled in the way of that name."""
    return {
        number: [int(order_of(number, num_units)[unit]) for unit in keep] if name == "permuted" else list(keep)
        for number, keep in keeps.items()
    }


@torch.no_grad()
def folded(model: nn.Module) -> nn.Module:
    """Each layer scale multiplied into the projection in front of it, and one in its place."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for layer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
            layer.weight.mul_(scale.gamma[:, None])
            layer.bias.mul_(scale.gamma)
            scale.gamma.fill_(1.0)
    return model


@torch.no_grad()
def with_layer_scale(model: nn.Module, decades: float = 2.0) -> nn.Module:
    """Give a ViT without layer scale one that changes nothing: powers of two over so many decades, taken out again."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for block in model.blocks:
        for name, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            scale = LayerScale(layer.out_features)
            share = torch.rand(layer.out_features, generator=generator)
            scale.gamma.copy_(torch.exp2((-decades * share / 0.30103).round()))
            layer.weight.div_(scale.gamma[:, None])
            layer.bias.div_(scale.gamma)
            setattr(block, name, scale)
    return model


def _is_packed(mlp: nn.Module) -> bool:
    return mlp.fc1.out_features == 2 * mlp.fc2.in_features
