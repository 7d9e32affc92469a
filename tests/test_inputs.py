"""Images as named tensors: packed patches with their grids, padding with its mask, made by the models' own processors.

Every sum, feature and error of a batch is held to what one image alone gives.
"""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import vitrim
from tests.support.families import randomised
from tests.support.vlms import VLMS, build_vlm, generated, seen
from vitrim.calibrate.walk import walk
from vitrim.data.inputs import check_repeatable, random_inputs
from vitrim.data.transforms import augment_for, transform_for
from vitrim.errors import RecipeError
from vitrim.inputs import Inputs, real_tokens, run_on
from vitrim.models.features import features
from vitrim.models.load import load_model, origin_of
from vitrim.models.sites import find_mlps

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "pad_token_id": 0, "eos_token_id": 2}
PIXTRAL = {"model_type": "pixtral", **SIZES, "image_size": 64, "patch_size": 8, "head_dim": 8}
CHEAP = {"repair": {"refit": False}, "quiet": True}


def pictures(count, *, smallest=20, largest=60):
    sides = np.random.default_rng(0)
    return [
        Image.fromarray(sides.integers(0, 255, (*sides.integers(smallest, largest, 2), 3), dtype=np.uint8))
        for _ in range(count)
    ]


def build_pixtral():
    return transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**PIXTRAL))


def build_siglip2():
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=8))


TOWERS = {"pixtral": build_pixtral, "siglip2": build_siglip2, "qwen": lambda: build_vlm("Qwen2.5-VL")}


@pytest.fixture(scope="module")
def tower(request):
    """A tower and named tensors of five pictures of different shapes, from its own processor."""
    whole = randomised(TOWERS[request.param])
    origin = origin_of(whole)
    process = transform_for(origin.preprocessing)
    return whole.get_submodule(origin.encoder), torch.cat([process(picture) for picture in pictures(5)])


every_tower = pytest.mark.parametrize("tower", TOWERS, indirect=True)


def named(*sizes):
    return Inputs([{"x": torch.full((1, n, 2), float(n)), "spatial_shapes": torch.tensor([[1, n]])} for n in sizes])


def test_named_tensors_can_be_used_as_a_batch_of_images():
    batch = named(3, 1, 2)
    assert len(batch) == 3 and batch.tensors["x"].shape == (3, 3, 2) and batch.tensors["x"][1, 1:].eq(0).all()
    assert [len(part) for part in batch.split(2)] == [2, 1]
    for index, kept in (
        (1, [1]),
        (slice(1, None), [1, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([2, 0], [2, 0]),
    ):
        assert [int(each.tensors["spatial_shapes"][0, 1]) for each in batch[index]] == [(3, 1, 2)[at] for at in kept]
    again = torch.cat([batch[:1], torch.stack(list(batch[1:]))])
    assert torch.equal(again.tensors["x"], batch.tensors["x"])
    empty = torch.zeros_like(batch)
    assert empty.tensors["x"].eq(0).all() and torch.equal(
        empty.tensors["spatial_shapes"], batch.tensors["spatial_shapes"]
    )
    half = batch.to("cpu", torch.bfloat16).tensors
    assert half["x"].dtype == torch.bfloat16 and half["spatial_shapes"].dtype == torch.int64
    with pytest.raises(TypeError):
        torch.abs(batch)


def test_tokens_in_one_row_are_dealt_out_by_what_images_say_of_their_sizes():
    row_1ND = torch.arange(12.0).reshape(1, 6, 2)
    assert [len(part) for part in named(3, 1, 2).tokens_of(row_1ND)] == [3, 1, 2]
    assert [len(part) for part in named(3, 1, 2).tokens_of(row_1ND.reshape(-1, 2).repeat(4, 1))] == [12, 4, 8]
    with pytest.raises(vitrim.ModelError, match="which are whose of 3 images"):
        named(3, 1, 1).tokens_of(row_1ND)


@every_tower
def test_features_of_a_batch_are_those_of_each_image_alone(tower):
    model, images = tower
    with torch.inference_mode():
        together, alone = features(model, images), [features(model, image) for image in images]
    real = [part for image, found in zip(images, alone, strict=True) for part in image.tokens_of(found.patches_BND)]
    assert torch.allclose(together.pooled_BD, torch.cat([each.pooled_BD for each in alone]), atol=1e-5)
    assert torch.allclose(together.patches_BND.flatten(0, -2), torch.cat(real), atol=1e-5)
    assert len({len(part) for part in real}) > 1 and len(together.patches_BND) == 1


@every_tower
def test_sums_over_a_batch_are_those_over_its_images_one_by_one(tower):
    model, images = tower
    sites = find_mlps(model)

    def sums(batches):
        visits = walk(model, copy.deepcopy(model), sites, batches, num_held_out=0)
        return {visit.site.path: visit.stats for visit in visits}

    together, one_by_one = sums([images]), sums(list(images))
    num_patches = sum(len(image.tokens_of(features(model, image).patches_BND)[0]) for image in images)
    for path, stats in together.items():
        assert stats.num_tokens == one_by_one[path].num_tokens == (5 if path == "head.mlp" else num_patches)
        for name in ("hidden_HH", "cross_HD"):
            mine, theirs = getattr(stats, name), getattr(one_by_one[path], name)
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_padding_is_left_out_of_rows_of_tokens():
    images = Inputs(
        [{"pixel_attention_mask": torch.tensor([[1, 1, 0]])}, {"pixel_attention_mask": torch.tensor([[1, 0, 0]])}]
    )
    tokens_BND = torch.arange(12.0).reshape(2, 3, 2)
    wanted = tokens_BND.reshape(6, 2)[[0, 1, 3]]
    assert torch.equal(real_tokens(tokens_BND, images), wanted[None])
    assert torch.equal(real_tokens(tokens_BND.reshape(6, 2), images), wanted)
    assert real_tokens(tokens_BND[:, 0], images).shape == (2, 2)  # one a picture, as in an attention pool


@pytest.mark.parametrize("name", VLMS)
def test_a_vlm_is_cut_with_pictures_of_any_shape_and_loads_in_transformers_alone(tmp_path, name):
    model = randomised(lambda: build_vlm(name))
    options = {"keep_ratio": 0.5, "recover": {"steps": 2, "batch_size": 4, "lr": 1e-5, "augment": "strong"}}
    result = vitrim.compress(model, data=pictures(20), out=tmp_path / "out", **options, **CHEAP)
    assert list(result.plan.widths) == [f"model.visual.blocks.{n}.mlp" for n in range(2)]
    assert error(model, result.model) < 0.01
    alone = type(model).from_pretrained(tmp_path / "out") if result.metrics.stock else vitrim.load(tmp_path / "out")
    assert generated(alone.eval()) == generated(result.model)
    assert torch.equal(seen(alone), seen(result.model)) and not torch.equal(seen(alone), seen(model))


def error(model, small):
    """The relative error of a small tower's tokens on pictures of noise."""
    origin = origin_of(model)
    noise = random_inputs(origin, 4)
    with torch.inference_mode():
        theirs, mine = (features(each.get_submodule(origin.encoder), noise) for each in (model, small))
    wanted = theirs.patches_BND.flatten(0, -2)
    return float((mine.patches_BND.flatten(0, -2) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def build_mistral3():
    text = {"model_type": "mistral", **TEXT}
    config = transformers.Mistral3Config(text_config=text, vision_config=PIXTRAL, image_token_index=5)
    return transformers.Mistral3ForConditionalGeneration(config)


def test_a_tower_that_puts_a_batch_into_one_row_is_cut_with_pictures(tmp_path):
    model = randomised(build_mistral3)
    result = vitrim.compress(model, data=pictures(20), keep_ratio=0.5, out=tmp_path / "out", **CHEAP)
    assert len(result.plan.edits) == 2 and result.metrics.stock and result.metrics.encoder == "model.vision_tower"
    assert error(model, result.model) < 0.1
    alone = type(model).from_pretrained(tmp_path / "out").eval()
    assert generated(alone) == generated(result.model)
    found = vitrim.evaluate(tmp_path / "out", model, data=pictures(20), latency=False)
    assert found.fidelity["relative_error"] < 0.1


def test_a_tower_with_masked_padding_is_cut_with_pictures(tmp_path):
    model = randomised(build_siglip2)
    result = vitrim.compress(model, data=pictures(20), keep_ratio=0.5, out=tmp_path / "out", **CHEAP)
    assert [site.path for site in find_mlps(model)] == [edit.site.path for edit in result.plan.edits]
    alone = transformers.Siglip2VisionModel.from_pretrained(tmp_path / "out").eval()
    assert vitrim.inspect(model).features == "features: pooled: pooler_output; patches: last_hidden_state"
    with pytest.raises(
        vitrim.ModelError, match="takes pixel_values, pixel_attention_mask, spatial_shapes; only models"
    ):
        vitrim.export(model, tmp_path / "out.pt2", to="torch")
    noise = random_inputs(origin_of(model), 3)
    with torch.inference_mode():
        outputs = [run_on(each, noise).last_hidden_state for each in (alone, result.model)]
    assert torch.equal(*outputs)
    for options in ({"blockwise": {"steps": 1}}, {"recover": {"steps": 1, "cache_teacher": {}}}):
        with pytest.raises(RecipeError):
            vitrim.compress(model, data=pictures(20), keep_ratio=0.5, options={}, recipe=options, quiet=True)


def test_a_folders_own_processor_is_taken_before_the_librarys_default(tmp_path):
    model = randomised(build_pixtral)
    model.save_pretrained(tmp_path)
    own = {"patch_size": 8, "size": {"longest_edge": 32}, "image_mean": [0.0] * 3, "image_std": [2.0] * 3}
    transformers.PixtralImageProcessor(**own).save_pretrained(tmp_path)
    _, origin = load_model(str(tmp_path))
    picture = pictures(1, smallest=100, largest=120)[0]
    mine, default = (transform_for(each.preprocessing)(picture).tensors for each in (origin, origin_of(model)))
    assert mine["pixel_values"].shape[-1] <= 32 < default["pixel_values"].shape[-1] and mine["pixel_values"].min() >= 0
    drawn = augment_for(origin.preprocessing, "strong", flip=True)(picture)
    assert len(drawn) == 1 and "image_sizes" in drawn.tensors
    vitrim.compress(str(tmp_path), method="magnitude", keep_ratio=0.5, out=tmp_path / "out", quiet=True)
    assert load_model(str(tmp_path / "out"))[1].preprocessing == origin.preprocessing


def test_a_processor_that_does_not_fit_is_no_obstacle_to_a_cut_by_weights_alone(tmp_path):
    model = randomised(build_siglip2)
    model.save_pretrained(tmp_path)
    transformers.Siglip2ImageProcessor(patch_size=4, max_num_patches=16).save_pretrained(tmp_path)
    result = vitrim.compress(str(tmp_path), method="magnitude", keep_ratio=0.5, out=tmp_path / "out", quiet=True)
    assert len(result.plan.edits) == 3 and result.metrics.stock
    with pytest.raises(vitrim.DataError, match="can't run on named tensors"):
        vitrim.compress(str(tmp_path), data=pictures(20), keep_ratio=0.5, quiet=True)


def test_named_tensors_can_be_given_in_place_of_pictures():
    model = randomised(lambda: build_vlm("Qwen3-VL"))
    process = transform_for(origin_of(model).preprocessing)
    data = [process(picture) for picture in pictures(20)]
    given, read = (vitrim.compress(model, data=each, keep_ratio=0.5, **CHEAP) for each in (data, pictures(20)))
    assert given.metrics.after_cut.fidelity == read.metrics.after_cut.fidelity
    assert [edit.keep for edit in given.plan.edits] == [edit.keep for edit in read.plan.edits]


def test_images_that_see_each_other_are_found_in_one_row_too():
    model = randomised(build_pixtral)
    origin = origin_of(model)
    check_repeatable(model, origin, random_inputs(origin, 2))
    model.transformer.layers[0].attention.register_forward_hook(
        lambda _, args, output: (output[0] + output[0].mean(1), None)
    )
    with pytest.raises(vitrim.ModelError, match="depend on the others in its batch"):
        check_repeatable(model, origin, random_inputs(origin, 2))


def test_the_encoder_of_a_video_model_is_cut_with_clips_and_its_predictor_is_left_alone(tmp_path):
    predictor = {"pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    config = transformers.VJEPA2Config(**sizes, **predictor, crop_size=32, patch_size=8, pred_num_mask_tokens=1)
    model = randomised(lambda: transformers.VJEPA2Model(config))
    clips = list(torch.randn(20, 1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    data = [vitrim.Inputs([{"pixel_values_videos": clip}]) for clip in clips]
    result = vitrim.compress(model, data=data, keep_ratio=0.5, out=tmp_path / "out", **CHEAP)
    assert (
        list(result.plan.widths) == [f"encoder.layer.{n}.mlp" for n in range(2)] and result.metrics.encoder == "encoder"
    )
    assert result.metrics.after_cut.relative_error < 0.5
    alone = transformers.VJEPA2Model.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        outputs = [each(clips[0], skip_predictor=True).last_hidden_state for each in (alone, result.model.eval())]
    assert torch.equal(*outputs)
    with pytest.raises(vitrim.DataError, match=r"pass clips, as vitrim.Inputs\(\[{\"pixel_values_videos\""):
        vitrim.compress(model, data=list(torch.randn(8, 3, 32, 32)), keep_ratio=0.5, quiet=True)
