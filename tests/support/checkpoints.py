"""Tiny checkpoints in every layout that `prune-checkpoint` reads, as files of a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

IMAGES = list(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
SMALL = {"img_size": 32, "depth": 3, "num_classes": 5, "embed_dim": 32, "num_heads": 2}
VIT = {**SMALL, "patch_size": 8}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 2),
    "num_classes": 5,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 4.0},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
# What transformers called a ViT's tensors before its version 5.
OLD_NAMES = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def shaken(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A seeded model with random values everywhere, so that no norm or layer scale is left at its start."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def timm_folder(folder: Path, name: str, args: dict[str, Any], dtype: torch.dtype = torch.float32) -> str:
    """A model in timm's own layout."""
    model = shaken(lambda: timm.create_model(name, **args), dtype)
    timm.models.save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    return str(folder)


def timm_shards(folder: Path) -> str:
    """timm's layout in shards with an index, as transformers writes them."""
    timm_folder(folder, "vit_tiny_patch16_224", VIT)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(state), {}
    for index, part in enumerate((names[::3], names[1::3], names[2::3])):
        file = f"model-{index + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return str(folder)


def dinov2_folder(folder: Path) -> str:
    """A timm folder whose weights still have the names of DINOv2's own code, and its unused mask token."""
    timm_folder(folder, "vit_giant_patch14_dinov2", {**VIT, "num_classes": 0})
    state = load_file(folder / "model.safetensors")
    renamed = {name.replace("fc1", "w12").replace("fc2", "w3"): tensor for name, tensor in state.items()}
    save_file({**renamed, "mask_token": torch.ones(1, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def state_dict(folder: Path) -> str:
    """A bare .pth with a name."""
    folder.mkdir()
    state = shaken(lambda: timm.create_model("test_vit", num_classes=7)).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "weights.pth")
    return f"timm/test_vit@{folder / 'weights.pth'}"


def transformers_folder(folder: Path, name: str, rename: Callable[[str], str] = str, **config: Any) -> str:
    """A model in transformers' layout, its tensors renamed."""
    import transformers

    model_class = getattr(transformers, name)
    model = shaken(lambda: model_class(model_class.config_class(**config)), torch.bfloat16)
    model.save_pretrained(folder)
    state = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def old_name(name: str) -> str:
    """A tensor's name as transformers wrote it before version 5."""
    for new, old in OLD_NAMES.items():
        name = name.replace(new, old)
    return name


def clip_folder(folder: Path) -> str:
    """Both towers, with a buffer that older versions saved and newer ones do not know."""
    transformers_folder(folder, "CLIPModel", vision_config=VISION, text_config=TEXT)
    state = load_file(folder / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def open_clip_folder(folder: Path) -> str:
    """open_clip's layout, with transformers' weights of the same pair beside it, as on the hub."""
    import open_clip

    folder.mkdir()
    said = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    model = shaken(lambda: open_clip.create_model(f"local-dir:{folder}"))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    save_file({"logit_scale": torch.ones(())}, folder / "model.safetensors")
    return str(folder)


# name -> what writes it into a folder and says the source
SOURCES: dict[str, Callable[[Path], str]] = {
    "timm": lambda folder: timm_folder(folder, "vit_tiny_patch16_224", VIT),
    "timm bf16": lambda folder: timm_folder(folder, "vit_tiny_patch16_224", VIT, torch.bfloat16),
    "timm shards": timm_shards,
    "post norm": lambda folder: timm_folder(folder, "eva02_enormous_patch14_clip_224", {**VIT, "mlp_ratio": 4}),
    "inner norm": lambda folder: timm_folder(folder, "eva02_base_patch14_224", VIT),
    "split": lambda folder: timm_folder(folder, "vit_7b_patch16_dinov3", {**VIT, "embed_dim": 64}, torch.bfloat16),
    "dinov2": dinov2_folder,
    "swin": lambda folder: timm_folder(folder, "swin_tiny_patch4_window7_224", SWIN),
    "state dict": state_dict,
    "old transformers": lambda folder: transformers_folder(folder, "ViTForImageClassification", old_name, **VISION),
    "clip": clip_folder,
    "open_clip": open_clip_folder,
}


def stock(library: str, folder: Path) -> nn.Module:
    """What the library itself loads from a folder."""
    if library == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if library == "open_clip":
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}").eval()
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype="auto").eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Files of weights, with their index."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors*")}


def snapshot(paths: Sequence[Path]) -> dict[str, bytes]:
    """Every file below some folders."""
    return {str(file): file.read_bytes() for path in paths for file in path.rglob("*") if file.is_file()}
