"""The architecture of a bare state dict: read from its tensors, said in the file, or given; never guessed."""

import argparse
import json

import pytest
import timm
import torch

import vitrim
from tests.support.timm_files import assert_same, made, one_line
from vitrim.cli.app import run
from vitrim.errors import ModelError, VitrimError
from vitrim.models.load import load_model
from vitrim.models.origin import Reading

TINY = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


FITS = {
    "size": {"img_size": 224},
    "channels": {"in_chans": 1},
    "patches": {"img_size": 80, "patch_size": 8},
    "mean pool": {"global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True, "img_size": 96},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no class token, norm first": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "attention pool": {"class_token": False, "global_pool": "map"},
    "depth": {"depth": 2},
    "blocks": {"mlp_ratio": 2, "qkv_bias": False, "qk_norm": True, "init_values": 0.1, "pre_norm": True},
    "no head": {"num_classes": 0},
}


@pytest.mark.parametrize("name", FITS)
def test_the_architecture_is_read_from_the_tensors(tmp_path, name):
    expected = made(**{"num_classes": 7, **FITS[name]})
    torch.save(expected.state_dict(), tmp_path / "best.pth")
    model, origin = load_model(f"timm/test_vit@{tmp_path / 'best.pth'}")
    assert_same(model, expected)
    images = torch.randn(2, *origin.preprocessing["input_size"])
    assert torch.equal(model(images), expected(images))
    assert any(f"{key}=" in " ".join(origin.notes) for key in FITS[name])


@pytest.mark.parametrize(
    "architecture, arguments",
    [
        ("eva02_tiny_patch14_224", {"img_size": 42, "depth": 2}),
        ("beit_base_patch16_224", {"img_size": 64, "depth": 1}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 1, "num_classes": 3}),
    ],
)
def test_sizes_of_other_classes_are_read_too(tmp_path, architecture, arguments):
    expected = timm.create_model(architecture, **arguments)
    torch.save(expected.state_dict(), tmp_path / "best.pth")
    model, origin = load_model(f"timm/{architecture}@{tmp_path / 'best.pth'}")
    assert_same(model, expected)
    assert origin.preprocessing["input_size"][1:] == [arguments["img_size"]] * 2


def test_what_no_tensor_fixes_is_read_from_the_arguments_in_the_file_or_given(tmp_path):
    expected = made(global_pool="avg", fc_norm=False, img_size=(32, 64))
    path, images = tmp_path / "best.pth", torch.randn(2, 3, 32, 64)
    saved = argparse.Namespace(gp="avg", input_size=[3, 32, 64], mean=[0.1, 0.2, 0.3], std=None, lr=1.0)
    torch.save({"state_dict": expected.state_dict(), "args": saved}, path)
    model, origin = load_model(f"timm/test_vit@{path}")
    assert torch.equal(model(images), expected(images))
    assert origin.preprocessing["mean"] == [0.1, 0.2, 0.3] and origin.preprocessing["input_size"] == [3, 32, 64]
    assert "global_pool='avg', img_size=[32, 64], read from the arguments saved in it" in " ".join(origin.notes)
    torch.save(expected.state_dict(), path)
    with pytest.raises(ModelError, match=r"don't say img_size.*--model-arg img_size=VALUE") as caught:
        load_model(f"timm/test_vit@{path}")
    one_line(caught)
    model, _ = load_model(
        f"timm/test_vit@{path}", reading=Reading(model_args={"img_size": [32, 64], "global_pool": "avg"})
    )
    assert torch.equal(model(images), expected(images))


def test_heads_of_another_width_are_asked_for(tmp_path):
    torch.save(made(**TINY).state_dict(), tmp_path / "best.pth")
    with pytest.raises(ModelError, match="don't say num_heads"):
        load_model(f"timm/test_vit@{tmp_path / 'best.pth'}")
    model, _ = load_model(f"timm/test_vit@{tmp_path / 'best.pth'}", reading=Reading(model_args={"num_heads": 2}))
    assert_same(model, made(**TINY))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"imgsize": 32}, "VisionTransformer takes no 'imgsize'; did you mean 'img_size'"),
        ({"zzz": 32}, "takes no 'zzz'; it takes img_size, patch_size"),
        ({"checkpoint_path": "/x"}, "takes no 'checkpoint_path'"),
        ({"img_size": "wide"}, "timm can't build test_vit with img_size='wide'"),
        ({"img_size": 320}, "weights for 10 x 10 patches or pixels would be resampled"),
        ({"depth": 3}, r"blocks\.3\.norm1\.weight is not known"),
        ({"num_classes": 3}, r"head\.weight is \(1000, 64\) in the checkpoint and \(3, 64\) in the architecture"),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_resampled(tmp_path, arguments, words):
    torch.save(made().state_dict(), tmp_path / "best.pth")
    source = f"timm/test_vit@{tmp_path / 'best.pth'}"
    for job in (vitrim.compress, vitrim.prune_checkpoint):
        with pytest.raises(VitrimError, match=words) as caught:
            job(source, out=tmp_path / "out", model_args=arguments, mlp_ratio=1, quiet=True)
        one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]


@pytest.mark.parametrize(("place", "words"), [("", "holds no weights"), ("/dev/zero", "is no regular file")])
def test_inspect_does_not_pass_over_a_place_without_weights(tmp_path, place, words):
    with pytest.raises(VitrimError, match=words):
        vitrim.inspect(f"timm/test_vit@{place or tmp_path}")


def test_arguments_for_a_model_that_says_them_itself_are_refused():
    for source in (made(), "timm/test_vit", "torchvision/vit_b_16"):
        with pytest.raises(ModelError, match="takes no model_args"):
            vitrim.inspect(source, model_args={"depth": 2})


@pytest.mark.fresh
def test_the_result_of_inferred_arguments_loads_with_stock_timm(tmp_path, capsys):
    expected = made(img_size=96, depth=2, reg_tokens=4, global_pool="avg", num_classes=7)
    torch.save({"state_dict": expected.state_dict()}, tmp_path / "best.pth")
    out = tmp_path / "out"
    source = f"timm/test_vit@{tmp_path / 'best.pth'}"
    command = ["compress", source, "--out", str(out), "--method", "magnitude", "--mlp-ratio", "1", "--weights", "raw"]
    assert run([*command, "--model-arg", "global_pool=avg", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["stock"] and any("img_size=96, " in note or "img_size=96" in note for note in said["notes"])
    stock = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(stock(images), vitrim.load(out)(images))
    assert stock.num_prefix_tokens == 5 and stock.global_pool == "avg"
    recipe = vitrim.Recipe.load(out / "recipe.yaml")
    assert recipe.model_args == {"global_pool": "avg"} and recipe.weights == "raw"
