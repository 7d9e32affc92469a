"""Towers of larger models: only the tower changes, the whole is saved, and its library loads it alone."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitrim
from tests.support.pairs import VISION
from vitrim.cli.app import run
from vitrim.errors import DataError, SiteNotFoundError
from vitrim.models.load import load_model, origin_of
from vitrim.models.sites import find_mlps
from vitrim.models.stored_names import stored
from vitrim.output.load import read_about
from vitrim.output.save import save
from vitrim.output.stage import staged_output
from vitrim.surgery import KeepUnits, Plan, apply_

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FEW = vitrim.Recipe.parse({"mlp_ratio": 1, "repair": {"refit": False}, "calibrate": {"batch_size": 16}})
IMAGES = list(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
ROWS = list(torch.randint(3, 99, (24, 12), generator=torch.Generator().manual_seed(0)))
IMAGE_TOKEN = 50
PROMPT = [1, *[IMAGE_TOKEN] * 16, 5, 6, 7]
PICTURE = IMAGES[0][None]
CLIP_VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 4.0}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": CLIP_VISION,
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def shaken(build):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def build_llava(tied=False):
    config = transformers.LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": tied},
        image_token_index=IMAGE_TOKEN,
        tie_word_embeddings=tied,
    )
    return shaken(lambda: transformers.LlavaForConditionalGeneration(config))


def build_clip():
    return shaken(lambda: transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=TEXT)))


def build_dinov2():
    sizes = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    config = transformers.Dinov2Config(**sizes, mlp_ratio=4, use_swiglu_ffn=True)
    return shaken(lambda: transformers.Dinov2Model(config))


def write_open_clip(folder, config):
    folder.mkdir()
    said = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    model = shaken(lambda: open_clip.create_model(f"local-dir:{folder}"))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def cut_by_hand(model, origin, widths):
    """A student whose MLPs have these widths, without any calibration, and its plan."""
    student = copy.deepcopy(model)
    sites = find_mlps(student, scope=origin.encoder)
    edits = tuple(
        KeepUnits(site=site, keep=tuple(range(widths[i % len(widths)] - 1, -1, -1))) for i, site in enumerate(sites)
    )
    apply_(student, edits)
    return student, Plan(edits=edits, method="random")


def write(out, model, origin, widths):
    student, plan = cut_by_hand(model, origin, widths)
    with staged_output(out) as (folder, _):
        stock = save(folder, student, origin=origin, plan=plan)
    return student, stock


def assert_only_mlps_changed(model, original, scope):
    """Every tensor but those of the MLPs below `scope` is bit-equal; returns the names of those that are not."""
    state, before = model.state_dict(), original.state_dict()
    assert state.keys() == before.keys()
    changed = [n for n, t in before.items() if t.shape != state[n].shape or not torch.equal(t, state[n])]
    assert changed and all(name.startswith(f"{scope}.") and ".mlp." in name for name in changed)
    return changed


def generate(model):
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        return model.generate(input_ids=ids, pixel_values=PICTURE, **options)[0].tolist()


# A VLM, from a folder to a folder


@pytest.fixture(scope="module")
def llava():
    return build_llava()


@pytest.fixture(scope="module")
def tied():
    return build_llava(tied=True)


@pytest.fixture(scope="module")
def result(tmp_path_factory, llava):
    root = tmp_path_factory.mktemp("llava")
    llava.save_pretrained(root / "source")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(root / "source")
    return vitrim.compress(
        str(root / "source"), data=IMAGES, scope="vision_tower", recipe=FEW, out=root / "out", quiet=True
    )


@pytest.fixture(scope="module")
def tied_output(tmp_path_factory, tied):
    """A tied VLM with one width in its tower, written in transformers' own format."""
    out = tmp_path_factory.mktemp("tied") / "out"
    student, stock = write(out, tied, origin_of(tied), [40])
    assert stock
    return student, out


ALONE = """
import sys
sys.modules["vitrim"] = None
import json, torch, transformers
from safetensors.torch import load_file
found = []
for folder in sys.argv[2:]:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    inputs = load_file(sys.argv[1])
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
    found.append([ids, model.lm_head.weight is model.get_input_embeddings().weight])
print(json.dumps(found))
"""


def test_a_vlm_generates_the_same_text_in_a_process_without_vitrim(tmp_path, llava, result, tied, tied_output):
    student, tied_out = tied_output
    ids = torch.tensor([PROMPT])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": PICTURE}
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "inputs.safetensors"), str(result.out), str(tied_out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (ids, is_tied), (tied_ids, tied_is_tied) = json.loads(done.stdout.splitlines()[-1])
    assert ids == generate(result.model) and not is_tied and len(ids) > len(PROMPT)
    assert tied_ids == generate(student) and tied_is_tied


def test_only_the_tower_of_a_vlm_changes_and_the_whole_is_saved(llava, result):
    changed = assert_only_mlps_changed(result.model, llava, "model.vision_tower")
    assert len(changed) == 2 * 4
    assert result.metrics.encoder == "model.vision_tower" and result.metrics.stock
    assert result.metrics.reload_difference <= 1e-5 and result.metrics.after_cut.fidelity["num_images"] == 2
    written, live = load_file(result.out / "model.safetensors"), stored(result.model, result.model.state_dict())
    assert written.keys() == live.keys() and all(torch.equal(written[name], live[name]) for name in live)
    names = {path.name for path in result.out.iterdir()}
    assert {"config.json", "generation_config.json", "preprocessor_config.json"} <= names
    config = json.loads((result.out / "config.json").read_text())
    assert config["vision_config"]["intermediate_size"] == 32 and config["text_config"]["intermediate_size"] == 96
    assert result.metrics.loads_with.startswith("transformers.LlavaForConditionalGeneration.from_pretrained(")


def test_a_vlm_is_loaded_measured_and_cut_again_by_vitrim(llava, result):
    assert generate(vitrim.load(result.out)) == generate(result.model)
    assert {site.path.rpartition(".layers")[0] for site in vitrim.inspect(str(result.out)).sites} == {
        "model.vision_tower.encoder"
    }
    measured = vitrim.evaluate(str(result.out), llava, IMAGES)
    assert (
        measured.student.cost.parameters < measured.teacher.cost.parameters < sum(p.numel() for p in llava.parameters())
    )
    again = vitrim.compress(str(result.out), method="magnitude", hidden_dim=8, quiet=True)
    assert_only_mlps_changed(again.model, result.model, "model.vision_tower")


def test_without_a_scope_the_image_tower_is_cut(llava, result):
    found = vitrim.compress(llava, data=IMAGES, recipe=FEW, quiet=True)
    assert found.plan.sha256 == result.plan.sha256
    assert llava.config.vision_config.intermediate_size == 128  # the one that was given stays as it was
    assert llava.model.vision_tower.encoder.layers[0].mlp.fc1.weight.shape == (128, 32)


def test_save_pretrained_of_the_result_writes_the_new_widths(tmp_path, llava):
    found = vitrim.compress(llava, method="magnitude", mlp_ratio=1, quiet=True)
    found.model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.vision_config.intermediate_size == 32
    assert generate(again) == generate(found.model)


def test_a_vlm_in_bf16_stays_in_bf16():
    model = build_llava().bfloat16()
    found = vitrim.compress(model, data=IMAGES, recipe=FEW, quiet=True)
    assert {tensor.dtype for tensor in found.model.state_dict().values()} == {torch.bfloat16}
    assert_only_mlps_changed(found.model, model, "model.vision_tower")


def test_the_language_model_is_cut_on_rows_of_ids(tmp_path, llava):
    found = vitrim.compress(llava, data=ROWS, scope="language_model", keep_ratio=0.5, recipe=FEW, quiet=True)
    assert found.metrics.encoder == "model.language_model" and found.metrics.stock
    assert_only_mlps_changed(found.model, llava, "model.language_model")
    found.model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (again.config.text_config.intermediate_size, again.config.vision_config.intermediate_size) == (48, 128)
    assert generate(again) == generate(found.model)
    without = vitrim.compress(llava, method="magnitude", scope="language_model", keep_ratio=0.5, quiet=True)
    assert_only_mlps_changed(without.model, llava, "model.language_model")


# Tied weights


def test_tied_weights_survive_both_formats(tmp_path, tied, tied_output):
    student, out = tied_output
    assert student.lm_head.weight is student.get_input_embeddings().weight
    own, stock = write(tmp_path / "own", tied, origin_of(tied), [40, 24])
    assert not stock and not (tmp_path / "own" / "config.json").exists()
    for folder, expected in ((out, student), (tmp_path / "own", own)):
        stored = load_file(folder / "model.safetensors")
        assert len(stored) == len(expected.state_dict()) - 1  # the tied tensor stands there once
        loaded = vitrim.load(folder)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())
        assert generate(loaded) == generate(expected)


def test_a_tied_vlm_comes_back_tied(tied):
    found = vitrim.compress(tied, method="magnitude", mlp_ratio=1, quiet=True).model
    assert found.lm_head.weight is found.get_input_embeddings().weight
    assert found.lm_head.weight is not tied.lm_head.weight


# CLIP


def test_the_text_tower_of_clip_is_left_alone_and_widths_may_differ(tmp_path):
    model = build_clip()
    found = vitrim.compress(model, data=IMAGES, keep_ratio=0.25, recipe=FEW, quiet=True)
    assert_only_mlps_changed(found.model, model, "vision_model")
    rows = {"input_ids": torch.stack(ROWS[:3])}
    with torch.inference_mode():
        texts = [m.get_text_features(**rows) for m in (model, found.model)]
        texts = [text if isinstance(text, torch.Tensor) else text.pooler_output for text in texts]
        assert torch.equal(*texts)
    student, stock = write(tmp_path / "own", model, origin_of(model), [40, 24])
    assert not stock and read_about(tmp_path / "own")["origin"]["encoder"] == "vision_model"
    loaded = vitrim.load(tmp_path / "own")
    assert [layer.mlp.fc1.out_features for layer in loaded.vision_model.encoder.layers] == [40, 24]
    with torch.inference_mode():
        images = {"pixel_values": torch.stack(IMAGES[:2])}
        assert torch.equal(loaded(**rows, **images).logits_per_image, student(**rows, **images).logits_per_image)


def test_a_part_of_the_tower_makes_widths_that_are_not_stock(llava):
    found = vitrim.compress(llava, data=IMAGES, scope="encoder.layers.1", recipe=FEW, quiet=True)
    assert found.metrics.encoder == "model.vision_tower" and not found.metrics.stock
    assert found.metrics.notes[-1] == "transformers has no config that cuts 1 of 2 MLPs."
    changed = assert_only_mlps_changed(found.model, llava, "model.vision_tower.encoder.layers.1")
    assert len(changed) == 4


# Scopes


@pytest.mark.parametrize(
    "scope, data, error, words",
    [
        ("nothing", None, SiteNotFoundError, "no such module; the top level has model, lm_head"),
        ("layers", None, SiteNotFoundError, "several modules of that name .*vision_tower.*language_model"),
        ("lm_head", None, SiteNotFoundError, r"no MLP found in Linear \(1 modules seen\): no linear layer feeds"),
        ("language_model", IMAGES, DataError, "language_model: can't run on float32 .*text encoder"),
        ("model", IMAGES, DataError, "model: can't run on float32"),
        ("vision_tower", ROWS, DataError, r"vision_tower: can't run on int64 \(12,\)"),
        ("vision_tower", ["some text"], DataError, "takes images, not text"),
    ],
)
def test_a_scope_that_does_not_fit_is_one_clear_line(llava, scope, data, error, words):
    with pytest.raises(error, match=words) as caught:
        vitrim.compress(llava, data=data, scope=scope, quiet=True)
    assert "\n" not in str(caught.value)


# Stock widths


def test_the_nearest_width_that_the_config_can_say_is_taken(tmp_path):
    model = build_dinov2()
    assert vitrim.inspect(model).sites[0].d_hidden == 88
    plain = vitrim.compress(model, method="magnitude", mlp_ratio=1, exact=True, quiet=True)
    assert set(plain.plan.widths.values()) == {32} and not plain.metrics.stock
    assert any("(32 of 88); the nearest that it could is 24." in note for note in plain.metrics.notes)
    for asked, width, ratio in (({"mlp_ratio": 1}, 24, 1), ({"hidden_dim": 60}, 64, 3), ({"keep_ratio": 0.95}, 64, 3)):
        found = vitrim.compress(model, method="magnitude", quiet=True, **asked)
        assert set(found.plan.widths.values()) == {width} and found.metrics.stock
        assert [note for note in found.metrics.notes if "nearest" in note] == [
            note for note in found.metrics.notes if f"became {width}, the nearest that transformers can load" in note
        ]
        assert found.model.config.mlp_ratio == ratio and model.config.mlp_ratio == 4
    found.model.save_pretrained(tmp_path)
    again = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = found.model(PICTURE).last_hidden_state
        assert torch.equal(again(PICTURE).last_hidden_state, expected)


def test_the_command_line_takes_the_nearest_width_unless_it_shall_be_exact(tmp_path, capsys):
    build_dinov2().save_pretrained(tmp_path / "source")
    command = ["compress", str(tmp_path / "source"), "--method", "magnitude", "--mlp-ratio", "1", "--json"]
    for name, more, width in (("near", [], 24), ("exact", ["--exact"], 32)):
        assert run([*command, "--out", str(tmp_path / name), *more]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["stock"] == (name == "near") and set(map(tuple, printed["widths"].values())) == {(88, width)}
        assert vitrim.Recipe.load(tmp_path / name / "recipe.yaml").steps[0].exact == (name == "exact")


def test_a_model_without_a_config_keeps_the_width_asked_for():
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    found = vitrim.compress(module, method="magnitude", hidden_dim=7, quiet=True)
    assert set(found.plan.widths.values()) == {7} and not found.metrics.stock
    assert not any("nearest" in note for note in found.metrics.notes)


# open_clip


def test_a_live_open_clip_model(tmp_path):
    model = write_open_clip(tmp_path / "source", OPEN_CLIP)
    found = vitrim.compress(model, data=IMAGES, recipe=FEW, out=tmp_path / "out", quiet=True)
    assert found.metrics.encoder == "visual" and not found.metrics.stock
    assert found.metrics.loads_with == f'vitrim.load("{tmp_path / "out"}", model=...)'
    assert_only_mlps_changed(found.model, model, "visual")
    fresh = open_clip.create_model(f"local-dir:{tmp_path / 'source'}")
    loaded, tokens = vitrim.load(tmp_path / "out", model=fresh), torch.randint(0, 64, (2, 16))
    with torch.inference_mode():
        assert torch.equal(loaded.encode_image(PICTURE), found.model.encode_image(PICTURE))
        assert torch.equal(found.model.encode_text(tokens), model.encode_text(tokens))


def test_open_clip_loads_what_was_cut_of_its_own_tower(tmp_path):
    config = {**OPEN_CLIP, "vision_cfg": {**CLIP_VISION, "image_size": [32, 48]}}
    model = write_open_clip(tmp_path / "source", config)
    _, origin = load_model(str(tmp_path / "source"))
    student, stock = write(tmp_path / "out", model, origin, [48])
    assert stock
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    _, _, before = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'source'}")
    assert repr(transform) == repr(before)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in student.state_dict().items())
    assert load_model(str(tmp_path / "out"))[1].preprocessing == origin.preprocessing


@pytest.mark.parametrize("name", ["out", "sortie é"])
def test_a_timm_tower_of_open_clip_is_found_in_the_final_folder(tmp_path, name):
    tower = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    model = write_open_clip(tmp_path / "source", {**OPEN_CLIP, "vision_cfg": tower})
    out = tmp_path / name
    student, stock = write(out, model, load_model(str(tmp_path / "source"))[1], [100])
    assert stock and not (tmp_path / f".{name}.partial").exists()
    config = json.loads((out / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == f"local-dir:{out / 'trunk'}"
    loaded = open_clip.create_model(f"local-dir:{out}", require_pretrained=True)
    again, origin = load_model(str(out))
    for other in (loaded, again, vitrim.load(out)):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in student.state_dict().items())
    second, stock = write(tmp_path / "second", again, origin, [50])
    assert (
        stock
        and open_clip.create_model(f"local-dir:{tmp_path / 'second'}").visual.trunk.blocks[0].mlp.fc1.out_features == 50
    )
    assert second.visual.trunk.blocks[0].mlp.fc1.out_features == 50
