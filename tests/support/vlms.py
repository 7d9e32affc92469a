"""Whole vision-language models of transformers at toy size, and what they say and see."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TEXT |= {"intermediate_size": 48, "vocab_size": 99, "pad_token_id": 0}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "layer_types": ["full_attention"] * 2}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
GRID = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 8}
# Its class, what its tower is given, and the last layer of an MLP in it.
VLMS = {
    "Qwen3-VL": ("Qwen3VL", {**GRID, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, "linear_fc2"),
    "Qwen2.5-VL": ("Qwen2_5_VL", {**GRID, "fullatt_block_indexes": [1]}, "down_proj"),
    "Qwen3.5": ("Qwen3_5", {**GRID, "num_position_embeddings": 16}, "linear_fc2"),
    "GLM-4.5V": ("Glm4v", {**GRID, "image_size": 32}, "down_proj"),
}


def build_vlm(name):
    family, vision, _ = VLMS[name]
    config = getattr(transformers, f"{family}Config")(text_config=copy.deepcopy(TEXT), vision_config=vision)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def generated(model):
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.inference_mode():
        return model.generate(input_ids=torch.tensor([[5, 6, 7]]), **options)[0].tolist()


def seen(model):
    """What the tower of a VLM makes of an image of 4 x 4 patches."""
    vision = model.config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(16, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model.model.visual(patches, grid_thw=torch.tensor([[1, 4, 4]]))
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def build_llava(vision=None, **text):
    """A Llava whose projector reads the last hidden state but one of a CLIP tower with three blocks."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    vision = vision or {"model_type": "clip_vision_model", **sizes, "image_size": 32, "patch_size": 8}
    text = {key: value for key, value in TEXT.items() if key not in ("layer_types", "rope_parameters")} | text
    config = transformers.LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **text}, image_token_index=5
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def build_gemma3():
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {key: value for key, value in TEXT.items() if key != "rope_parameters"}
    marks = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **marks)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def build_gemma4():
    vision = {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")}
    vision |= {"intermediate_size": 48, "num_key_value_heads": 4, "patch_size": 8, "pooling_kernel_size": 2}
    text = {key: value for key, value in TEXT.items() if key != "rope_parameters"}
    text |= {"vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    marks = {"image_token_id": 5, "boi_token_id": 6, "eoi_token_id": 7, "audio_config": None}
    torch.manual_seed(0)
    config = transformers.Gemma4Config(
        text_config=text | {"global_head_dim": 8}, vision_config=vision | {"position_embedding_size": 64}, **marks
    )
    return transformers.Gemma4ForConditionalGeneration(config).eval()


def generated_for(model, images, *, count=16, **given):
    """What a VLM says of an image, which stands as so many tokens in the text."""
    ids = torch.tensor([[1, 8, *[5] * count, 9, 10]])
    options = {"max_new_tokens": 6, "do_sample": False, **given}
    with torch.inference_mode():
        return model.generate(input_ids=ids, pixel_values=images, **options)[0].tolist()
