"""Getting models: from names, folders, files and the hub's cache, with their preprocessing and their features."""

import json
import pickle
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

import vitrim
from vitrim.data import transform_for
from vitrim.errors import CheckpointError, MissingExtraError, ModelError
from vitrim.models.features import features, final_norm
from vitrim.models.load import load_model, origin_of
from vitrim.models.origin import Origin, crop_pct
from vitrim.models.stock import stock_origin, why_not_stock
from vitrim.models.takes import encoder_path

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 40,
}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing reaches a network; the libraries that ask for a hub answer from its cache alone."""

    def refuse(*_):
        raise OSError("a test asked for the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def shaken(model):
    """Random values everywhere, so that no norm or bias is left at its start."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def hf(name, **config):
    kind = getattr(transformers, f"{name.removesuffix('Model')}Config")
    return shaken(getattr(transformers, name)(kind(**config)))


def write_open_clip(folder, config=OPEN_CLIP, preprocess=None):
    """A folder in open_clip's layout, and its model."""
    folder.mkdir(parents=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3} if preprocess is None else preprocess
    said = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    model = shaken(open_clip.create_model(f"local-dir:{folder}"))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder for each layout, and the model that it holds."""
    root = tmp_path_factory.mktemp("sources")
    models = {
        "timm": shaken(timm.create_model("vit_tiny_patch16_224", **TIMM)),
        "transformers": hf("ViTModel", **VISION),
        "open_clip": write_open_clip(root / "open_clip"),
    }
    timm.models.save_for_hf(models["timm"], str(root / "timm"), model_args=TIMM, safe_serialization=True)
    models["transformers"].save_pretrained(root / "transformers")
    return {name: (root / name, model) for name, model in models.items()}


def assert_equal_states(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


LAYOUTS = {
    "timm": ("{0}", "local-dir:{0}", "timm/local-dir:{0}"),
    "transformers": ("{0}", "local-dir:{0}", "hf/{0}"),
    "open_clip": ("{0}", "local-dir:{0}", "open_clip/{0}"),
}


@pytest.mark.parametrize("library", LAYOUTS)
def test_a_folder_is_known_by_its_layout_and_by_its_prefix(sources, library):
    folder, expected = sources[library]
    for pattern in LAYOUTS[library]:
        source = pattern.format(folder)
        model, origin = load_model(source)
        assert origin.library == library and origin.name == source and not model.training
        assert origin.encoder == ("visual" if library == "open_clip" else "")
        assert_equal_states(model, expected)


@pytest.mark.parametrize("library", LAYOUTS)
def test_without_weights_there_are_none_and_the_rest_is_the_same(sources, tmp_path, library):
    folder, expected = sources[library]
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError):
        load_model(str(tmp_path))
    model, origin = load_model(str(tmp_path), weights=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [(name, p.shape) for name, p in model.named_parameters()] == [
        (name, p.shape) for name, p in expected.named_parameters()
    ]
    assert origin.preprocessing == load_model(str(folder))[1].preprocessing
    assert vitrim.inspect(str(tmp_path)).sites == vitrim.inspect(expected).sites


@pytest.mark.parametrize(
    "source", ["timm/vit_tiny_patch16_224", "open_clip/ViT-B-16-quickgelu/openai", "torchvision/vit_b_16"]
)
def test_an_architecture_by_name_downloads_nothing(source):
    model, origin = load_model(source, weights=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert origin.name == source and origin.preprocessing["input_size"] == [3, 224, 224]


def test_without_a_tag_the_first_that_fits_is_taken():
    for name, tag in (("ViT-B-16", "laion400m_e31"), ("ViT-B-16-quickgelu", "openai"), ("ViT-B-16-SigLIP", "webli")):
        config = open_clip.get_pretrained_cfg(name, tag)
        assert tag in open_clip.list_pretrained_tags_by_model(name)
        _, origin = load_model(f"open_clip/{name}", weights=False)
        assert origin.preprocessing["mean"] == list(config["mean"])
        assert origin.preprocessing["crop_mode"] == {"shortest": "center", "squash": "squash"}[config["resize_mode"]]


# A state dict in a file


WRAPPINGS = {
    "bare.pth": lambda state: state,
    "state.pth": lambda state: {"state_dict": state, "epoch": 3},
    "model.bin": lambda state: {"model": state},
    "parallel.pt": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.fixture(scope="module")
def bare():
    return shaken(timm.create_model("test_vit", num_classes=7))


@pytest.mark.parametrize("file", [*WRAPPINGS, "model.safetensors"])
def test_a_bare_state_dict_with_a_name(bare, tmp_path, file):
    path, state = tmp_path / file, bare.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(WRAPPINGS[file](state), path)
    model, origin = load_model(f"timm/test_vit@{path}")
    assert origin.architecture == "test_vit" and origin.model_args["num_classes"] == 7
    assert_equal_states(model, bare)
    empty, _ = load_model(f"timm/test_vit@{path}", weights=False)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


class Payload:
    """What a malicious pickle does when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_a_payload_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.ones(2)}, "more": Payload(ran)}, tmp_path / "evil.pth")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Payload(ran)))
    for name in ("evil.pth", "evil.bin"):
        with pytest.raises(vitrim.VitrimError) as caught:
            load_model(f"timm/test_vit@{tmp_path / name}")
        assert name in str(caught.value) and "\n" not in str(caught.value) and not ran.exists()


def test_files_that_do_not_fit_are_refused(bare, tmp_path):
    state = bare.state_dict()
    save_file({name: state[name] for name in list(state)[:-3]}, tmp_path / "less.safetensors")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name in ("less.safetensors", "nothing.pth", "noise.safetensors", "absent.pth"):
        with pytest.raises(vitrim.VitrimError, match=name) as caught:
            load_model(f"timm/test_vit@{tmp_path / name}")
        assert "\n" not in str(caught.value)


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub cache; returns a function that puts files of a repository there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, files):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("0" * 40)
        for file in files:
            (snapshot / file.name).write_bytes(file.read_bytes())
        return snapshot

    return add


def test_a_hub_id_is_read_from_its_repository(sources, hub):
    folder, expected = sources["transformers"]
    snapshot = hub("org/name", [folder / "config.json"])
    empty, _ = load_model("hf/org/name", weights=False)  # where the weights were never fetched
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    with pytest.raises(ModelError, match="hf/org/name"):
        load_model("hf/org/name")
    hub("org/name", folder.iterdir())
    model, origin = load_model("hf/org/name")
    assert_equal_states(model, expected)
    assert origin.folder == str(snapshot) and origin.architecture == "ViTModel"


def test_hub_ids_of_timm_and_open_clip(sources, hub):
    for library, source in (("timm", "timm/hf-hub:org/name"), ("open_clip", "open_clip/hf-hub:org/pair")):
        folder, expected = sources[library]
        hub(source.partition(":")[2], folder.iterdir())
        model, origin = load_model(source)
        assert origin.library == library
        assert_equal_states(model, expected)


def test_code_of_a_repository_is_never_trusted(monkeypatch):
    calls = []

    def read_config(*args, **kwargs):
        calls.append((args, kwargs))
        return transformers.ViTConfig(**VISION, architectures=["ViTModel"])

    def read_weights(*args, **kwargs):
        calls.append((args, kwargs))
        return hf("ViTModel", **VISION), {"missing_keys": {"pooler.dense.weight"}}

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", read_config)
    monkeypatch.setattr(transformers.ViTModel, "from_pretrained", read_weights)
    monkeypatch.setattr("vitrim.models.from_transformers._companions_of", lambda source: "/nowhere")
    load_model("hf/org/name")
    assert [args for args, _ in calls] == [("org/name",)] * 2
    assert [kwargs["trust_remote_code"] for _, kwargs in calls] == [False, False]


AUTO_MAP = {"AutoConfig": "configuration_thing.ThingConfig", "AutoModel": "modeling_thing.Thing"}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "thing", "auto_map": AUTO_MAP, "architectures": ["Thing"]},
        {"model_type": "thing", "architectures": ["Thing"]},
        {"model_type": "vit", "auto_map": AUTO_MAP, "architectures": ["Thing"]},
    ],
    ids=["own code", "unknown", "own code for a known type"],
)
def test_code_of_a_folder_is_never_run(sources, tmp_path, config, weights):
    for file in sources["transformers"][0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    known = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**known, **config}))
    for name in ("configuration_thing", "modeling_thing"):
        (tmp_path / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    before = set(sys.modules)
    if config["model_type"] == "vit":  # transformers has code of its own for it
        assert type(load_model(str(tmp_path), weights=weights)[0]) is transformers.ViTModel
    else:
        with pytest.raises(ModelError, match="does not run code from a repository") as caught:
            load_model(str(tmp_path), weights=weights)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not [name for name in set(sys.modules) - before if "thing" in name]


def test_a_model_is_never_filled_up_with_random_weights(sources, tmp_path):
    folder, expected = sources["transformers"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = expected.state_dict()
    for gone, refused in (("pooler", False), ("layers.1", True)):
        save_file({name: t for name, t in state.items() if gone not in name}, tmp_path / "model.safetensors")
        if refused:
            with pytest.raises(ModelError, match=r"no weights for 16 tensors, such as layers\.1"):
                load_model(str(tmp_path))
        else:
            load_model(str(tmp_path))


# Errors


@pytest.mark.parametrize(
    "source, words",
    [
        ("nothing", "use timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME"),
        ("hf/", "no such model"),
        ("local-dir:/nowhere", "no such model"),
        ("timm/vit_tinny_patch16_224", "did you mean 'timm/vit_tiny_patch16_224'"),
        ("open_clip/ViT-B-33", "did you mean 'open_clip/ViT-B-32'"),
        ("open_clip/zzz", "list_models"),
        ("open_clip/ViT-B-16/openai", "to another activation; use open_clip/ViT-B-16-quickgelu/openai"),
        ("open_clip/RN50", "use open_clip/RN50-quickgelu/openai"),
        ("open_clip/ViT-B-16-SigLIP/openai", "no weights 'openai'; it has webli"),
        ("torchvision/vit_b_17", "list_models"),
        ("torchvision/fasterrcnn_resnet50_fpn", "list_models"),
        ("hf/nobody/nothing", "hf/nobody/nothing"),
        ("timm/hf-hub:nobody/nothing", "nobody/nothing"),
        ("open_clip/hf-hub:nobody/nothing", "nobody/nothing"),
    ],
)
def test_unknown_names_are_one_clear_line(hub, source, words):
    with pytest.raises(ModelError) as caught:
        load_model(source)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config, words",
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", "neither model_type"),
        (b"{}", "neither model_type"),
        (b'{"model_type": "vit", "hidden_size": "wide"}', "hidden_size"),
        (b'{"architecture": "no_such_vit"}', "no_such_vit"),
    ],
)
def test_damaged_configs_are_one_clear_line(tmp_path, config, words):
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(str(tmp_path), weights=False)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_one_clear_line(sources, tmp_path):
    for library, weights in (("transformers", "model"), ("timm", "model"), ("open_clip", "open_clip_model")):
        folder = tmp_path / library
        folder.mkdir()
        for file in sources[library][0].glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / f"{weights}.safetensors").write_bytes(b"\x08")
        with pytest.raises(CheckpointError, match=rf"{weights}\.safetensors: truncated or damaged") as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "source", "extra"), [("open_clip", "open_clip", "clip"), ("transformers", "hf", "hf")]
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, package, source, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; pip install 'vitrim\[{extra}\]'"):
        load_model(f"{source}/org/name")


def test_live_modules_that_a_library_can_not_name_are_the_owners():
    model = hf("ViTModel", **VISION)
    assert origin_of(model).library == "transformers" and origin_of(model).preprocessing == {"input_size": [3, 32, 32]}
    for part in (model.encoder if hasattr(model, "encoder") else model.layers, torch.nn.Linear(2, 2)):
        assert origin_of(part).library is None


# Preprocessing: the transform that vitrim builds beside the library's own, on images of several shapes


def picture(width, height):
    """A smooth random image."""
    pixels = np.random.default_rng(width).integers(0, 256, (max(height // 8, 3), max(width // 8, 3), 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(*size) for size in ((64, 64), (90, 50), (45, 70), (20, 15))]
PROCESSORS = {
    "crop": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "bilinear crop": lambda: transformers.BitImageProcessor(
        size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}, resample=2
    ),
    "squash": lambda: transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    "squash, then crop": lambda: transformers.DeiTImageProcessor(
        size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}
    ),
    "bilinear squash": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 48}),
    "rescaled first": lambda: transformers.DINOv3ViTImageProcessor(size={"height": 32, "width": 32}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_transformers_does(tmp_path, name):
    processor = PROCESSORS[name]()
    hf("ViTModel", **VISION).config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    transform = transform_for(load_model(str(tmp_path), weights=False)[1].preprocessing)
    step = 1 / 255 / min(processor.image_std)  # transformers may round a pixel to the next of 256 grey levels
    for image in PICTURES:
        ours, theirs = transform(image), processor(image, return_tensors="pt")["pixel_values"][0]
        assert ours.shape == theirs.shape
        # Measured: at most 1.00 steps, on average 0.12 of one (0.30 where transformers does not round at all).
        assert (ours - theirs).abs().max() <= 1.01 * step and (ours - theirs).abs().mean() <= 0.35 * step


def test_a_processor_without_a_crop_gives_squares_of_the_shorter_side(tmp_path):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    hf("ViTModel", **VISION).config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    known = load_model(str(tmp_path), weights=False)[1].preprocessing
    assert known["crop_pct"] == 1 and known["input_size"] == [3, 32, 32]
    theirs = processor(PICTURES[0], return_tensors="pt")["pixel_values"][0]
    assert (transform_for(known)(PICTURES[0]) - theirs).abs().mean() < 1e-3
    assert transform_for(known)(PICTURES[1]).shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_images_are_prepared_as_open_clip_does(tmp_path, mode, interpolation):
    said = {"mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "resize_mode": mode, "interpolation": interpolation}
    write_open_clip(tmp_path / "source", preprocess={**said, "fill_color": 7})
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'source'}")
    for weights in (True, False):
        ours = transform_for(load_model(str(tmp_path / "source"), weights=weights)[1].preprocessing)
        assert all(torch.equal(ours(image), theirs(image)) for image in PICTURES)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_16", "swin_v2_s"])
def test_images_are_prepared_as_torchvision_does(name):
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    ours = transform_for(load_model(f"torchvision/{name}", weights=False)[1].preprocessing)
    assert all(torch.equal(ours(image), preset(image)) for image in PICTURES)


def test_a_library_without_folders_never_has_a_stock_one():
    """Also for an uncut model: nothing could write a config for it."""
    _, origin = load_model("torchvision/vit_b_16", weights=False)
    assert stock_origin(origin, ()) is None
    assert why_not_stock(origin, ()) == "torchvision reads no folders; the result loads with vitrim.load(path)."


def test_every_crop_survives_the_rounding_of_timm():
    assert crop_pct(224, 256) == 0.875 and crop_pct(32, 32) == 1
    for resized in range(1, 600, 7):
        assert all(int(target / crop_pct(target, resized)) == resized for target in range(1, resized + 1))


# Features: what the library itself hands out


def same(found, pooled, patches):
    torch.testing.assert_close(found.pooled_BD, pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.patches_BND, patches, rtol=1e-5, atol=1e-5)


NO_MLP_WIDTH = {key: value for key, value in VISION.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
HANDED_OUT = {
    # model, tokens in front of the patches, whether `pooler_output` is what is pooled (else the first token)
    "CLIP": (lambda: hf("CLIPVisionModel", **VISION), 1, True),
    "SigLIP": (lambda: hf("SiglipVisionModel", **VISION), 0, True),
    "Dinov2": (lambda: hf("Dinov2Model", **NO_MLP_WIDTH), 1, True),
    "registers": (lambda: hf("Dinov2WithRegistersModel", **NO_MLP_WIDTH, num_register_tokens=3), 4, True),
    "DINOv3": (lambda: hf("DINOv3ViTModel", **VISION, num_register_tokens=2), 3, True),
    "DeiT": (lambda: hf("DeiTModel", **VISION), 2, False),
    "ViT": (lambda: hf("ViTModel", **VISION), 1, False),
    "ViT without pooler": (
        lambda: shaken(transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False)),
        1,
        False,
    ),
    "BERT": (lambda: hf("BertModel", **TEXT), 1, False),
    "CLIP text": (lambda: hf("CLIPTextModel", **TEXT, eos_token_id=98, bos_token_id=97), 1, True),
}


@pytest.mark.parametrize("name", HANDED_OUT)
@torch.inference_mode()
def test_features_are_those_of_transformers(name):
    build, num_prefix, has_pooler = HANDED_OUT[name]
    model = build()
    inputs = IDS if model.main_input_name == "input_ids" else IMAGES
    output = model(inputs)
    tokens = output.last_hidden_state
    found = features(model, inputs)
    same(found, output.pooler_output if has_pooler else tokens[:, 0], tokens[:, num_prefix:])
    if final_norm(model) is not None:
        before, norm = features(model, inputs, at="pre_norm"), final_norm(model)
        assert before.patches_BND.shape == found.patches_BND.shape
        if name == "CLIP":  # its last norm is for the pooled token alone
            same(before, before.pooled_BD, found.patches_BND)
            torch.testing.assert_close(norm(before.pooled_BD), found.pooled_BD)
        else:
            torch.testing.assert_close(norm(before.patches_BND), found.patches_BND)


@torch.inference_mode()
def test_features_of_a_classifier_and_of_a_pair():
    model = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=4)))
    tokens = model.base_model(IMAGES).last_hidden_state
    same(features(model, IMAGES), tokens[:, 0], tokens[:, 1:])
    pair = shaken(transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=TEXT)))
    found = features(pair.get_submodule(encoder_path(pair)), IMAGES)
    theirs = pair.get_image_features(IMAGES)
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    torch.testing.assert_close(pair.visual_projection(found.pooled_BD), theirs)


OPEN_CLIP_TOWERS = {
    "own": OPEN_CLIP["vision_cfg"],
    "pooled by attention": OPEN_CLIP["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2},
    "timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "timm, no projection": {"image_size": 160, "timm_model_name": "test_vit2", "timm_pool": "avg", "timm_proj": "none"},
}


@pytest.mark.parametrize("name", OPEN_CLIP_TOWERS)
@torch.inference_mode()
def test_features_are_those_of_open_clip(tmp_path, name):
    config = OPEN_CLIP | {"vision_cfg": OPEN_CLIP_TOWERS[name], "embed_dim": 64}
    model = write_open_clip(tmp_path / "source", config).eval()
    images = torch.randn(2, 3, *[config["vision_cfg"]["image_size"]] * 2)
    found = features(model.visual, images)
    torch.testing.assert_close(found.pooled_BD, model.encode_image(images, normalize=False))
    if hasattr(model.visual, "trunk"):
        tokens = model.visual.trunk.forward_features(images)
        torch.testing.assert_close(found.patches_BND, tokens[:, model.visual.trunk.num_prefix_tokens :])
    assert found.patches_BND.ndim == 3


@torch.inference_mode()
def test_features_of_timms_siglip_are_those_of_its_head():
    model = shaken(timm.create_model("vit_base_patch16_siglip_224", **TIMM | {"num_classes": 0}))
    tokens = model.forward_features(IMAGES)
    same(features(model, IMAGES), model.forward_head(tokens, pre_logits=True), tokens)
    before = features(model, IMAGES, at="pre_norm")
    torch.testing.assert_close(model.norm(before.patches_BND), tokens)


TORCHVISION = {
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [2, 2], num_classes=5),
}


@pytest.mark.parametrize("name", TORCHVISION)
@torch.inference_mode()
def test_features_of_torchvision_are_what_its_head_is_given(name):
    model = shaken(TORCHVISION[name]())
    given = []
    head = model.heads if name == "vit" else model.head
    head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    found = features(model, IMAGES)
    torch.testing.assert_close(found.pooled_BD, given[0])
    assert found.patches_BND.shape == (2, 16, 32)


@pytest.mark.parametrize("key", ["name", "library", "model_args", "preprocessing", "config", "earlier", "folder"])
@pytest.mark.parametrize("value", [3, "text", ["a"], {"a": 1}])
def test_a_description_with_a_value_of_another_kind_is_refused_by_name(key, value):
    good = {"name": str, "library": str, "folder": str, "earlier": list}.get(key, dict)
    given = {**Origin(name="model").to_json(), key: value}
    if isinstance(value, good):
        assert getattr(Origin.from_json(given), key) == value
        return
    with pytest.raises(CheckpointError, match=f"^origin: damaged; {key} is "):
        Origin.from_json(given)
