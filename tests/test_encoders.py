"""Towers of models that people run, each of the library's own class at toy size: cut where it should, or refused."""

import pytest
import torch

import vitrim
from tests.support.families import randomised
from tests.support.recent_families import STAGES
from tests.support.vlms import VLMS, build_gemma3, build_gemma4, build_vlm, generated, generated_for, seen
from vitrim.errors import VitrimError
from vitrim.models.features import features
from vitrim.models.load import origin_of

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
    config = transformers.Sam2HieraDetConfig(**STAGES)
    model = transformers.Sam2HieraDetModel(config).eval()
    images = [torch.nn.functional.interpolate(image[None], 64)[0] for image in IMAGES]
    result = vitrim.compress(
        model, data=images, keep_ratio=0.5, repair={"refit": False}, out=tmp_path / "out", exact=True, quiet=True
    )
    assert {edit.site.output.rpartition(".")[2] for edit in result.plan.edits} == {"proj_out"}
    assert len(result.plan.edits) == 5 and result.metrics.reload_difference <= 1e-5


def patches(*sides):
    """Pictures of so many patches as Gemma 4 takes them: the patches in a row, and where each stands."""
    generator = torch.Generator().manual_seed(0)
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1) for rows, columns in sides]
    pixels = [torch.rand(1, len(each), 3 * 8 * 8, generator=generator) for each in places]
    return [
        vitrim.Inputs([{"pixel_values": p, "pixel_position_ids": each[None]}])
        for p, each in zip(pixels, places, strict=True)
    ]


def test_padding_by_places_is_no_patch():
    model = randomised(build_gemma4)
    tower = model.get_submodule(origin_of(model).encoder)
    several = patches((4, 4), (2, 6), (4, 2))
    with torch.inference_mode():
        together, alone = features(tower, torch.cat(several)), [features(tower, each) for each in several]
    assert [each.patches_BND.shape[1] for each in alone] == [4, 3, 2] and together.patches_BND.shape[1] == 9
    assert torch.allclose(together.pooled_BD, torch.cat([each.pooled_BD for each in alone]), atol=1e-5)
    assert torch.cat(several).real_BN.sum(1).tolist() == [16, 12, 8]


@pytest.mark.parametrize("name", ["Gemma 3", "Gemma 4"])
def test_a_gemma_says_the_same_of_an_image_when_transformers_alone_loads_it(tmp_path, name):
    if name == "Gemma 3":
        model, data, count, given = randomised(build_gemma3), IMAGES, 4, {}
        image = data[0][None]
    else:
        model, data, count = randomised(build_gemma4), patches(*[(4, 4), (2, 6)] * 8), 4
        image, given = data[0].tensors["pixel_values"], {"image_position_ids": data[0].tensors["pixel_position_ids"]}
    options = {"keep_ratio": 0.5, "repair": {"refit": False}, "quiet": True}
    result = vitrim.compress(model, data=data, out=tmp_path / "out", **options)
    paths = [path for path in result.plan.widths if "head" not in path]
    assert paths == [f"model.vision_tower.encoder.layers.{n}.mlp" for n in range(2)] and result.metrics.stock
    assert result.metrics.after_cut.relative_error < 0.5
    alone = type(model).from_pretrained(tmp_path / "out").eval()
    assert generated_for(alone, image, count=count, **given) == generated_for(result.model, image, count=count, **given)
    with torch.inference_mode():
        mine, theirs = (each.get_submodule("model.vision_tower") for each in (result.model, alone))
        read, wanted = (features(tower, data[0][None]).pooled_BD for tower in (theirs, mine))
    assert torch.allclose(read, wanted, atol=1e-5)
