"""Tiny models, one for each way in which libraries build an MLP, with random weights everywhere."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import timm
import torch
import torchvision
from timm.models.hiera import Hiera
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

from vitrim.models.sites import find_mlps
from vitrim.storage.hashes import tensor_sha256
from vitrim.types import MlpSite

SIZE = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HF_IMAGE = {**HF, "image_size": 32, "patch_size": 8}
HF_TEXT = {**HF, "intermediate_size": 48, "vocab_size": 20, "max_position_embeddings": 16}


def timm_vit(**kwargs) -> nn.Module:
    arguments = {**SIZE, "patch_size": 8, "mlp_ratio": 3, "num_classes": 5, **kwargs}
    return timm.create_model("vit_tiny_patch16_224", **arguments)


class Residual(nn.Module):
    """A block of one MLP, with a matrix of its own in front."""

    def __init__(self, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.mix, self.mlp = nn.Linear(width, width), mlp

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.mix(tokens)
        return tokens + self.mlp(tokens)


class Attending(nn.Module):
    """A block as people write it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


class Tower(nn.Module):
    """Patches through a list of modules, then the mean."""

    def __init__(self, *layers: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.layers = nn.ModuleList(layers)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens.mean(1)


class Gated(nn.Module):
    """A gated MLP with its three layers under given names, gate first."""

    def __init__(self, names: tuple[str, str, str], width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.names = names
        for name in names[:2]:
            self.add_module(name, nn.Linear(width, hidden, bias=bias))
        self.add_module(names[2], nn.Linear(hidden, width, bias=bias))

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value, output = (getattr(self, name) for name in self.names)
        return output(nn.functional.silu(gate(tokens)) * value(tokens))


class Packed(nn.Module):
    """DINOv2's own SwiGLU: gate and value in one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


def encoder_layers(*, norm_first: bool) -> list[nn.Module]:
    return [
        nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True, norm_first=norm_first) for _ in range(2)
    ]


def hf(name: str, **config) -> nn.Module:
    import transformers

    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))


def c_fc() -> nn.Module:
    layers = OrderedDict(c_fc=nn.Linear(16, 24), gelu=nn.GELU(), c_proj=nn.Linear(24, 16))
    return nn.Sequential(layers)


CASES: dict[str, Callable[[], nn.Module]] = {
    "timm-vit": timm_vit,
    "timm-vit-scaled": lambda: timm_vit(init_values=0.1),
    "timm-packed": lambda: timm.create_model("vit_giant_patch14_dinov2", patch_size=8, num_classes=0, **SIZE),
    "timm-split": lambda: timm.create_model("vit_huge_plus_patch16_dinov3", patch_size=8, num_classes=0, **SIZE),
    "timm-split-norm": lambda: timm.create_model("eva02_large_patch14_224", patch_size=8, num_classes=5, **SIZE),
    "timm-eva-packed": lambda: timm.create_model("eva02_tiny_patch14_224", patch_size=8, num_classes=5, **SIZE),
    "timm-post-norm": lambda: timm.create_model(
        "eva02_enormous_patch14_clip_224", patch_size=8, mlp_ratio=2, num_classes=5, **SIZE
    ),
    "timm-parallel": lambda: timm_vit(block_fn=ParallelThingsBlock, init_values=0.1),
    "timm-swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2)
    ),
    "timm-swin-v2": lambda: timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(4, 4)
    ),
    "timm-hiera": lambda: Hiera(
        img_size=(32, 32), embed_dim=16, num_heads=1, stages=(1, 2), q_pool=1, mask_unit_size=(4, 4), num_classes=5
    ),
    "timm-mixer": lambda: MlpMixer(img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=5),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=5),
    "encoder": lambda: Tower(
        nn.TransformerEncoder(encoder_layers(norm_first=False)[0], 2, enable_nested_tensor=False), width=32
    ),
    "encoder-pre-norm": lambda: Tower(*encoder_layers(norm_first=True), width=32),
    "hf-vit": lambda: hf("ViT", **HF_IMAGE, intermediate_size=48),
    "hf-dinov2": lambda: hf("Dinov2", **HF_IMAGE, mlp_ratio=4, use_swiglu_ffn=True),
    "hf-clip": lambda: hf("CLIPVision", **HF_IMAGE, intermediate_size=48),
    "hf-bert": lambda: hf("Bert", **HF_TEXT),
    "hf-llama": lambda: hf("Llama", **HF_TEXT),
    "c_fc": lambda: Tower(*(Residual(c_fc(), 16) for _ in range(2))),
    "w12": lambda: Tower(*(Residual(Packed(16, 24), 16) for _ in range(2))),
    "eva-order": lambda: Tower(*(Residual(Gated(("w1", "w2", "w3"), 16, 24), 16) for _ in range(2))),
    "llama-order": lambda: Tower(*(Residual(Gated(("w1", "w3", "w2"), 16, 24), 16) for _ in range(2))),
}
KINDS = ("timm-vit-scaled", "timm-packed", "timm-split", "timm-split-norm", "llama-order")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in eval mode, never to be changed, its MLPs, and what to feed it."""

    name: str
    model: nn.Module
    sites: tuple[MlpSite, ...]
    batches: list[Tensor]

    def copy(self) -> nn.Module:
        """A model of the same values, free to be cut."""
        return copy.deepcopy(self.model)

    def digest(self) -> str:
        """A digest of all that tests could leave changed: tensors, and whether modules train."""
        found = hashlib.sha256(str([module.training for module in self.model.modules()]).encode())
        for tensor in (*self.model.state_dict().values(), *self.batches):
            found.update(tensor_sha256(tensor).encode())
        return found.hexdigest()


@cache
def build_case(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CASES[name]().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        shape = (3, 7) if name in ("hf-bert", "hf-llama") else (3, 3, 32, 32)
        batches = [torch.randint(20, shape) if len(shape) == 2 else torch.randn(shape) for _ in range(4)]
    case = Case(name=name, model=model, sites=find_mlps(model), batches=batches)
    BUILT[name] = (case, case.digest())
    return case


# Every case that was built, with its digest then: all tests of a process see the same model.
BUILT: dict[str, tuple[Case, str]] = {}


def changed_cases() -> list[str]:
    """Return the names of cases whose model a test has changed."""
    return [name for name, (case, digest) in BUILT.items() if case.digest() != digest]
