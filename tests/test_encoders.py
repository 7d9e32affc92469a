"""Towers of models that people run, each of the library's own class at toy size: cut where it should, or refused."""

import pytest
import torch

import vitrim
from tests.support.vlms import VLMS, build_vlm, generated, seen
from vitrim.errors import VitrimError

transformers = pytest.importorskip("transformers")
IMAGES = list(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


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


def test_a_vlm_that_takes_no_bare_images_says_what_to_pass_in_one_line():
    says = r"can't run on float32 \(3, 32, 32\) .*; pass pictures, from which its processor makes all that .*grid_thw"
    with pytest.raises(VitrimError, match=says) as caught:
        vitrim.compress(build_vlm("Qwen3-VL"), data=IMAGES, keep_ratio=0.5, quiet=True)
    assert "\n" not in str(caught.value)


def build_pixtral():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.PixtralVisionModel(
        transformers.PixtralVisionConfig(**sizes, image_size=32, patch_size=8)
    ).eval()


def test_a_tower_that_puts_a_batch_into_one_row_is_cut_with_tensors_of_one_size():
    options = {"keep_ratio": 0.5, "repair": {"refit": False}, "quiet": True}
    result = vitrim.compress(build_pixtral(), data=IMAGES, **options)
    assert len(result.plan.edits) == 2 and result.metrics.stock and result.metrics.after_cut.relative_error < 0.01


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
