"""What a method can't do with a model is said before the first image is read, and in words that fit the model."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch

import vitrim
from tests.support.models import hf, timm_vit
from vitrim.errors import VitrimError


class Unread(torch.utils.data.Dataset):
    """Images that can't be read."""

    def __getitem__(self, number):
        raise AssertionError("an image was read")

    def __len__(self):
        return 40


def convnext():
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=0)


def normed():
    return timm_vit(qk_norm=True)


def pooled():
    return timm_vit(global_pool="avg")


def recipe_of(method, **given):
    budget = {name: given.pop(name) for name in ("keep_ratio", "params_ratio") if name in given}
    return {"method": method, "options": given, **budget}


recursive, slimming, tome = (partial(recipe_of, name) for name in ("recursive", "patch-slimming", "tome"))
lora_prune = partial(recipe_of, "lora-prune", keep_ratio=0.5)


def siglip():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4
    ).eval()


@pytest.mark.parametrize(
    ("build", "recipe", "said"),
    [
        (timm_vit, recursive(keep_ratio=0.01), r"a share of 0\.01 does not pay for 1 of 2 blocks"),
        (timm_vit, recursive(keep_ratio=0.5, num_blocks=2), "does not pay for 2 of 2"),
        (timm_vit, recursive(keep_ratio=0.5, num_blocks=1, rank=4), r"say already how much stays \(num_blocks, rank\)"),
        (timm_vit, slimming(keep_ratio=0.5, tolerance=0.1), r"say already how much stays \(tolerance\)"),
        (timm_vit, {"method": "recursive", "allocate": "auto"}, "decides about the whole model by itself"),
        (timm_vit, {"method": "lora-prune", "hidden_dim": 9999}, r"9999 of 96 units; use 1\.\.96"),
        (timm_vit, lora_prune(rank=99), r"options\.rank=99: .* use 1\.\.32"),
        (convnext, lora_prune(), "is no plain linear layer, so it can't have factors"),
        (normed, lora_prune(parts="both"), r"options\.parts: this model has no plain attention"),
        (timm_vit, lora_prune(spare=True), r"options\.spare: each of the 2"),
        (timm_vit, slimming(keep_ratio=0.5, num_last=17), r"17 of 16 patches; use 0\.\.16"),
        (timm_vit, slimming(keep_ratio=0.5, num_last=9), "alone keeps 0.562"),
        (pooled, slimming(tolerance=1.0), "this model pools patches"),
        (convnext, slimming(keep_ratio=0.5), "has no CLS token"),
        (timm_vit, slimming(), "keep_ratio or macs_ratio: the default budget, half of the parameters, says"),
        (timm_vit, slimming(params_ratio=0.5), "params_ratio: says nothing about what patch-slimming"),
        (pooled, tome(keep_ratio=0.7), "its patches are pooled"),
        (timm_vit, tome(keep_ratio=0.05), "halving in every block"),
        (timm_vit, tome(), "keep_ratio or macs_ratio: the default budget"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_can_not_be_is_refused_before_the_first_image(build, recipe, said, dtype, tmp_path):
    with pytest.raises(VitrimError, match=said):
        vitrim.compress(build().to(dtype).eval(), data=Unread(), recipe=recipe, out=tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_block_that_cant_be_split_is_named_by_its_own_path():
    sizes = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 3, "hidden_size": 32}
    model = hf("Yolos", **sizes, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(VitrimError, match=r"^\S*layer\.0: is no block of norm, attention, norm and MLP"):
        vitrim.prune_(model, "patch-slimming", [torch.randn(4, 3, 32, 32)], keep_ratio=0.5)


@pytest.mark.parametrize(("options", "exact"), [({"rank": 32, "norms": "own"}, True), ({"rank": 0}, False)])
def test_a_pool_with_an_mlp_of_its_own_is_no_block_of_the_row(options, exact, run, caplog):
    model, student = siglip(), siglip()
    plan = vitrim.prune_(student, vitrim.methods.Recursive(num_blocks=2, **options))
    assert [edit.paths for edit in plan.edits] == [("blocks.0", "blocks.2"), ("blocks.1", "blocks.3")]
    assert "attn_pool.mlp stands outside of the row of 4 blocks" in caplog.text
    images = torch.randn(3, 3, 32, 32)
    assert torch.allclose(run(student, images), run(model, images), atol=1e-4) is exact
    for name, tensor in model.attn_pool.state_dict().items():
        assert torch.equal(student.attn_pool.state_dict()[name], tensor)


def test_a_model_whose_layers_are_replaced_is_told_so():
    model = timm_vit()
    vitrim.prune_(model, vitrim.methods.Recursive(num_blocks=1, rank=0))
    with pytest.raises(VitrimError, match=r"an earlier cut has replaced its linear layers \(RecursiveLinear\)"):
        vitrim.prune_(model, "magnitude", keep_ratio=0.5)
