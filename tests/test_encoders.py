"""Towers of models that people run, each of the library's own class at toy size: cut where it should, or refused."""

import copy

import pytest
import torch

import vitrim
from vitrim.errors import VitrimError

transformers = pytest.importorskip("transformers")
IMAGES = list(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
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


@pytest.mark.parametrize("name", VLMS)
def test_the_tower_of_a_vlm_is_cut_by_its_weights_and_loads_in_transformers_alone(tmp_path, name):
    model, output = build_vlm(name), VLMS[name][2]
    result = vitrim.compress(model, method="magnitude", keep_ratio=0.5, out=tmp_path / "out", quiet=True)
    assert list(result.plan.widths) == [f"model.visual.blocks.{n}.mlp" for n in range(2)]
    assert {edit.site.output.rpartition(".")[2] for edit in result.plan.edits} == {output}
    before, after = model.state_dict(), result.model.state_dict()
    changed = {
        key
        for key, value in before.items()
        if not torch.equal(value[:0], after[key][:0]) or value.shape != after[key].shape
    }
    assert changed and all(".visual.blocks." in key and ".mlp." in key for key in changed)
    alone = type(model).from_pretrained(tmp_path / "out") if result.metrics.stock else vitrim.load(tmp_path / "out")
    assert generated(alone.eval()) == generated(result.model)
    assert torch.equal(seen(alone), seen(result.model)) and not torch.equal(seen(alone), seen(model))


@pytest.mark.parametrize("name", VLMS)
def test_a_vlm_that_takes_no_bare_images_is_refused_in_one_line(name):
    with pytest.raises(VitrimError, match=r"pass no data, to cut it by its weights alone .*grid_thw") as caught:
        vitrim.compress(build_vlm(name), data=IMAGES, keep_ratio=0.5, quiet=True)
    assert "\n" not in str(caught.value)


def build_pixtral():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.PixtralVisionModel(
        transformers.PixtralVisionConfig(**sizes, image_size=32, patch_size=8)
    ).eval()


def test_a_tower_that_puts_a_batch_into_one_row_is_cut_by_its_weights_alone():
    with pytest.raises(
        VitrimError, match=r"all images of a batch into one row, .*; pass no data, to cut it by"
    ) as caught:
        vitrim.compress(build_pixtral(), data=IMAGES, keep_ratio=0.5, quiet=True)
    assert "\n" not in str(caught.value)
    result = vitrim.compress(build_pixtral(), method="magnitude", keep_ratio=0.5, quiet=True)
    assert len(result.plan.edits) == 2 and result.metrics.stock


def test_the_trunk_of_sam_2_is_cut_with_images(tmp_path):
    stages = {"embed_dim_per_stage": [8, 16, 16, 16], "num_attention_heads_per_stage": [1, 2, 2, 2]}
    stages |= {
        "blocks_per_stage": [1, 1, 2, 1],
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [],
        "num_query_pool_stages": 0,
    }
    config = transformers.Sam2HieraDetConfig(hidden_size=8, num_attention_heads=1, image_size=[64, 64], **stages)
    model = transformers.Sam2HieraDetModel(config).eval()
    images = [torch.nn.functional.interpolate(image[None], 64)[0] for image in IMAGES]
    result = vitrim.compress(
        model, data=images, keep_ratio=0.5, repair={"refit": False}, out=tmp_path / "out", exact=True, quiet=True
    )
    assert {edit.site.output.rpartition(".")[2] for edit in result.plan.edits} == {"proj_out"}
    assert len(result.plan.edits) == 5 and result.metrics.reload_difference <= 1e-5
