"""What an output says of itself is what its original says: preprocessing, labels, tag and licence, by every writer."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitrim
from tests.support.checkpoints import OPEN_CLIP, VIT, shaken
from tests.support.pairs import TEXT, VISION, tokenizer
from vitrim.config.yaml_files import read_yaml
from vitrim.errors import OutputError
from vitrim.models.load import backend_of, load_model
from vitrim.output.save import save
from vitrim.output.verify import verify
from vitrim.surgery import Plan

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
SHARED = Path(__file__).resolve().parents[2] / "shared"
LABELS = ["a", "b", "c", "d", "e"]
SHOWN = {
    "input_size": [3, 32, 32],
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 0.6,
    "crop_mode": "border",
    "mean": [0.11, 0.22, 0.33],
    "std": [0.9, 0.8, 0.7],
    "num_classes": 5,
    "label_names": LABELS,
    "label_descriptions": {"a": "the first"},
    "tag": "mine_in_my_garden",
    "license": "cc-by-nc-4.0",
    "notes": ["grown outdoors"],
}
OF_OPEN_CLIP = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.9, 0.8, 0.7],
    "interpolation": "random",
    "resize_mode": "longest",
    "fill_color": 77,
}
PROCESSOR = {"size": {"shortest_edge": 40}, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.9] * 3}
CARD = "---\nlicense: cc-by-nc-4.0\n---\n# Mine\n"


def write_timm(folder: Path) -> None:
    model = shaken(lambda: timm.create_model("vit_tiny_patch16_224", **VIT))
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": VIT, "pretrained_cfg": SHOWN}
    (folder / "config.json").write_text(json.dumps({**config, "made_by": "a friend"}))
    save_file(model.state_dict(), folder / "model.safetensors")


def write_clip(folder: Path) -> None:
    model = shaken(
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24, made_by="a friend")
        )
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    transformers.CLIPImageProcessor(**PROCESSOR, resample=2).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


def write_classifier(folder: Path) -> None:
    labels = dict(enumerate(LABELS))
    config = transformers.ViTConfig(**VISION, id2label=labels, label2id={v: k for k, v in labels.items()})
    shaken(lambda: transformers.ViTForImageClassification(config)).save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.9] * 3, resample=0
    ).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


def write_open_clip(folder: Path) -> None:
    said = {"model_cfg": {**OPEN_CLIP, "text_cfg": {**OPEN_CLIP["text_cfg"], "vocab_size": 49408}}}
    said |= {"preprocess_cfg": OF_OPEN_CLIP, "made_by": "a friend"}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    model = shaken(lambda: open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "README.md").write_text(CARD)


WRITTEN = {"timm": write_timm, "transformers": write_clip, "labels": write_classifier, "open_clip": write_open_clip}


@pytest.fixture(scope="module")
def source(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    WRITTEN[request.param](folder)
    return request.param, folder


def by_timm(folder):
    """Everything that timm reads of a folder, but for where it is and how."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    left_out = {"file", "source", "architecture", "custom_load", "first_conv", "classifier"}
    said = {key: value for key, value in model.pretrained_cfg.items() if key not in left_out}
    config = json.loads((folder / "config.json").read_text())
    return json.loads(json.dumps({**said, "made_by": config.get("made_by")}))


def by_transformers(folder):
    config = json.loads((folder / "config.json").read_text())
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return {
        "labels": config.get("id2label"),
        "made_by": config.get("made_by"),
        "processor": processor.to_dict(),
        "tokens": (folder / "tokenizer.json").is_file(),
    }


def by_open_clip(folder):
    said = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.create_model(f"local-dir:{folder}")
    return {"made_by": said["made_by"], "said": said["preprocess_cfg"], "used": model.visual.preprocess_cfg}


READ = {"timm": by_timm, "transformers": by_transformers, "labels": by_transformers, "open_clip": by_open_clip}


def pairs():
    noise = torch.rand(12, 32, 32, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    return [
        (Image.fromarray(array), f"a photo of a {word}") for array, word in zip(noise, ["cat", "dog"] * 6, strict=True)
    ]


def written(folder, source, kind):
    """One folder from each writer, and from a second round over what the first wrote."""
    small = folder / "compress"
    vitrim.compress(source, method="magnitude", mlp_ratio=2, out=small, quiet=True)
    vitrim.compress(str(small), method="magnitude", mlp_ratio=1, out=folder / "again", quiet=True)
    vitrim.slice(small, folder / "slice", mlp_ratio=1)
    vitrim.prune_checkpoint(source, folder / "prune", method="magnitude", mlp_ratio=2, quiet=True)
    if kind in ("transformers", "open_clip"):
        for name, model in (("tuned", source), ("tuned again", str(small))):
            vitrim.tune_text(model, pairs(), options={"steps": 1, "batch_size": 4}, out=folder / name, quiet=True)


def assert_card(out):
    """Its licence is the original's, which of some stands in the source's README alone, and it says what was done."""
    metrics = json.loads((out / "metrics.json").read_text())
    _, head, body = (out / "README.md").read_text().split("---\n", 2)
    assert read_yaml(head, where="head")["license"] == "cc-by-nc-4.0" and "`cc-by-nc-4.0`, carried over" in body
    tuned = metrics["text_tuning"]
    assert ("The text tower was tuned" in body) == (tuned is not None)
    assert tuned is None or (f"and is {tuned['best_loss']:.4g}." in body and "was touched" not in body)
    assert ("This is a slice of" in body) == (metrics["sliced_from"] is not None)
    assert ("`magnitude`" in body) == (", made smaller with" in body) == (metrics["method"] == "magnitude")
    assert ("`recipe.yaml`" in body) == (out / "recipe.yaml").is_file()


@pytest.mark.parametrize("source", list(WRITTEN), indirect=True)
def test_every_writer_says_what_the_original_says(source, tmp_path):
    kind, folder = source
    written(tmp_path, str(folder), kind)
    expected = READ[kind](folder)
    for out in tmp_path.iterdir():
        assert READ[kind](out) == expected, out.name
        assert_card(out)


def told_by(kind, folder):
    """What must stand beside an exported file, in the words of the original's own."""
    if kind == "timm":
        shown = {key: SHOWN[key] for key in ("label_names", "label_descriptions", "tag", "license", "notes")}
        keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
        return {**shown, "preprocessing": {key: SHOWN[key] for key in keys}}
    if kind == "open_clip":
        return {"preprocessing": OF_OPEN_CLIP, "license": "cc-by-nc-4.0"}
    labels = {"id2label": {str(place): label for place, label in enumerate(LABELS)}} if kind == "labels" else {}
    said = json.loads((folder / "preprocessor_config.json").read_text())
    return {**labels, "preprocessing": said, "license": "cc-by-nc-4.0"}


@pytest.mark.parametrize("source", list(WRITTEN), indirect=True)
def test_an_exported_file_is_told_what_the_original_says(source, tmp_path):
    kind, folder = source
    vitrim.compress(str(folder), method="magnitude", mlp_ratio=2, out=tmp_path / "small", quiet=True)
    for name, model in (("source", str(folder)), ("small", str(tmp_path / "small"))):
        vitrim.export(model, tmp_path / f"{name}.pt2", to="torch", latency=False)
        said = json.loads((tmp_path / f"{name}.pt2.json").read_text())
        assert (said.pop("model"), said.pop("outputs")) != ("", []) and said == told_by(kind, folder)


def test_a_new_head_is_not_exported_with_the_old_heads_labels(tmp_path):
    write_timm(tmp_path)
    model = load_model(str(tmp_path))[0]
    vitrim.export(model, tmp_path / "old.pt2", to="torch", latency=False)
    model.reset_classifier(3)
    model.num_classes = 5  # as where the head was set by hand
    vitrim.export(model, tmp_path / "new.pt2", to="torch", latency=False)
    old, new = (json.loads((tmp_path / f"{name}.pt2.json").read_text()) for name in ("old", "new"))
    assert old["label_names"] == LABELS and "label_names" not in new
    assert old["preprocessing"] == new["preprocessing"] and new["license"] == SHOWN["license"]


@pytest.mark.parametrize("source", ["timm", "labels"], indirect=True)
def test_a_live_model_keeps_what_its_library_told_it(source, tmp_path):
    kind, folder = source
    vitrim.compress(load_model(str(folder))[0], method="magnitude", mlp_ratio=2, out=tmp_path / "live", quiet=True)
    vitrim.compress(vitrim.load(tmp_path / "live"), method="magnitude", mlp_ratio=2, out=tmp_path / "2", quiet=True)
    expected = {**READ[kind](folder), "made_by": None}  # timm keeps no field that it does not know
    for name in ("live", "2"):
        assert {**READ[kind](tmp_path / name), "made_by": None} == expected


def test_a_file_with_a_name_is_not_given_the_tag_and_licence_of_timms_own_weights(tmp_path):
    model = timm.create_model("test_vit", num_classes=7)
    assert model.pretrained_cfg["license"] and model.pretrained_cfg["tag"]
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    source = f"timm/test_vit@{tmp_path / 'mine.pth'}"
    vitrim.compress(source, method="magnitude", mlp_ratio=1, out=tmp_path / "small", quiet=True)
    vitrim.prune_checkpoint(source, tmp_path / "pruned", method="magnitude", mlp_ratio=1, quiet=True)
    for out in ("small", "pruned"):
        known = json.loads((tmp_path / out / "config.json").read_text())["pretrained_cfg"]
        assert known["crop_pct"] == model.pretrained_cfg["crop_pct"] and not {"license", "tag"} & known.keys()


NOTHING_CUT = Plan(edits=(), method="none")


def saved(folder, source):
    """A model as it was opened, written without a cut, and where it came from."""
    model, origin = load_model(str(source))
    assert save(folder, model, origin=origin, plan=NOTHING_CUT)
    return model, origin, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("source", ["timm", "transformers", "open_clip"], indirect=True)
@pytest.mark.parametrize("change", ["what it says", "what it does"])
def test_a_folder_that_prepares_images_in_another_way_is_noticed(source, tmp_path, change, monkeypatch):
    kind, folder = source
    model, origin, images = saved(tmp_path, folder)
    assert verify(tmp_path, model, images, origin=origin, stock=True) == 0
    file = {"timm": "config.json", "transformers": "preprocessor_config.json", "open_clip": "open_clip_config.json"}
    path = tmp_path / file[kind]
    mean = "[0.11, 0.22, 0.33]" if kind == "timm" else "[0.1, 0.2, 0.3]"
    said = json.dumps(json.loads(path.read_text()))
    assert mean in said
    path.write_text(said.replace(mean, "[0.3, 0.2, 0.1]"))
    if change == "what it does":  # then the file itself must tell
        monkeypatch.setattr(backend_of(origin.library), "says", lambda origin: {})
    words = {"what it says": r"mean is \[0.3, 0.2, 0.1\] there|image_mean is", "what it does": "becomes other pixels"}
    with pytest.raises(OutputError, match=words[change]):
        verify(tmp_path, model, images, origin=origin, stock=True)


@pytest.mark.parametrize("key", ["label_names", "tag", "license"])
@pytest.mark.parametrize("source", ["timm"], indirect=True)
def test_a_folder_with_other_labels_tag_or_licence_is_noticed(source, tmp_path, key):
    model, origin, images = saved(tmp_path, source[1])
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    del said["pretrained_cfg"][key]
    path.write_text(json.dumps(said))
    with pytest.raises(OutputError, match=f"{key} is None there, .* in the original"):
        verify(tmp_path, model, images, origin=origin, stock=True)


@pytest.mark.fresh
@pytest.mark.parametrize("source", ["transformers"], indirect=True)
def test_a_fresh_process_compares_an_image_file(source, tmp_path):
    model, origin, images = saved(tmp_path, source[1])
    assert verify(tmp_path, model, images, origin=origin, stock=True) == 0
    assert verify(tmp_path, model, images, origin=origin, stock=False) == 0
    path = tmp_path / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.1", "0.4"))
    with pytest.raises(OutputError, match="image_mean is"):
        verify(tmp_path, model, images, origin=origin, stock=True)


@pytest.mark.parametrize("where", ["a weight", "an output"])
@pytest.mark.parametrize("source", ["timm"], indirect=True)
def test_a_model_that_is_not_finite_is_said_to_be_with_its_tensor(source, tmp_path, where):
    model, origin, images = saved(tmp_path, source[1])
    with torch.no_grad():
        if where == "a weight":
            model.blocks[1].mlp.fc2.weight[3, 4] = float("nan")
        else:
            model.blocks[1].mlp.fc2.weight.fill_(3e38)
    words = {
        "a weight": r"not finite: blocks.1.mlp.fc2.weight holds 1 NaN or infinite of 4,096 values",
        "an output": "its weights are, but the output of blocks.1.mlp.fc2 is not",
    }
    with pytest.raises(OutputError, match=words[where]):
        verify(tmp_path, model, images, origin=origin, stock=True)


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "models/cifar10-vit").exists(), reason="../shared holds no CIFAR-10 ViT here")
def test_a_real_vit_scores_the_same_by_every_writer(tmp_path):
    source, test = str(SHARED / "models/cifar10-vit"), SHARED / "data/cifar10/test.parquet"
    vitrim.compress(source, method="magnitude", keep_ratio=0.75, out=tmp_path / "compress", quiet=True)
    vitrim.prune_checkpoint(source, tmp_path / "prune", method="magnitude", keep_ratio=0.75, quiet=True)
    vitrim.compress(source, method="magnitude", keep_ratio=1, out=tmp_path / "whole", quiet=True)
    vitrim.slice(tmp_path / "whole", tmp_path / "slice", mlp_ratio=3)
    scores = {}
    for name in ("compress", "prune", "slice"):
        found = vitrim.evaluate(str(tmp_path / name), source, test, limit=100, latency=False)
        scores[name] = found.student.scores["top1"]
        known = json.loads((tmp_path / name / "config.json").read_text())["pretrained_cfg"]
        assert known["mean"] == [0.4914, 0.4822, 0.4465] and known["label_names"][0] == "airplane"
        assert not {"tag", "license"} & known.keys()
    assert scores["compress"] == scores["prune"]
