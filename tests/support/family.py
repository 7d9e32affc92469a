"""What a row of the table of families is, and how tiny models of timm and transformers are built for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args, save_for_hf
from torch import Tensor, nn

from vitrim.models.load import load_model
from vitrim.models.origin import Origin

Built = tuple[nn.Module, Origin]
State = dict[str, Tensor]
PLAIN, PACKED, SPLIT, NORMED = "plain", "packed gated", "split gated", "split gated + norm"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table: 2 blocks, images of 32 x 32 in 16 patches, unless it says otherwise.

    `sites` counts the MLPs by path, with `*` for a number. `features` is what the encoder hands out: numbers of patch
    tokens, width of a patch token and width of the pooled vector. `pre_norm` says that there is a final norm, and
    `among_patches` how many tokens of other kinds lie among the patches in front of it.
    """

    source: str
    name: str
    build: Callable[[Path], Built]
    kind: str = PLAIN
    sites: tuple[tuple[str, int], ...] = (("blocks.*.mlp", 2),)
    features: tuple[int, int, int] = (16, 32, 32)
    size: int = 32
    pre_norm: bool = True
    among_patches: int = 0
    stock: bool = True
    text: bool = False

    @property
    def inputs(self) -> Tensor:
        """Two images of noise, or two rows of token ids."""
        generator = torch.Generator().manual_seed(0)
        if self.text:
            return torch.randint(20, (2, 16), generator=generator)
        return torch.randn(2, 3, self.size, self.size, generator=generator)

    def __str__(self) -> str:
        return f"{self.source}: {self.name}"


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """A fresh model with every parameter moved, so that no layer scale or gate hides what an MLP does."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
POOLED = (("blocks.*.mlp", 2), ("attn_pool.mlp", 1))
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {**HF, "image_size": 32, "patch_size": 8}
HF_VIT = {**IMAGE, "intermediate_size": 128}


def from_timm(name: str, kwargs: dict[str, Any], folder: Path) -> Built:
    """A model in timm's own folder, read back from there."""
    model = randomised(lambda: timm.create_model(name, **kwargs))
    save_for_hf(model, str(folder), model_args=get_model_args(model), safe_serialization=True)
    return load_model(str(folder))


def timm_family(name: str, architecture: str, kwargs: dict[str, Any] | None = None, **expected: Any) -> Family:
    arguments = {**VIT, **(kwargs or {})} if kwargs is None or "img_size" not in kwargs else kwargs
    return Family(source="timm", name=name, build=partial(from_timm, architecture, arguments), **expected)


def from_transformers(name: str, kwargs: dict[str, Any], folder: Path) -> Built:
    """A model in transformers' own folder, read back from there."""
    import transformers

    model_class = getattr(transformers, name)
    model = randomised(lambda: model_class(model_class.config_class(**kwargs)))
    model.save_pretrained(folder)
    return load_model(str(folder))


def hf_family(name: str, class_name: str, kwargs: dict[str, Any], layers: str = "layers", **expected: Any) -> Family:
    expected = {"sites": ((f"{layers}.*.mlp", 2),), **expected}
    build = partial(from_transformers, class_name, kwargs)
    return Family(source="transformers", name=f"{name}: `{class_name}`", build=build, **expected)
