"""Weights as training leaves them: nests, wrappers, averages, arguments, and what only the tensors tell."""

import argparse
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import vitrim
from tests.support.timm_files import assert_same, made, one_line
from vitrim.errors import CheckpointError, VitrimError
from vitrim.models.load import load_model
from vitrim.models.origin import Reading


@pytest.fixture(scope="module")
def trained():
    return made(num_classes=7, img_size=32, depth=2)


@pytest.fixture(scope="module")
def averaged():
    return made(1, num_classes=7, img_size=32, depth=2)


def under(prefix, model):
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


# Nests, wrappers and prefixes


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
NESTS = {
    "ddp": lambda m: under("module.", m),
    "compiled": lambda m: {"model": under("_orig_mod.", m)},
    "ddp of compiled": lambda m: {"state_dict": under("module._orig_mod.", m)},
    "compiled of ddp": lambda m: {"model_state": under("_orig_mod.module.", m), "optimizer": OPTIMIZER},
    "compiled blocks": lambda m: {
        n.replace("blocks.", "blocks.", 1).replace(".attn.", "._orig_mod.attn."): t for n, t in m.state_dict().items()
    },
    "fsdp": lambda m: under("_fsdp_wrapped_module.", m),
    "two nests": lambda m: {"model": {"state_dict": m.state_dict()}, "epoch": 3},
    "backbone": lambda m: {"model": under("backbone.", m)},
    "encoder in lightning": lambda m: {"state_dict": under("model.encoder.", m), "hyper_parameters": {"lr": 0.1}},
    "lightning": lambda m: {"state_dict": under("net.", m), "pytorch-lightning_version": "2.5"},
    "lightning, compiled": lambda m: {"state_dict": under("model._orig_mod.", m)},
    "student alone": lambda m: {"student": under("module.backbone.", m)},
    "a loss beside it": lambda m: {"state_dict": {**under("model.", m), "loss.weight": torch.ones(2)}},
    "averaged alone": lambda m: {"model_ema": under("module.", m)},
    "averaged model of torch": lambda m: {**under("module.", m), "n_averaged": torch.tensor(3)},
}


@pytest.mark.parametrize("nest", NESTS)
def test_what_training_puts_around_weights_is_taken_off(trained, tmp_path, nest):
    torch.save(NESTS[nest](trained), tmp_path / "last.pth")
    model, _ = load_model(f"timm/test_vit@{tmp_path / 'last.pth'}")
    assert_same(model, trained)


def test_what_is_left_out_is_said(trained, tmp_path):
    torch.save(NESTS["a loss beside it"](trained), tmp_path / "last.pth")
    _, origin = load_model(f"timm/test_vit@{tmp_path / 'last.pth'}")
    assert any("1 other tensors (loss.weight, ...) were not" in note for note in origin.notes)


BESIDE = {
    "timm": lambda raw, ema: {"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict()},
    "deit": lambda raw, ema: {"model": raw.state_dict(), "model_ema": ema.state_dict()},
    "nested": lambda raw, ema: {"model": raw.state_dict(), "ema": {"decay": 0.9, "state_dict": under("module.", ema)}},
    "dino": lambda raw, ema: {"student": under("module.backbone.", raw), "teacher": under("backbone.", ema)},
    "dinov2": lambda raw, ema: {"model": {**under("student.backbone.", raw), **under("teacher.backbone.", ema)}},
    "lightning": lambda raw, ema: {"state_dict": {**under("model.", raw), **under("ema_model.", ema)}},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_averaged_weights_are_preferred_and_raw_ones_can_be_asked_for(trained, averaged, tmp_path, beside):
    torch.save(BESIDE[beside](trained, averaged), tmp_path / "last.pth")
    source = f"timm/test_vit@{tmp_path / 'last.pth'}"
    model, origin = load_model(source)
    assert_same(model, averaged)
    assert any(word in " ".join(origin.notes) for word in ("averaged", "was taken"))
    model, _ = load_model(source, reading=Reading(weights="raw"))
    assert_same(model, trained)


def test_raw_weights_that_are_not_there_are_refused(averaged, tmp_path):
    torch.save({"model_ema": averaged.state_dict()}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match="averaged weights alone") as caught:
        load_model(f"timm/test_vit@{tmp_path / 'last.pth'}", reading=Reading(weights="raw"))
    one_line(caught)


class Config:
    """A class of the training code."""


def test_plain_objects_in_a_checkpoint_are_read_and_others_are_named(trained, tmp_path):
    plain = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs") / "a", data=pathlib.Path("x")),
        "best": np.float64(3.5),
        "rng": np.random.RandomState(0).get_state(),
        "metrics": {"top1": np.float32(1)},
    }
    torch.save({"model": trained.state_dict(), **plain}, tmp_path / "last.pth")
    assert_same(load_model(f"timm/test_vit@{tmp_path / 'last.pth'}")[0], trained)
    torch.save({"model": trained.state_dict(), "cfg": Config()}, tmp_path / "last.pth")
    with pytest.raises(
        CheckpointError, match=r"holds a tests\.test_training_files\.Config, and nothing but plain"
    ) as caught:
        load_model(f"timm/test_vit@{tmp_path / 'last.pth'}")
    assert "save its weights alone" in one_line(caught)


def test_every_job_reads_a_training_checkpoint_the_same(trained, averaged, tmp_path):
    nested = {"state_dict": under("module._orig_mod.", trained), "state_dict_ema": under("module.", averaged)}
    torch.save(nested, tmp_path / "last.pth")
    source = f"timm/test_vit@{tmp_path / 'last.pth'}"
    done = {"method": "magnitude", "mlp_ratio": 1, "quiet": True}
    for weights, expected in (("auto", averaged), ("raw", trained)):
        cut = vitrim.compress(source, weights=weights, **done)
        direct = vitrim.compress(expected, **done)
        assert_same(cut.model, direct.model)
        out = tmp_path / weights
        pruned = vitrim.prune_checkpoint(source, out, weights=weights, **done)
        assert_same(vitrim.load(out), direct.model)
        assert_same(timm.create_model(f"local-dir:{out}", pretrained=True), direct.model)
        if weights == "auto":
            assert any("state_dict_ema" in note for note in cut.metrics.notes)
            assert any("state_dict_ema" in note for note in pruned.metrics.notes)
    found = vitrim.evaluate(source, averaged, torch.randn(4, 3, 32, 32), latency=False)
    assert found.fidelity["relative_error"] == 0
    assert any("state_dict_ema" in note for note in vitrim.inspect(source).notes)


# Files that do not fit


def test_the_first_tensors_that_do_not_fit_are_named_with_both_shapes(trained, tmp_path):
    state = trained.state_dict()
    wrong = {name: tensor[:-1] if "fc1" in name else tensor for name, tensor in state.items()}
    torch.save(wrong, tmp_path / "best.pth")
    with pytest.raises(VitrimError) as caught:
        load_model(f"timm/test_vit@{tmp_path / 'best.pth'}")
    said = one_line(caught)
    assert "fc2.weight is (64, 192) in the checkpoint and (64, 191) in the architecture" in said
    assert "Error(s) in loading" not in said


def test_an_output_with_tensors_of_other_shapes_names_them(trained, tmp_path):
    vitrim.prune_checkpoint(_folder(tmp_path / "in", trained), tmp_path / "out", mlp_ratio=1, quiet=True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**tensors, "norm.weight": torch.ones(3)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight is \(3,\) in the checkpoint and \(64,\)") as caught:
        vitrim.load(tmp_path / "out")
    one_line(caught)


# Paths


@pytest.mark.parametrize("name", ["run:3/last.pth", "C:/last.pth", "my runs/é ü.pth", "a@b/c@1.pth", "#1?x/last.pth"])
def test_any_path_is_read(trained, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / name
    path.parent.mkdir()
    torch.save(trained.state_dict(), path)
    assert_same(load_model(f"timm/test_vit@{path}")[0], trained)
    assert_same(load_model(f"timm/test_vit@~/{name}")[0], trained)
    folder = _folder(path.parent / "model", trained)
    for source in (folder, f"local-dir:{folder}", f"timm/local-dir:{folder}", folder.replace(str(tmp_path), "~")):
        assert_same(load_model(source)[0], trained)
    vitrim.prune_checkpoint(folder.replace(str(tmp_path), "~"), tmp_path / "out2", mlp_ratio=1, quiet=True)


# Folders


def _folder(folder, model):
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return str(folder)


def _sharded(folder, stem="model", suffix=".safetensors"):
    """Write a folder's weights in two files with an index."""
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    file.unlink()
    names, weight_map = sorted(state), {}
    for index, part in enumerate((names[::2], names[1::2])):
        name = f"{stem}-{index + 1:05d}-of-00002{suffix}"
        if suffix == ".safetensors":
            save_file({each: state[each] for each in part}, folder / name)
        else:
            torch.save({each: state[each] for each in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _as_torch(name, prefix=""):
    def rewrite(folder):
        file = next(folder.glob("*.safetensors"))
        torch.save({"model": {f"{prefix}{n}": t for n, t in load_file(file).items()}, "epoch": 1}, folder / name)
        file.unlink()

    return rewrite


LAYOUTS = {
    "shards": _sharded,
    "bin": _as_torch("pytorch_model.bin"),
    "pth": _as_torch("weights.pth"),
    "training": _as_torch("model.pth", "module._orig_mod."),
    "bin shards": lambda folder: _sharded(folder, "pytorch_model", ".bin"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, trained):
    """One folder for each library, and a model that it holds."""
    transformers, open_clip = pytest.importorskip("transformers"), pytest.importorskip("open_clip")
    root = tmp_path_factory.mktemp("folders")
    _folder(root / "timm", trained)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(root / "transformers")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0}
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    said = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (root / "open_clip").mkdir()
    (root / "open_clip" / "open_clip_config.json").write_text(json.dumps(said))
    pair = open_clip.create_model(f"local-dir:{root / 'open_clip'}")
    save_file(pair.state_dict(), root / "open_clip" / "open_clip_model.safetensors")
    return {name: (root / name, load_model(str(root / name))[0]) for name in ("timm", "transformers", "open_clip")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("library", ["timm", "transformers", "open_clip"])
def test_a_folder_loads_in_every_layout_for_every_job(folders, tmp_path, library, layout):
    source, expected = folders[library]
    shutil.copytree(source, tmp_path / "in")
    LAYOUTS[layout](tmp_path / "in")
    assert_same(load_model(str(tmp_path / "in"))[0], expected)
    vitrim.prune_checkpoint(tmp_path / "in", tmp_path / "out", mlp_ratio=1, quiet=True)
    pruned = vitrim.load(tmp_path / "out")
    assert pruned.state_dict().keys() == expected.state_dict().keys()


# What is no plain file of plain weights


def _int8(state):
    name = "blocks.0.mlp.fc1.weight"
    return {**state, name: state[name].to(torch.int8), "blocks.0.mlp.fc1.SCB": torch.ones(192)}


def _fp8(state):
    name = "blocks.0.mlp.fc1.weight"
    return {**state, name: state[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def _packed(state):
    name = "blocks.0.mlp.fc1.weight"
    packed = {"blocks.0.mlp.fc1.qweight": torch.ones(8, 192, dtype=torch.int32)}
    return {**{n: t for n, t in state.items() if n != name}, **packed}


@pytest.mark.parametrize("quantize", [_int8, _fp8, _packed])
def test_quantized_weights_are_refused_before_anything_is_written(trained, tmp_path, quantize):
    save_file(quantize(trained.state_dict()), tmp_path / "q.safetensors")
    folder = pathlib.Path(_folder(tmp_path / "in", trained))
    shutil.copy(tmp_path / "q.safetensors", folder / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    for source in (f"timm/test_vit@{tmp_path / 'q.safetensors'}", str(folder)):
        for job in (vitrim.compress, vitrim.prune_checkpoint):
            with pytest.raises(CheckpointError, match=r"fc1\.q?weight is quantized") as caught:
                job(source, out=tmp_path / "out", mlp_ratio=1, quiet=True)
            one_line(caught)
    assert sorted(tmp_path.rglob("*")) == before


def test_quantized_folders_of_transformers_are_refused(folders, tmp_path):
    shutil.copytree(folders["transformers"][0], tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    for job in (vitrim.compress, vitrim.prune_checkpoint):
        with pytest.raises(VitrimError, match="its weights are quantized") as caught:
            job(str(tmp_path / "in"), out=tmp_path / "out", mlp_ratio=1, quiet=True)
        one_line(caught)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "x.pth"])
def test_only_regular_files_are_opened(trained, tmp_path, name):
    folder = pathlib.Path(_folder(tmp_path / "in", trained))
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)
    for source in (f"timm/test_vit@{folder / name}", f"timm/test_vit@{folder}", str(folder)):
        for job in (vitrim.compress, vitrim.prune_checkpoint):
            with pytest.raises(VitrimError, match=r"no regular file|no weights") as caught:
                job(source, out=tmp_path / "out", mlp_ratio=1, quiet=True)
            one_line(caught)
    with pytest.raises(VitrimError, match="no regular file"):
        load_model("timm/test_vit@/dev/zero")
