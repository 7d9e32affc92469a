"""Live models that are no longer as their library built them: said at the start, and written so that they load."""

import copy
import json
import logging

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import vitrim
from tests.support.checkpoints import VISION, VIT, shaken
from vitrim.errors import DataError, ModelError, OutputError
from vitrim.models import from_timm

transformers = pytest.importorskip("transformers")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(change=lambda model: None):
    """A small ViT of timm with labels, changed."""
    model = shaken(lambda: timm.create_model("vit_tiny_patch16_224", **VIT))
    model.pretrained_cfg |= {"num_classes": 5, "label_names": ["a", "b", "c", "d", "e"]}
    change(model)
    return model.eval()


def classifier():
    return shaken(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3)))


def cut(model, out, **given):
    before = copy.deepcopy(model)
    result = vitrim.compress(model, method="magnitude", mlp_ratio=2, out=out, quiet=True, **given)
    return before, result


def new_head(model):
    model.head = nn.Linear(32, 7)


def fewer_blocks(model):
    model.blocks = model.blocks[:2]


def no_head(model):
    model.head = nn.Identity()


@pytest.mark.parametrize("change, words", [
    (new_head, "its head has 7 classes in place of 5"),
    (no_head, "its head has 0 classes in place of 5"),
    (fewer_blocks, "it has 2 blocks in place of 3"),
    (lambda model: (new_head(model), fewer_blocks(model)), "7 classes in place of 5, it has 2 blocks in place of 3"),
])  # fmt: skip
def test_another_head_and_depth_are_recorded(tmp_path, caplog, change, words):
    with caplog.at_level(logging.WARNING, logger="vitrim"):
        _, result = cut(vit(change), tmp_path / "out")
    assert words in caplog.text and any(words in note for note in result.metrics.notes)
    assert result.metrics.stock and result.metrics.reload_difference == 0
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(stock(IMAGES), result.model(IMAGES))
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"].get("label_names")
    assert (labels is None) == ("classes" in words)


def test_swin_with_fewer_blocks_in_a_stage(tmp_path):
    arguments = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
    model = shaken(lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **arguments))
    model.layers[0].blocks = model.layers[0].blocks[:1]
    _, result = cut(model, tmp_path / "out")
    assert result.metrics.stock
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(stock(IMAGES), result.model(IMAGES))


def test_another_head_and_depth_of_transformers_are_recorded(tmp_path):
    model = classifier()
    path = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    holder, _, name = path.rpartition(".")
    setattr(model.get_submodule(holder), name, model.get_submodule(path)[:1])
    model.classifier = nn.Linear(32, 9)
    _, result = cut(model, tmp_path / "out")
    assert result.metrics.stock
    stock = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert stock.config.num_labels == 9 and stock.config.num_hidden_layers == 1
    assert torch.equal(stock(IMAGES).logits, result.model(IMAGES).logits)
    result.model.save_pretrained(tmp_path / "by hand")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "by hand").eval()
    assert torch.equal(again(IMAGES).logits, result.model(IMAGES).logits)


def shared_mlp(model):
    model.blocks[2].mlp = model.blocks[0].mlp


def other_activation(model):
    model.blocks[1].mlp.act = nn.ReLU()


def own_module(model):
    model.extra = nn.Linear(3, 3)


OWNERS = {
    "blocks.0.mlp and blocks.2.mlp are one module": shared_mlp,
    "head.bias is": lambda model: setattr(model, "head", nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 5))),
    "head.parametrizations.weight.original0": lambda model: parametrizations.weight_norm(model.head),
    "extra.weight is (3, 3) and not there": own_module,
    "the same weights give other outputs": other_activation,
}


@pytest.mark.parametrize("words", OWNERS)
def test_what_no_library_can_build_is_said_at_the_start_and_loads_into_the_owners_model(tmp_path, caplog, words):
    model = vit(OWNERS[words])
    with caplog.at_level(logging.WARNING, logger="vitrim"), pytest.raises(DataError):
        vitrim.compress(model, data=tmp_path / "none", method="magnitude", mlp_ratio=2, quiet=True)
    assert words in caplog.text and "vitrim's own format" in caplog.text
    before, result = cut(model, tmp_path / "out")
    assert not result.metrics.stock and "model=..." in result.metrics.loads_with
    assert any(words in note for note in result.metrics.notes)
    assert sum("vitrim.load(path" in note for note in result.metrics.notes) == 1
    assert torch.equal(vitrim.load(tmp_path / "out", model=before)(IMAGES), result.model(IMAGES))


def test_a_model_that_was_cut_in_place_can_be_cut_again(tmp_path):
    model = vit()
    vitrim.prune_(model, "magnitude", mlp_ratio=3)
    _, result = cut(model, tmp_path / "out")
    assert result.metrics.stock and any("3 MLPs are narrower" in note for note in result.metrics.notes)
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(stock(IMAGES), result.model(IMAGES))


def test_a_model_as_it_was_built_gets_no_note(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="vitrim"):
        for model in (vit(), classifier(), vit().bfloat16()):
            assert not vitrim.compress(model, method="magnitude", mlp_ratio=2, quiet=True).metrics.notes
    assert not [record for record in caplog.records if record.name == "vitrim"]


def test_where_the_librarys_format_fails_after_the_run_vitrims_own_is_left(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("Model argument 'x' is not serializable")

    monkeypatch.setattr(from_timm, "write_config", refuse)
    _, result = cut(vit(), tmp_path / "out")
    assert not result.metrics.stock and result.metrics.reload_difference == 0
    assert any("is not serializable" in note and "vitrim's own format" in note for note in result.metrics.notes)
    assert torch.equal(vitrim.load(tmp_path / "out")(IMAGES), result.model(IMAGES))


@pytest.mark.parametrize("write", ["compress", "slice"])
def test_where_nothing_loads_back_weights_and_plan_are_left(tmp_path, monkeypatch, write):
    def refuse(*_, **__):
        raise OutputError("outputs differ by 7")

    before, result = cut(vit(), tmp_path / "first")
    monkeypatch.setattr("vitrim.output.save.verify", refuse)
    if write == "compress":
        before, result = cut(vit(), tmp_path / "out")
    else:
        result = vitrim.slice(tmp_path / "first", tmp_path / "out", mlp_ratio=1)
    assert sum("outputs differ by 7" in note for note in result.metrics.notes) == 2
    assert "model=..." in result.metrics.loads_with
    assert torch.equal(vitrim.load(tmp_path / "out", model=before)(IMAGES), result.model(IMAGES))


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_a_computed_weight_in_an_mlp_is_refused_in_one_line(layer):
    model = vit(lambda model: parametrizations.weight_norm(getattr(model.blocks[1].mlp, layer)))
    with pytest.raises(ModelError, match=rf"blocks.1.mlp.{layer}: .*remove_parametrizations"):
        vitrim.compress(model, method="magnitude", mlp_ratio=2, quiet=True)
