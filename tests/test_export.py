"""Export: every form and every kind of edit gives what PyTorch gives, or says why it can't be had."""

from pathlib import Path

import onnxruntime
import pytest
import torch

from vitrim.cli.app import run
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import ModelError, OutputError, VitrimError
from vitrim.layers.moefication import ExpertMlp
from vitrim.methods import METHODS
from vitrim.output.export import TOLERANCES, export
from vitrim.output.runtimes import RUNTIMES
from vitrim.surgery.edits import KINDS

# Of each kind of edit, the first method that makes one.
METHOD_OF = {name: next(n for n, m in METHODS.items() if kind in m.edits) for name, kind in KINDS.items()}


@pytest.fixture
def cut(build):
    """A student that a method has cut by half."""

    def make(method, case="timm-vit", **options):
        made = build(case)
        student = made.copy()
        budget = {} if METHODS[method].takes == "nothing" else {"keep_ratio": 0.5}
        recipe = Recipe.parse({"method": method, "options": options, "repair": False, **budget})
        report = cut_(student, made.model, made.sites, recipe, made.batches, quiet=True)
        return student, report.plan

    return make


@pytest.mark.parametrize(
    ("to", "precision", "tokens"),
    [
        *((to, "fp32", tokens) for to in ("onnx", "openvino", "torch") for tokens in (False, True)),
        *((to, precision, True) for to in ("onnx", "openvino") for precision in ("fp16", "int8")),
        ("executorch", "fp32", True),
        ("litert", "fp32", True),
        ("litert", "int8", False),
        ("tensorrt", "fp16", True),
    ],
)
def test_every_runtime_gives_what_the_model_gives(cut, tmp_path, to, precision, tokens):
    for package in RUNTIMES[to].needs:
        pytest.importorskip(package)
    student, _ = cut("magnitude")
    path = tmp_path / f"small{RUNTIMES[to].suffix}"
    found = export(student, path, to=to, precision=precision, tokens=tokens, latency=False)
    assert found.outputs == (("pooled", "patches") if tokens else ("output",))
    assert found.differences.keys() == {"noise"} and max(found.differences.values()) <= TOLERANCES[precision]
    assert precision == "fp32" or to == "tensorrt" or min(found.differences.values()) > 1e-6  # it was rounded
    assert (found.opset is not None) == (path.suffix == ".onnx")
    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".json")
    assert (found.next_step or "").startswith("trtexec --onnx=") == (to == "tensorrt")


@pytest.mark.parametrize(("precision", "tokens"), [("fp16", True), ("int8", False)])
def test_core_ml_is_read_back_where_it_can_not_run(cut, tmp_path, capsys, precision, tokens):
    coremltools = pytest.importorskip("coremltools")
    student, _ = cut("magnitude")
    found = export(student, tmp_path / "small.mlpackage", to="coreml", precision=precision, tokens=tokens)
    assert found.differences == {} and found.latency == {} and found.largest_batch == 8
    said = coremltools.models.MLModel(str(found.path), skip_model_load=True).get_spec().description
    assert tuple(output.name for output in said.output) == found.outputs
    assert [taken.name for taken in said.input] == ["images"]
    whole = sum(p.numel() for p in student.parameters())
    assert found.num_bytes < whole * (2 if precision == "fp16" else 1) * 1.3 + 150_000


def test_smaller_numbers_make_smaller_files(cut, tmp_path):
    student, _ = cut("magnitude")
    sizes = [
        export(student, tmp_path / f"{precision}.onnx", precision=precision, latency=False).num_bytes
        for precision in ("fp32", "fp16", "int8")
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("edit", KINDS)
def test_every_kind_of_edit_is_exported_or_says_why_not(cut, tmp_path, edit):
    if edit == "keep_padded_dims":
        pytest.skip("made of attentions that are not plain, which this model has none of")
    parts = {"keep_head_dims": {"parts": "both"}, "keep_heads": {"parts": "both", "heads": "whole"}}
    student, plan = cut(METHOD_OF[edit], **parts.get(edit, {}))
    assert edit in {made.KIND for made in plan.edits}
    path = tmp_path / "small.onnx"
    if any(isinstance(module, ExpertMlp) for module in student.modules()):
        with pytest.raises(ModelError, match=r"blocks\.0\.mlp: which experts a token runs is decided while it runs"):
            export(student, path)
        assert list(tmp_path.iterdir()) == []
        return
    assert export(student, path, latency=False).differences["noise"] <= 1e-4


def test_the_file_alone_gives_what_the_model_gives_for_any_batch(cut, tmp_path):
    student, _ = cut("magnitude", "timm-split")
    export(student, tmp_path / "gated.onnx", latency=False)
    session = onnxruntime.InferenceSession(tmp_path / "gated.onnx")
    for size in (1, 5):
        images = torch.randn(size, 3, 32, 32)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), student.eval()(images), atol=1e-4, rtol=1e-4)


def test_what_puts_out_something_else_is_not_left_behind(cut, tmp_path, monkeypatch):
    monkeypatch.setattr("vitrim.output.export.load", lambda path, to: lambda inputs: (torch.ones(len(inputs), 5),))
    with pytest.raises(OutputError, match="puts out something else than PyTorch"):
        export(cut("magnitude")[0], tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused_before_anything_is_written(cut, tmp_path):
    student, _ = cut("magnitude")
    (tmp_path / "there.onnx").write_text("mine")
    for path, kwargs, said in (
        ("there.onnx", {}, "exists already"),
        ("small.pb", {}, "ends in .onnx"),
        ("nowhere/small.onnx", {}, "can't be written"),
        ("small.onnx", {"to": "tflite"}, "one of onnx, openvino, torch, executorch, coreml, litert, tensorrt"),
        ("small.onnx", {"precision": "fp8"}, "precision: 'fp8' is not known; use one of fp32, fp16, int8"),
        ("small.pt2", {"to": "torch", "precision": "fp16"}, "torch files are fp32; load it and call .half()"),
        ("small.onnx", {"to": "tensorrt", "precision": "int8"}, "tensorrt files are fp32 or fp16; int8 needs"),
        ("small.pt2", {"to": "torch", "opset": 18}, "opset: is of ONNX, and torch files have none"),
        ("small.onnx", {"data": "no-such-folder/"}, "no-such-folder"),
    ):
        with pytest.raises(VitrimError, match=said):
            export(student, tmp_path / path, **kwargs)
    with pytest.raises(ModelError, match="size of its inputs is not known"):
        export(torch.nn.Sequential(torch.nn.Linear(3, 3)), tmp_path / "small.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "mine"


@pytest.mark.parametrize("name", ["small.bin", "small.xml.json"])
def test_what_stands_beside_the_file_is_not_written_over(cut, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name}: exists already"):
        export(cut("magnitude")[0], tmp_path / "small.xml", to="openvino", latency=False)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_the_command_prints_what_was_compared(tmp_path, capsys):
    asset = Path(__file__).parents[1] / "vitrim" / "assets" / "digits-vit"
    command = ["export", str(asset), "--to", "torch", "--out", str(tmp_path / "digits.pt2"), "--data", "digits"]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "on noise" in printed and "on images" in printed and "batch 8" in printed
