"""The model families that vitrim is held to: each as a tiny model of the library's own class, with random weights.

A family names only how a tiny model is built and what its MLPs should look like. What is measured on it stands in
`models_table.py`. Every model is written as its library writes one and read back by its source, but for those that
have no such form.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from tests.support.family import (
    HF,
    HF_VIT,
    IMAGE,
    NORMED,
    PACKED,
    POOLED,
    SPLIT,
    VIT,
    Built,
    Family,
    State,
    hf_family,
    randomised,
    timm_family,
)
from tests.support.models import Attending, Gated, Residual
from tests.support.recent_families import RECENT_TIMM, RECENT_TRANSFORMERS
from vitrim.models.load import load_model, origin_of
from vitrim.models.origin import Origin

# timm


def from_file(rename: Callable[[State], State], folder: Path) -> Built:
    """timm's smallest ViT as a bare state dict, read back by name and file."""
    state = randomised(lambda: timm.create_model("test_vit", num_classes=24)).state_dict()
    torch.save({"model": rename(state)}, folder / "weights.pth")
    return load_model(f"timm/test_vit@{folder / 'weights.pth'}")


def as_openai(state: State) -> State:
    """A ViT's tensors as OpenAI's CLIP calls and shapes them; its projection has no bias."""
    swaps = {
        "patch_embed.proj": "conv1",
        "blocks.": "transformer.resblocks.",
        "norm.": "ln_post.",
        "norm": "ln_",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    state = dict(state)
    del state["head.bias"]
    shaped = {
        "visual.class_embedding": state.pop("cls_token")[0, 0],
        "visual.positional_embedding": state.pop("pos_embed")[0],
        "visual.proj": state.pop("head.weight").T,
    }
    for name, tensor in state.items():
        for ours, theirs in swaps.items():
            name = name.replace(ours, theirs)
        shaped[f"visual.{name}"] = tensor
    return shaped


SMALL_STAGES = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
STAGES = {"sites": (("layers.*.blocks.*.mlp", 2),), "features": (16, 32, 32)}
HIERA = {"img_size": (32, 32), "embed_dim": 16, "num_heads": 1, "stages": (1, 1), "q_pool": 1, "num_classes": 5}


TIMM = (
    timm_family("ViT", "vit_base_patch16_224"),
    timm_family("DeiT", "deit_base_patch16_224"),
    timm_family("DeiT, distilled", "deit_base_distilled_patch16_224"),
    timm_family("DeiT-III", "deit3_base_patch16_224"),
    timm_family("DINOv2 S, B, L", "vit_base_patch14_dinov2"),
    timm_family("DINOv2 S, B, L with registers", "vit_base_patch14_reg4_dinov2"),
    timm_family("DINOv2-g", "vit_giant_patch14_dinov2", kind=PACKED),
    timm_family("DINOv2-g with registers", "vit_giant_patch14_reg4_dinov2", kind=PACKED),
    timm_family("DINOv3 S, B, L", "vit_base_patch16_dinov3"),
    timm_family("DINOv3 S+, H+", "vit_huge_plus_patch16_dinov3", kind=SPLIT),
    timm_family("DINOv3 ViT-7B", "vit_7b_patch16_dinov3", {"embed_dim": 48}, kind=SPLIT, features=(16, 48, 48)),
    timm_family("EVA-02 Ti, S", "eva02_tiny_patch14_224", kind=PACKED),
    timm_family("EVA-02 B, L", "eva02_base_patch14_224", kind=NORMED),
    timm_family("EVA-02-CLIP L", "eva02_large_patch14_clip_224", kind=NORMED),
    timm_family("EVA-g", "eva_giant_patch14_224"),
    timm_family("EVA-CLIP-g", "eva_giant_patch14_clip_224"),
    timm_family("EVA-CLIP-E (post-norm blocks)", "eva02_enormous_patch14_clip_224"),
    timm_family("OpenCLIP B, L, H", "vit_base_patch16_clip_224"),
    timm_family("OpenCLIP g", "vit_giant_patch14_clip_224"),
    timm_family("OpenCLIP bigG", "vit_gigantic_patch14_clip_224"),
    timm_family("CLIP with quick GELU", "vit_base_patch16_clip_quickgelu_224"),
    timm_family("SigLIP (attention pool)", "vit_base_patch16_siglip_224", sites=POOLED),
    timm_family("SigLIP so400m (attention pool)", "vit_so400m_patch14_siglip_224", sites=POOLED),
    timm_family("SigLIP 2 so400m (attention pool)", "vit_so400m_patch16_siglip_256", sites=POOLED),
    timm_family("SigLIP so400m, mean pool", "vit_so400m_patch14_siglip_gap_224"),
    timm_family("InternViT-300M", "vit_intern300m_patch14_448", pre_norm=False),
    timm_family("BEiT v2", "beitv2_base_patch16_224"),
    timm_family("AIMv2", "aimv2_large_patch14_224", kind=SPLIT),
    timm_family("Swin", "swin_tiny_patch4_window7_224", SMALL_STAGES, **STAGES),
    timm_family("Swin v2", "swinv2_tiny_window8_256", {**SMALL_STAGES, "num_heads": (4, 4)}, **STAGES),
    timm_family("Hiera", "hiera_tiny_224", HIERA, pre_norm=False),
)


# transformers


TEXT = {**HF, "intermediate_size": 64, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIGLIP = (("encoder.layers.*.mlp", 2), ("head.mlp", 1))
LLAMA = {**TEXT, "model_type": "llama", "num_key_value_heads": 4}


TRANSFORMERS = (
    hf_family("ViT", "ViTModel", HF_VIT),
    hf_family("DeiT", "DeiTModel", HF_VIT),
    hf_family("DINOv2 S, B, L", "Dinov2Model", {**IMAGE, "mlp_ratio": 4}, "encoder.layer"),
    hf_family(
        "DINOv2-g", "Dinov2Model", {**IMAGE, "mlp_ratio": 4, "use_swiglu_ffn": True}, "encoder.layer", kind=SPLIT
    ),
    hf_family("DINOv2 with registers", "Dinov2WithRegistersModel", {**IMAGE, "mlp_ratio": 4}, "encoder.layer"),
    hf_family("DINOv3 S, B, L", "DINOv3ViTModel", {**HF_VIT, "num_register_tokens": 2}, "model.layer"),
    hf_family(
        "DINOv3 S+, H+, 7B",
        "DINOv3ViTModel",
        {**HF_VIT, "num_register_tokens": 2, "use_gated_mlp": True},
        "model.layer",
        kind=SPLIT,
    ),
    hf_family("CLIP image tower", "CLIPVisionModel", HF_VIT, "encoder.layers"),
    hf_family("CLIP, both towers", "CLIPModel", {"vision_config": HF_VIT, "text_config": TEXT}, "encoder.layers"),
    hf_family("SigLIP image tower", "SiglipVisionModel", HF_VIT, sites=SIGLIP),
    hf_family("SigLIP, both towers", "SiglipModel", {"vision_config": HF_VIT, "text_config": TEXT}, sites=SIGLIP),
    hf_family("MetaCLIP 2 image tower", "MetaClip2VisionModel", HF_VIT, "encoder.layers"),
    hf_family("BEiT", "BeitModel", HF_VIT, pre_norm=False),
    hf_family(
        "Swin",
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        "encoder.layers.*.blocks",
    ),
    hf_family(
        "InternViT in InternVL 3 and 3.5",
        "InternVLVisionModel",
        {**HF_VIT, "image_size": [32, 32], "patch_size": [8, 8]},
        "encoder.layer",
        pre_norm=False,
    ),
    hf_family(
        "CLIP tower inside a VLM",
        "LlavaForConditionalGeneration",
        {"vision_config": {**HF_VIT, "model_type": "clip_vision_model"}, "text_config": LLAMA, "image_token_index": 50},
        "encoder.layers",
    ),
    hf_family(
        "BERT (text)",
        "BertModel",
        {**TEXT, "max_position_embeddings": 16},
        sites=(("encoder.layer.*", 2),),
        features=(15, 32, 32),
        pre_norm=False,
        text=True,
    ),
)


# open_clip


CLIP_TEXT = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
CLIP_IMAGE = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 4.0}


def from_open_clip(config: dict[str, Any], trunk: dict[str, Any] | None, folder: Path) -> Built:
    """A pair of towers in open_clip's own folder, read back from there; a timm tower's config stands in `trunk`."""
    import open_clip

    config = {"embed_dim": 24, "text_cfg": CLIP_TEXT, **config}
    if trunk is not None:
        config["vision_cfg"] = {**config["vision_cfg"], "timm_model_name": f"local-dir:{folder / 'trunk'}"}
        (folder / "trunk").mkdir()
        (folder / "trunk" / "config.json").write_text(json.dumps({**trunk, "pretrained_cfg": {}}))
    known = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(known))
    model = randomised(lambda: open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return load_model(str(folder))


def open_clip_family(name: str, config: dict[str, Any], **expected: Any) -> Family:
    return Family(source="open_clip", name=name, build=partial(from_open_clip, config, None), **expected)


def timm_tower_family(name: str, architecture: str, config: dict[str, Any], **expected: Any) -> Family:
    """A pair whose image tower is timm's."""
    small = {key: value for key, value in VIT.items() if key != "num_classes"}
    vision = {"image_size": 32, "timm_model_pretrained": False, **config.pop("vision_cfg")}
    config = {**config, "custom_text": True, "vision_cfg": vision}
    build = partial(from_open_clip, config, {"architecture": architecture, "model_args": small})
    return Family(source="open_clip", name=f"{name} (timm tower)", build=build, **expected)


OWN = {"sites": (("transformer.resblocks.*.mlp", 2),), "features": (16, 32, 24)}
OPEN_CLIP = (
    open_clip_family("ViT-B, L, H, g, bigG", {"vision_cfg": CLIP_IMAGE}, **OWN),
    open_clip_family("ViT with quick GELU", {"quick_gelu": True, "vision_cfg": CLIP_IMAGE}, **OWN),
    open_clip_family(
        "CoCa-like attention pool",
        {"vision_cfg": {**CLIP_IMAGE, "attentional_pool": True, "attn_pooler_heads": 4}},
        sites=OWN["sites"],
        features=(255, 24, 24),  # the pool's queries
    ),
    timm_tower_family(
        "EVA02-E",
        "eva02_enormous_patch14_clip_224",
        {"vision_cfg": {"timm_pool": "token", "timm_proj": None}},
        sites=(("trunk.blocks.*.mlp", 2),),
        features=(16, 32, 24),
    ),
    timm_tower_family(
        "EVA02-L",
        "eva02_large_patch14_clip_224",
        {"vision_cfg": {"timm_pool": "token", "timm_proj": None}},
        kind=NORMED,
        sites=(("trunk.blocks.*.mlp", 2),),
        features=(16, 32, 24),
    ),
    timm_tower_family(
        "SigLIP with attention pool",
        "vit_base_patch16_siglip_224",
        {"init_logit_bias": -10, "vision_cfg": {"timm_pool": "map", "timm_proj": "none"}},
        sites=(("trunk.blocks.*.mlp", 2), ("trunk.attn_pool.mlp", 1)),
    ),
)


# torch


def from_torchvision(name: str, model_class: type[nn.Module], kwargs: dict[str, Any], folder: Path) -> Built:
    """A model under a new name in torchvision's own registry, since those that it has are of a fixed size."""
    from torchvision.models import _api

    name = f"vitrim_tiny_{name}".lower().replace(" ", "_")
    if name not in torchvision.models.list_models():
        _api.register_model(name)(lambda **_: model_class(**kwargs))
    origin = Origin(name=name, library="torchvision", architecture=name)
    return randomised(lambda: torchvision.models.get_model(name)), origin


def from_module(build: Callable[[], nn.Module], folder: Path) -> Built:
    """A module that only its owner can build."""
    model = randomised(build)
    return model, origin_of(model)


class Patches(nn.Module):
    """Patch tokens through layers of torch's own, and nothing that a library would know."""

    def __init__(self, *layers: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)


def torch_layers() -> nn.Module:
    return Patches(*(nn.TransformerEncoderLayer(32, 2, 128, batch_first=True, norm_first=True) for _ in range(2)))


def attending_blocks() -> nn.Module:
    return Patches(Attending(), Attending())


def own_blocks() -> nn.Module:
    return Patches(*(Residual(Gated(("w1", "w3", "w2"), 32, 64), 32) for _ in range(2)))


TV_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 128}
TV_SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [4, 4], "window_size": [4, 4]}
BARE = {"sites": (("blocks.*.mlp", 6),), "features": (100, 64, 64), "size": 160}


def torchvision_family(name: str, model_class: type[nn.Module], kwargs: dict[str, Any], **expected: Any) -> Family:
    build = partial(from_torchvision, name, model_class, {**kwargs, "num_classes": 5})
    return Family(source="torchvision", name=name, build=build, stock=False, **expected)


def module_family(name: str, build: Callable[[], nn.Module], **expected: Any) -> Family:
    return Family(source="nn.Module", name=name, build=partial(from_module, build), stock=False, **expected)


TORCH = (
    Family(source="state dict", name="a ViT in timm's names", build=partial(from_file, dict), **BARE),
    Family(source="state dict", name="a ViT in OpenAI CLIP's names", build=partial(from_file, as_openai), **BARE),
    torchvision_family("ViT", VisionTransformer, TV_VIT, sites=(("encoder.layers.encoder_layer_*.mlp", 2),)),
    torchvision_family("Swin", SwinTransformer, TV_SWIN, sites=(("features.*.*.mlp", 2),)),
    torchvision_family(
        "Swin v2",
        SwinTransformer,
        {**TV_SWIN, "block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2},
        sites=(("features.*.*.mlp", 2),),
    ),
    module_family(
        "own blocks, `nn.MultiheadAttention` and `Sequential`", attending_blocks, sites=(("layers.*.mlp", 2),)
    ),
    module_family("`TransformerEncoderLayer`", torch_layers, sites=(("layers.*", 2),)),
    module_family("own blocks, `w1`, `w3`, `w2`", own_blocks, kind=SPLIT, sites=(("layers.*.mlp", 2),)),
)
ROWS = (*TIMM, *RECENT_TIMM, *TRANSFORMERS, *RECENT_TRANSFORMERS, *OPEN_CLIP, *TORCH)
FAMILIES = {str(family): family for family in ROWS}
