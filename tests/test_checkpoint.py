"""Saving and loading: stock where the config can say it, exact always, whole or not at all."""

import copy
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import vitrim
from vitrim.errors import CheckpointError, ModelError, OutputError
from vitrim.models.load import origin_of
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps
from vitrim.output.save import save
from vitrim.output.stage import staged_output
from vitrim.output.verify import checking_with, verify
from vitrim.recover.state import load_state, save_state
from vitrim.surgery import KeepUnits, Plan, apply_

pytestmark = pytest.mark.fresh
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"img_size": 32, "depth": 2, "num_classes": 5}
FAMILIES = {
    "plain": ("vit_tiny_patch16_224", {**SMALL, "embed_dim": 32, "num_heads": 2}),
    "packed": ("vit_giant_patch14_dinov2", {**SMALL, "img_size": 28, "embed_dim": 48, "num_heads": 2}),
    "split": ("vit_small_plus_patch16_dinov3", {**SMALL, "embed_dim": 48, "num_heads": 2}),
    "inner norm": ("eva02_base_patch14_224", {**SMALL, "img_size": 28, "embed_dim": 48, "num_heads": 2}),
    "post norm": ("eva02_enormous_patch14_clip_224", {**SMALL, "img_size": 28, "embed_dim": 48, "num_heads": 2}),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 28, "embed_dim": 48, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 2),
            "num_classes": 5,
        },
    ),
}


def cut(name, widths):
    torch.manual_seed(0)
    architecture, arguments = FAMILIES[name]
    model = timm.create_model(architecture, **arguments).eval()
    student = copy.deepcopy(model)
    sites = find_mlps(student)
    chosen = [widths if isinstance(widths, int) else widths[i % len(widths)] for i in range(len(sites))]
    edits = tuple(KeepUnits(site=s, keep=tuple(range(w - 1, -1, -1))) for s, w in zip(sites, chosen, strict=True))
    apply_(student, edits)
    return model, student, Plan(edits=edits, method="random")


def images_for(name):
    return IMAGES[..., :28, :28] if FAMILIES[name][1]["img_size"] == 28 else IMAGES


@pytest.mark.parametrize(
    "name, width",
    [(name, width) for name in FAMILIES for width in (48, 27) if name != "swin" and (name, width) != ("split", 27)],
)
def test_a_uniform_width_loads_with_stock_timm(tmp_path, name, width):
    model, student, plan = cut(name, width)
    assert save(tmp_path, student, origin=origin_of(model), plan=plan)
    images = images_for(name)
    expected = student(images)
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(stock(images), expected)
    assert torch.equal(vitrim.load(tmp_path)(images), expected)


@pytest.mark.parametrize(
    "name, widths",
    # timm rounds DINOv3's gated widths up to a multiple of 8, so 27 can't be said there
    [("plain", [24, 31]), ("packed", [24, 31]), ("inner norm", [24, 31]), ("swin", [24, 31]), ("split", 27)],
)
def test_other_widths_load_with_vitrim(tmp_path, name, widths):
    model, student, plan = cut(name, widths)
    assert not save(tmp_path, student, origin=origin_of(model), plan=plan)
    images = images_for(name)
    assert torch.equal(vitrim.load(tmp_path)(images), student(images))


def test_a_folder_loads_by_path_prefix_and_hub_id_onto_a_device_and_in_a_type(tmp_path, monkeypatch):
    model, student, plan = cut("plain", [24, 31])
    save(tmp_path, student, origin=origin_of(model), plan=plan)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: {"me/small": str(tmp_path)}[name])
    expected = vitrim.load(tmp_path).state_dict()
    for source in (str(tmp_path), f"local-dir:{tmp_path}", "hf-hub:me/small"):
        found = vitrim.load(source, device="cpu", dtype=torch.bfloat16)
        assert not found.training and {p.dtype for p in found.parameters()} == {torch.bfloat16}
        for name, tensor in found.state_dict().items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype))
    with pytest.raises(ModelError, match="hf-hub:me/none: could not load"):
        vitrim.load("hf-hub:me/none")


def test_swin_cut_by_one_ratio_is_stock_too(tmp_path):
    torch.manual_seed(0)
    architecture, arguments = FAMILIES["swin"]
    model = timm.create_model(architecture, **arguments).eval()
    result = vitrim.compress(model, method="magnitude", mlp_ratio=2.0, out=tmp_path / "out", quiet=True)
    assert len(set(result.plan.widths.values())) > 1 and result.metrics.stock
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(stock(IMAGES), result.model(IMAGES))


def test_a_fresh_process_without_vitrim_gives_the_same_outputs_and_a_wrong_file_is_noticed(tmp_path):
    model, student, plan = cut("plain", 32)
    stock = save(tmp_path, student, origin=origin_of(model), plan=plan)
    assert verify(tmp_path, student, IMAGES, origin=origin_of(student), stock=stock) == 0
    with torch.no_grad():
        student.head.bias.add_(1.0)
    with pytest.raises(OutputError, match="does not load back as the same model"):
        verify(tmp_path, student, IMAGES, origin=origin_of(student), stock=stock)


def test_a_module_that_only_its_owner_can_build(tmp_path):
    def build():
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    model, tokens = build(), torch.randn(1, 3, 16)
    student = copy.deepcopy(model)
    edits = tuple(KeepUnits(site=site, keep=(3, 1, 2)) for site in find_mlps(student))
    apply_(student, edits)
    assert not save(tmp_path, student, origin=origin_of(model), plan=Plan(edits=edits, method="random"))
    with pytest.raises(CheckpointError, match="build it"):
        vitrim.load(tmp_path)
    assert torch.equal(vitrim.load(tmp_path, model=build())(tokens), student(tokens))


def test_a_module_under_two_names_is_written_under_both(tmp_path):
    """As in timm's CoaT, whose parallel blocks share their position encodings: the library asks for every name."""
    model = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    model.again = model.blocks[0].attn
    save(tmp_path, model, origin=origin_of(model), plan=Plan(method="none", edits=()))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


class Heads(torch.nn.Linear):
    def forward(self, tokens):
        return {"heads": (super().forward(tokens),)}


def test_a_first_output_deep_in_others_is_compared(tmp_path):
    model, seen = Heads(4, 2), []
    with checking_with(lambda check: seen.append(check.probe["output"]) or 0.0):
        verify(tmp_path, model, torch.ones(1, 4), origin=Origin(name="heads", library="torchvision"), stock=False)
    assert torch.equal(seen[0], model(torch.ones(1, 4))["heads"][0])


def test_files_may_be_read_by_others(tmp_path):
    model, student, plan = cut("plain", 16)
    mask = os.umask(0o022)
    try:
        save(tmp_path, student, origin=origin_of(model), plan=plan)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), staged_output(out) as (folder, _):
        (folder / "half").write_text("written")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with staged_output(out) as (folder, _):
        (folder / "file").write_text("written")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="exists already"), staged_output(out):
        pass


def test_a_stopped_recovery_is_kept_for_resume_and_removed_when_not_wanted(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), staged_output(out) as (_, work):
        (work / "cut.json").write_text("{}")
        save_state(work / "recover.state", {"step": 3})
        raise KeyboardInterrupt
    with staged_output(out, resume=True) as (_, work):
        assert load_state(work / "recover.state") == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("parent", ["file/out", "/proc/nothing/out"])
def test_an_output_that_cannot_be_written_is_refused(tmp_path, parent):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="can't be written"), staged_output(tmp_path / parent):
        pass


@pytest.mark.parametrize("damage", ["truncate", "weights", "json", "format", "plan", "missing"])
def test_a_damaged_folder_gives_one_clear_line(tmp_path, damage):
    model, student, plan = cut("plain", 16)
    save(tmp_path, student, origin=origin_of(model), plan=plan)
    about = tmp_path / "vitrim.json"
    data = json.loads(about.read_text())
    if damage == "truncate":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    elif damage == "weights":
        data["plan"]["edits"][0]["keep"].append(20)
    elif damage == "plan":
        del data["plan"]["edits"][0]["site"]["value"]
    elif damage == "format":
        data["format"] = "vitrim/9"
    if damage == "missing":
        about.unlink()
    else:
        about.write_text("{" if damage == "json" else json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        vitrim.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_state_with_code_in_it_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'executed'}",))

    torch.save({"step": Payload()}, tmp_path / "recover.state")
    with pytest.raises(CheckpointError, match="can't be used"):
        load_state(tmp_path / "recover.state")
    assert not (tmp_path / "executed").exists()


def test_plan_json_is_canonical():
    _, _, plan = cut("plain", 16)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.sha256 == plan.sha256


def test_importing_vitrim_loads_no_model_library():
    heavy = ("timm", "transformers", "datasets", "sklearn", "matplotlib")
    code = f"import sys, vitrim; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
