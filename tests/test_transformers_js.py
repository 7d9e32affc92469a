"""The folder for Transformers.js: its files, their names, and what is refused. Transformers.js itself does not run."""

from __future__ import annotations

import json

import onnxruntime
import pytest
import torch
import transformers

import vitrim
from tests.support.family import randomised
from vitrim.cli.app import run
from vitrim.errors import ModelError, OutputError, RecipeError

CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture
def source(tmp_path):
    """A ViT of transformers with five named classes, cut to half, with its processor."""
    names = ["cat", "dog", "emu", "fox", "gnu"]
    config = transformers.ViTConfig(**CONFIG, intermediate_size=64, id2label=dict(enumerate(names)))
    randomised(lambda: transformers.ViTForImageClassification(config)).save_pretrained(tmp_path / "whole")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "whole")
    vitrim.compress(str(tmp_path / "whole"), method="magnitude", keep_ratio=0.5, out=tmp_path / "small", quiet=True)
    return tmp_path / "small"


def outputs(path, images):
    """What a file puts out, by name."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [found.name for found in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"pixel_values": images.numpy()})), strict=True))


def refuses_to_write_over(source, out):
    """What is there stays, and is joined by nothing of another model, though its shapes may be the same."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = transformers.ViTForImageClassification.from_pretrained(source)
    other.classifier.bias.data += 1
    (out.parent / "mine").mkdir()
    for model, folder, precision, words in (
        (str(source), out, "fp32", r"model\.onnx: exists already"),
        (str(source.parent / "whole"), out, "int8", "not this model's folder"),
        (other, out, "int8", "not this model's folder"),
        (str(source), out.parent / "mine", "fp32", "not this model's folder"),
    ):
        with pytest.raises(OutputError, match=words):
            vitrim.export(model, folder, layout="transformers-js", precision=precision, latency=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_holds_config_processor_and_a_file_for_each_precision(source, tmp_path, capsys):
    out = tmp_path / "for-js"
    assert run(["export", str(source), "--out", str(out), "--layout", "transformers-js"]) == 0
    assert 'dtype: "fp32"' in capsys.readouterr().out
    first = {path.name for path in out.rglob("*") if path.is_file()}
    assert first == {"config.json", "preprocessor_config.json", "model.onnx"}
    refuses_to_write_over(source, out)
    for precision in ("fp16", "int8"):
        found = vitrim.export(str(source), out, layout="transformers-js", precision=precision, latency=False)
        assert found.path.is_file() and found.outputs == ("logits",)
    assert {path.name for path in (out / "onnx").iterdir()} == {"model.onnx", "model_fp16.onnx", "model_quantized.onnx"}
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "vit" and config["architectures"] == ["ViTForImageClassification"]
    assert config["id2label"]["3"] == "fox" and config["intermediate_size"] == 32
    images = torch.randn(3, 3, 32, 32)
    model = transformers.AutoModelForImageClassification.from_pretrained(source)
    with torch.no_grad():
        wanted = model(images).logits
    for name, atol in (("model.onnx", 1e-5), ("model_fp16.onnx", 0.02), ("model_quantized.onnx", 0.25)):
        torch.testing.assert_close(
            outputs(out / "onnx" / name, images)["logits"], wanted, atol=atol * float(wanted.abs().max()), rtol=0
        )


def test_outputs_have_the_names_of_transformers(tmp_path):
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**CONFIG, mlp_ratio=2)).eval()
    found = vitrim.export(model, tmp_path / "js", layout="transformers-js", latency=False)
    assert found.outputs == ("last_hidden_state", "pooler_output")
    images = torch.randn(2, 3, 32, 32)
    got = outputs(found.path, images)
    with torch.no_grad():
        wanted = model(images)
    for name in found.outputs:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"layout": "web"}, RecipeError, "'web' is not known"),
        ({"to": "torch"}, RecipeError, "is of ONNX files, not of torch"),
        ({"tokens": True}, RecipeError, "puts out what transformers does"),
        ({"out": "js.onnx"}, OutputError, "is a folder"),
        ({"out": "gone/js"}, OutputError, "can't be written"),
        ({"model": "timm-vit"}, ModelError, "is of timm, and Transformers.js"),
        ({"model": "hf-bert"}, ModelError, "is a text encoder"),
    ],
)
def test_what_it_can_not_be_is_one_line_and_nothing_is_written(build, tmp_path, given, error, words):
    asked = {"model": "hf-vit", "out": "js", "layout": "transformers-js", "latency": False, **given}
    model, out = build(asked.pop("model")).model, asked.pop("out")
    with pytest.raises(error, match=words):
        vitrim.export(model, tmp_path / out, **asked)
    assert list(tmp_path.iterdir()) == []
