"""Tiny CLIP-like pairs with their tokenizers, written as their libraries write them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

WORDS = "a photo of the small big cat dog car ship frog red blue on and two in left under".split()
NAMES = ["cat", "dog", "car", "ship", "frog", "small dog"]
TEMPLATES = ["a photo of a {}", "the {}", "a big {} in a photo"]
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": len(WORDS) + 4,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 4.0},
    # open_clip's own tokenizer has 49,408 words
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
KINDS = ("open_clip", "open_clip-siglip", "open_clip-timm", "clip", "siglip")


def shaken_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved, so that outputs differ from text to text and from image to image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_pair(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """A folder with a tiny pair in its library's own layout."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        (_write_open_clip if kind.startswith("open_clip") else _write_transformers)(kind, folder, seed)
    return folder


def _write_open_clip(kind: str, folder: Path, seed: int) -> None:
    import open_clip

    config = dict(OPEN_CLIP)
    if kind != "open_clip":
        config["custom_text"] = True
    if kind == "open_clip-siglip":
        config |= {"init_logit_bias": -3.0, "init_logit_scale": 1.0}
    if kind == "open_clip-timm":
        tower = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
        config["vision_cfg"] = {**tower, "timm_model_pretrained": False}
    said = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    model = shaken_(open_clip.create_model(f"local-dir:{folder}", load_weights=False), seed)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def _write_transformers(kind: str, folder: Path, seed: int) -> None:
    import transformers

    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    parts = {"vision_config": VISION, "text_config": TEXT}
    parts |= {"projection_dim": 24} if kind == "clip" else {}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**parts))
    shaken_(model, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(folder)


@cache
def tokenizer():
    """A tokenizer of whole words that puts a start and an end around a text."""
    import tokenizers
    import transformers

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3}
    words = tokenizers.models.WordLevel(special | {word: i + 4 for i, word in enumerate(WORDS)}, unk_token="?")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def pictures(num: int, size: int = 32) -> torch.Tensor:
    """Images of noise, half of it shared by all images of a class of six."""
    generator = torch.Generator().manual_seed(5)
    classes = torch.randn(len(NAMES), 3, size, size, generator=generator)
    noise = torch.randn(num, 3, size, size, generator=generator)
    return classes[torch.arange(num) % len(NAMES)] + noise
