"""The modeling file: with it transformers alone loads widths that no config can say, where vitrim can't be imported."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
import transformers

import vitrim
from tests.support.families import FAMILIES, HF_VIT, randomised
from tests.support.models import timm_vit
from vitrim.errors import MissingExtraError, ModelError, RecipeError
from vitrim.models.attention import find_attentions
from vitrim.models.features import first_tensor
from vitrim.models.remote_code import FILE, KEY, RELOAD, write_remote_code
from vitrim.models.sites import find_mlps
from vitrim.output import save
from vitrim.surgery import KeepHeadDims, KeepHeads, KeepPaddedDims, KeepUnits, Plan, apply_

VIT = "transformers: ViT: `ViTModel`"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
UNEVEN = {"method": "magnitude", "keep_ratio": 0.5, "remote_code": True, "quiet": True}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """transformers copies modeling files into a cache of its own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def source(name, folder):
    """The folder of a family's tiny model."""
    folder.mkdir()
    FAMILIES[name].build(folder)
    return folder


def reload(folder):
    """A folder by transformers, as the check and the card do it; of a model of timm its own module."""
    names = {"folder": str(folder)}
    exec(RELOAD, names)
    return names["model"].eval()


def output(model, inputs, encoder=""):
    with torch.no_grad():
        return first_tensor(model.get_submodule(encoder)(inputs))


def cut(name, folder):
    """A family's tiny model with another width in each MLP, whole; how it is built; and the plan."""
    model, origin = FAMILIES[name].build(source(name, folder / "big"))
    sites = [site.below(origin.encoder) for site in find_mlps(model.get_submodule(origin.encoder))]
    edits = tuple(KeepUnits.first(site, site.d_hidden // 2 - number) for number, site in enumerate(sites))
    apply_(model, edits)
    return model, origin, Plan(edits=edits, method="first")


@pytest.mark.fresh
@pytest.mark.parametrize("name", [VIT, "timm: EVA-02 B, L"])
def test_a_fresh_process_loads_it_without_vitrim(tmp_path, name):
    model, origin, plan = cut(name, tmp_path)
    (tmp_path / "out").mkdir()
    known = {"origin": origin, "plan": plan, "inputs": FAMILIES[name].inputs}
    saved = save.save_checked(tmp_path / "out", model, remote_code=True, **known)
    assert saved.remote_code and not saved.stock and saved.difference <= 1e-6 and saved.notes == ()


@pytest.mark.parametrize(
    "name",
    [
        VIT,
        "transformers: DINOv2-g: `Dinov2Model`",
        "transformers: SigLIP image tower: `SiglipVisionModel`",
        "transformers: CLIP tower inside a VLM: `LlavaForConditionalGeneration`",
        "transformers: Swin: `SwinModel`",
        "timm: EVA-02 B, L",
        "timm: DINOv2-g",
    ],
)
def test_any_width_of_any_mlp(tmp_path, name):
    """Plain, gated in one matrix and in two, with a norm over the hidden units, and in the tower of a whole VLM."""
    (model, origin, plan), inputs = cut(name, tmp_path), FAMILIES[name].inputs
    (tmp_path / "out").mkdir()
    assert not save.save(tmp_path / "out", model, origin=origin, plan=plan, remote_code=True)
    expected = output(model.eval(), inputs, origin.encoder)
    for loaded in (reload(tmp_path / "out"), vitrim.load(tmp_path / "out")):
        assert torch.equal(output(loaded, inputs, origin.encoder), expected)


@pytest.mark.fresh
def test_mlps_of_convolutions(tmp_path):
    sizes = {"depths": (1, 1, 1, 1), "dims": (16, 24, 24, 16), "conv_mlp": True, "num_classes": 5}
    big = randomised(lambda: timm.create_model("convnext_atto", **sizes)).eval()
    out = tmp_path / "out"
    result = vitrim.compress(big, out=out, **UNEVEN)
    config = json.loads((out / "config.json").read_text())
    assert {"out_channels", "in_channels"} == {side for sizes in config[KEY].values() for side in sizes}
    assert torch.equal(output(reload(out), IMAGES), output(vitrim.load(out), IMAGES))
    assert result.metrics.remote_code and result.metrics.reload_difference <= 1e-6


@pytest.mark.parametrize("name", ["timm: ViT", VIT, "transformers: DINOv3 S, B, L: `DINOv3ViTModel`"])
def test_heads(tmp_path, name):
    """Whole heads and narrower ones; where positions are rotated (DINOv3), what is gone is padded with zeros."""
    model, origin = FAMILIES[name].build(source(name, tmp_path / "big"))
    first, second = (replace(site, as_tuple="transformers" in name) for site in find_attentions(model))
    dims = [(tuple(range(count)),) * second.num_heads for count in (3, 2)]
    slim = [KeepHeads(site=first, keep=(1,)), KeepHeadDims(site=second, keep_qk=dims[0], keep_v=dims[1])]
    padded = [KeepPaddedDims(site=site, num_qk=6, num_v=5) for site in (first, second)]
    [mlp, _] = find_mlps(model)
    edits = (*(padded if "DINOv3" in name else slim), KeepUnits.first(mlp, 40))
    apply_(model, edits)
    (tmp_path / "out").mkdir()
    assert not save.save(tmp_path / "out", model, origin=origin, plan=Plan(edits=edits, method="x"), remote_code=True)
    expected = output(model.eval(), IMAGES)
    for loaded in (reload(tmp_path / "out"), vitrim.load(tmp_path / "out")):
        assert torch.equal(output(loaded, IMAGES), expected)
    is_clean(tmp_path / "out" / FILE)


def is_clean(code):
    """A file is formatted, and ruff finds nothing in it."""
    for check in (["check", "--select", "E,F,I,B,UP,D,RUF", "--ignore", "D107,D203,D213,D413"], ["format", "--check"]):
        options = ["--isolated", "--no-cache", "--line-length", "120"]
        done = subprocess.run([sys.executable, "-m", "ruff", *check, *options, code], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A ViT with a head, in bfloat16, cut in one block; and its folder."""
    folder = tmp_path_factory.mktemp("classifier")
    config = transformers.ViTConfig(**{**HF_VIT, "num_labels": 5})
    big = randomised(lambda: transformers.ViTForImageClassification(config)).bfloat16()
    return vitrim.compress(big, scope="layers.1", out=folder / "out", **UNEVEN)


def test_a_task_head_is_found_by_its_own_auto_class(classifier):
    line = f'transformers.AutoModel.from_pretrained("{classifier.out}", trust_remote_code=True)'
    assert classifier.metrics.remote_code and classifier.metrics.loads_with == line
    assert classifier.metrics.reload_difference <= 1e-6
    for auto in (transformers.AutoModel, transformers.AutoModelForImageClassification):
        model = auto.from_pretrained(classifier.out, trust_remote_code=True).eval()
        assert model.dtype == torch.bfloat16 and model.config.num_labels == 5
        assert torch.equal(output(model, IMAGES.bfloat16()), output(classifier.model.eval(), IMAGES.bfloat16()))


def test_the_model_is_saved_and_loaded_again_by_transformers(classifier, tmp_path):
    reload(classifier.out).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config[KEY] == json.loads((classifier.out / "config.json").read_text())[KEY]
    again = reload(tmp_path / "again")
    with pytest.raises(ModelError, match=r"modeling file beside it.*download the folder that vitrim wrote"):
        vitrim.inspect(str(tmp_path / "again"))
    assert torch.equal(output(again, IMAGES.bfloat16()), output(classifier.model.eval(), IMAGES.bfloat16()))


def test_a_device_map_and_a_fresh_model_of_the_config(classifier):
    """The first is built on the meta device; the second has random weights, none of them left uninitialised."""
    AutoModel = transformers.AutoModel
    placed = AutoModel.from_pretrained(classifier.out, trust_remote_code=True, device_map="cpu", dtype=torch.float32)
    expected = output(classifier.model.float().eval(), IMAGES)
    assert torch.equal(output(placed.eval(), IMAGES), expected)
    config = transformers.AutoConfig.from_pretrained(classifier.out)
    torch.manual_seed(0)
    fresh = AutoModel.from_config(config, trust_remote_code=True)
    assert {name: p.shape for name, p in fresh.named_parameters()} == {
        name: p.shape for name, p in classifier.model.named_parameters()
    }
    stds = [p.std() for name, p in fresh.named_parameters() if ".mlp." in name and p.ndim == 2]
    assert all(0.01 < std < 0.03 for std in stds)  # transformers draws them with 0.02


def test_the_files_are_for_people(classifier):
    """The sizes are data of one key; the code is short, formatted and clean, and the card says what it is to run it."""
    config = json.loads((classifier.out / "config.json").read_text())
    path = "vit.layers.1.mlp"
    assert config[KEY] == {f"{path}.fc1": {"out_features": 64}, f"{path}.fc2": {"in_features": 64}}
    assert "per_layer_config" not in config and config["architectures"] == ["PrunedViTForImageClassification"]
    code = classifier.out / FILE
    is_clean(code)
    assert "vitrim" not in {name for name in code.read_text().split() if name.startswith(("import", "from"))}
    card = (classifier.out / "README.md").read_text()
    assert 'transformers.AutoModel.from_pretrained("FOLDER", trust_remote_code=True)' in card
    assert "revision=COMMIT" in card and "library_name: transformers" in card


def test_fewer_blocks_and_uneven_widths(tmp_path):
    steps = [{"method": "replace-me", "keep_ratio": 0.75}, {"method": "magnitude", "widths": {"layers.0.mlp": 40}}]
    config = transformers.ViTConfig(**{**HF_VIT, "num_hidden_layers": 4})
    big = randomised(lambda: transformers.ViTModel(config))
    recipe = {"steps": steps, "remote_code": True}
    result = vitrim.compress(big, recipe=recipe, data=DATA, out=tmp_path / "out", quiet=True)
    loaded = reload(tmp_path / "out")
    assert result.metrics.remote_code and loaded.config.num_hidden_layers == len(loaded.layers) == 3
    assert torch.equal(output(loaded, IMAGES), output(result.model.eval(), IMAGES))


def test_an_output_that_is_cut_again_or_sliced(classifier, tmp_path):
    asked = {**UNEVEN, "keep_ratio": 0.25, "exact": True}
    again = vitrim.compress(str(classifier.out), scope="layers.0", out=tmp_path / "again", **asked)
    assert again.metrics.remote_code and len(json.loads((tmp_path / "again" / "config.json").read_text())[KEY]) == 4
    sliced = vitrim.slice(classifier.out, tmp_path / "sliced", mlp_ratio=1)
    assert sliced.metrics.remote_code
    for result in (again, sliced):
        loaded = output(reload(result.out), IMAGES.bfloat16())
        assert torch.equal(loaded, output(result.model.eval(), IMAGES.bfloat16()))


def test_it_is_off_by_default_and_not_written_where_no_one_needs_it(tmp_path):
    big = str(source(VIT, tmp_path / "big"))
    off = vitrim.compress(big, scope="layers.1", out=tmp_path / "off", **{**UNEVEN, "remote_code": False})
    assert not off.metrics.remote_code and not (off.out / FILE).exists() and not (off.out / "config.json").exists()
    even = vitrim.compress(big, out=tmp_path / "even", **UNEVEN)
    assert even.metrics.stock and not even.metrics.remote_code and not (even.out / FILE).exists()
    assert any(note.startswith("remote_code: not needed, transformers loads") for note in even.metrics.notes)


def test_a_file_that_fails_is_not_left_behind(tmp_path, monkeypatch):
    """Nor is it said that the folder loads by it."""
    monkeypatch.setattr(save, "write_remote_code", broken)
    result = vitrim.compress(str(source(VIT, tmp_path / "big")), scope="layers.1", out=tmp_path / "out", **UNEVEN)
    assert not result.metrics.remote_code and not (result.out / FILE).exists()
    assert result.metrics.loads_with == f'vitrim.load("{result.out}")'
    assert any("the modeling file failed" in note for note in result.metrics.notes)


def broken(student, folder, remote):
    """A file that resizes nothing."""
    write_remote_code(student, folder, remote)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, KEY: {}}))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "low-rank"}, "remote_code: the file has no code for low-rank layers, only for"),
        ({"method": "tome"}, "remote_code: the file has no code for merged tokens, only for"),
    ],
)
def test_what_it_has_no_code_for_is_refused_before_the_first_image(asked, said):
    with pytest.raises(RecipeError, match=said):
        vitrim.compress(timm_vit(), data="no such folder", remote_code=True, quiet=True, **asked)


def test_other_libraries_are_refused_with_what_to_do(tmp_path, monkeypatch):
    open_clip = str(source("open_clip: ViT-B, L, H, g, bigG", tmp_path / "clip"))
    for big, what in (
        (open_clip, "a model of open_clip"),
        (torch.nn.TransformerEncoderLayer(8, 2), "a module that no"),
    ):
        with pytest.raises(RecipeError, match=f"is {what}.*; drop remote_code, the result loads with vitrim.load"):
            vitrim.compress(big, data="no such folder", remote_code=True, quiet=True)
    with pytest.raises(RecipeError, match="remote_code: its file is only written"):
        vitrim.prune_checkpoint(open_clip, tmp_path / "out", recipe={"method": "magnitude", "remote_code": True})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="transformers is not installed"):
        vitrim.compress(timm_vit(), data="no such folder", remote_code=True, quiet=True)
