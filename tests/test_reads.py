"""What users of a tower read: hidden states before the last, maps of several stages, deep-stack features."""

import copy

import pytest
import torch

import vitrim
from tests.support.families import randomised
from tests.support.vlms import build_llava, build_vlm, generated_for
from vitrim.config.options import CacheOptions
from vitrim.errors import RecipeError
from vitrim.metrics.fidelity import TokenComparison, fidelity
from vitrim.models.features import features
from vitrim.models.load import origin_of
from vitrim.models.takes import encoder_path
from vitrim.recover.cache_layout import Layout
from vitrim.recover.losses import feature_loss
from vitrim.tokens import Features, features_of, one_below_the_other

transformers = pytest.importorskip("transformers")
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
CHEAP = {"keep_ratio": 0.5, "repair": {"refit": False}, "quiet": True}


def build_backbone(**options):
    config = transformers.Dinov2Config(**SIZES, mlp_ratio=2, out_indices=[1, 3], **options)
    return randomised(lambda: transformers.Dinov2Backbone(config))


def test_a_tower_is_judged_and_trained_by_the_layer_that_its_projector_reads(tmp_path):
    model = randomised(build_llava)
    found = vitrim.inspect(model)
    assert found.features == (
        "features: pooled: mean over tokens 1 and on of hidden_states[-2]; patches: tokens 1 and on of "
        "hidden_states[-2]; no user reads what the last 1 of 3 blocks make of it"
    )
    recover = {"steps": 2, "batch_size": 4, "lr": 1e-3}
    result = vitrim.compress(model, data=list(IMAGES), out=tmp_path / "out", recover=recover, **CHEAP)
    before, after = (each.get_submodule("model.vision_tower").eval() for each in (model, result.model))
    with torch.no_grad():
        theirs, mine = (each(IMAGES, output_hidden_states=True).hidden_states[-2][:, 1:] for each in (before, after))
        read = features(after, IMAGES)
    assert torch.equal(read.patches_BND, mine) and torch.equal(read.pooled_BD, mine.mean(1)) and read.num_prefix == 0
    said = fidelity(after, before, [IMAGES])["relative_error"]
    spread = (theirs - theirs.flatten(0, 1).mean(0)).square().sum()
    assert said == pytest.approx(float((mine - theirs).square().sum() / spread), rel=1e-3)
    unread = "encoder.layers.2.self_attn.q_proj.weight"  # its blocks behind are cut, and get no gradient
    assert torch.equal(after.get_parameter(unread), before.get_parameter(unread))
    trained = "encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after.get_parameter(trained), before.get_parameter(trained))
    assert len(result.plan.edits) == 3 and result.metrics.stock
    alone = type(model).from_pretrained(tmp_path / "out").eval()
    assert generated_for(alone, IMAGES[:1]) == generated_for(result.model, IMAGES[:1])
    again = vitrim.load(tmp_path / "out")
    assert "hidden_states[-2]" in vitrim.inspect(again).features


def test_a_tower_that_is_cut_alone_is_read_at_its_end_again():
    model = build_llava()
    tower = model.get_submodule(origin_of(model).encoder)
    assert tower.read_by_projector == ((-2,), False)
    origin_of(tower)
    assert not hasattr(tower, "read_by_projector")
    model.config.vision_feature_layer, model.config.vision_feature_select_strategy = [-3, -2], "full"
    origin_of(model)
    with torch.no_grad():
        found, states = features(tower, IMAGES), tower(IMAGES, output_hidden_states=True).hidden_states
    assert torch.equal(found.pooled_BD, states[-2][:, 0]) and torch.equal(found.patches_BND, states[-2][:, 1:])
    assert torch.equal(found.maps[0], states[-3][:, 1:]) and "; maps: hidden_states[-3]" in found.taken


def test_the_maps_of_a_backbone_are_tokens_of_several_layers():
    model = build_backbone()
    with torch.no_grad():
        found, maps = features(model, IMAGES), model(IMAGES).feature_maps
    tokens = [each.flatten(2).mT for each in maps]
    assert torch.equal(found.patches_BND, tokens[1]) and torch.equal(found.maps[0], tokens[0]) and len(found.maps) == 1
    assert found.taken == ("pooled: mean over feature_maps[1]; patches: feature_maps[1]; maps: feature_maps[0]")
    rows = build_backbone(reshape_hidden_states=False)
    with torch.no_grad():
        found, maps = features(rows, IMAGES), rows(IMAGES).feature_maps
    assert torch.equal(found.pooled_BD, maps[1][:, 0]) and torch.equal(found.maps[0], maps[0][:, 1:])


def test_every_layer_is_compared_and_distilled():
    model = build_backbone()
    other = copy.deepcopy(model)
    other.layernorm.weight.data.mul_(1.5)  # behind the blocks, so the maps alone differ
    with torch.no_grad():
        theirs, mine = features(model, IMAGES), features(other, IMAGES)
    errors = [(a - b).square().mean() for a, b in zip(mine.tensors, theirs.tensors, strict=True)]
    assert feature_loss(mine, theirs) == pytest.approx(float(errors[0] + (errors[1] + errors[2]) / 2))
    found = fidelity(other, model, [IMAGES])
    assert found["maps_relative_error"] > 0.01 and found["relative_error"] > 0.01
    with pytest.raises(RecipeError, match="keeps tokens of one layer, and 2 are compared"):
        Layout.of(theirs, CacheOptions())
    pair = one_below_the_other([theirs.parts, mine.parts])
    assert torch.equal(features_of(pair).maps[0][16:], mine.maps[0])


def test_layers_have_each_their_own_mean():
    compared, alike = TokenComparison(), TokenComparison()
    near, far = torch.randn(8, 4), 100 + torch.randn(8, 4)
    for layer, tokens in enumerate((near, far)):
        compared.update(tokens + 0.1, tokens, layer=layer)
        alike.update(tokens + 0.1, tokens)
    assert compared.relative_error > 100 * alike.relative_error


def test_deep_stack_features_are_read_beside_the_last_layer():
    model = randomised(lambda: build_vlm("Qwen3-VL"))
    tower = model.get_submodule(encoder_path(model))
    patches = torch.randn(16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
    images = vitrim.Inputs([{"hidden_states": patches, "grid_thw": torch.tensor([[1, 4, 4]])}] * 2)
    with torch.no_grad():
        found = features(tower, images)
        output = tower(**images.tensors)
    assert torch.equal(found.maps[0].flatten(0, -2), output.deepstack_features[0])
    assert found.taken.endswith("; maps: deepstack_features") and isinstance(found, Features)
