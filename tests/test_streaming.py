"""Checkpoints pruned file to file: the tensors of pruning in memory, for every layout, within a budget of memory."""

import copy
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitrim
from tests.support.checkpoints import IMAGES, SOURCES, bytes_of, snapshot, stock, tensors_of
from vitrim.calibrate import activations
from vitrim.cli.app import run
from vitrim.compression import selection
from vitrim.compression.cut import CutReport, cut_
from vitrim.compression.file_to_file import checkpoint_widths, prune_checkpoint
from vitrim.compression.source import open_checkpoint
from vitrim.config.recipe import Recipe
from vitrim.cost import memory
from vitrim.cost.memory import MARGIN, MemoryEstimate, parse_bytes, selection_bytes
from vitrim.data import first_images, open_images
from vitrim.data.split import draw_calibration
from vitrim.errors import CheckpointError, RecipeError
from vitrim.models.file_backed import FileBackedModel
from vitrim.models.load import load_model
from vitrim.models.sites import find_mlps
from vitrim.ops import products
from vitrim.repair import refit
from vitrim.types import MlpSite

pytest.importorskip("transformers")
pytest.importorskip("open_clip")
PRUNE = Recipe(mlp_ratio=1)
REPAIR = Recipe(mlp_ratio=1, repair={"refit_steps": 10}, calibrate={"batch_size": 8, "views": 1})


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint, and the model that its library makes of it."""

    name: str
    source: str
    folder: Path
    library: str
    encoder: str
    dtype: torch.dtype
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    root, built = tmp_path_factory.mktemp("sources"), {}

    def build(name):
        if name not in built:
            folder = root / name.replace(" ", "-")
            source = SOURCES[name](folder)
            if name == "timm shards":  # timm itself reads none
                model, origin = load_model(SOURCES["timm"](folder / "whole"))
            else:
                model, origin = load_model(source)
            dtype = next((t.dtype for t in tensors_of(folder).values() if t.is_floating_point()), torch.float32)
            built[name] = Source(
                name=name,
                source=source,
                folder=folder,
                library=origin.library,
                encoder=origin.encoder,
                dtype=dtype,
                state=model.state_dict(),
            )
        return built[name]

    return build


@pytest.fixture(params=SOURCES)
def each(request, build):
    return build(request.param)


def in_memory(each, recipe, images=None, batches=None) -> tuple[dict[str, Tensor], CutReport]:
    """The tensors that pruning the model in memory ends up with, by the model's own names."""
    whole, origin = load_model(str(each.folder / "whole") if each.name == "timm shards" else each.source)
    encoder = whole.get_submodule(origin.encoder)
    student = copy.deepcopy(encoder).float().eval()
    teacher = copy.deepcopy(student).requires_grad_(False)
    if batches is None and images:
        batches, _ = first_images(open_images(images), 2000, seed=0, batch_size=recipe.calibrate.batch_size)
    cut = cut_(student, teacher, find_mlps(teacher), recipe, batches, quiet=True)
    prefix = f"{origin.encoder}." if origin.encoder else ""
    # timm reads a file of bfloat16 into a model of float32; a file that is pruned keeps its type.
    return {f"{prefix}{name}": tensor.to(each.dtype) for name, tensor in student.state_dict().items()}, cut


def largest_difference(a, b):
    return max(float((a[n].float() - b[n].float()).abs().max() / (b[n].float().abs().max() + 1e-12)) for n in b)


def images_for(each):
    return [torch.nn.functional.interpolate(i[None], 160)[0] for i in IMAGES] if each.name == "state dict" else IMAGES


def test_the_same_tensors_as_in_memory_and_the_stock_library_loads_them(each, tmp_path):
    before = snapshot([each.folder])
    found = prune_checkpoint(each.source, tmp_path / "out", recipe=PRUNE, quiet=True)
    expected, cut = in_memory(each, PRUNE)
    ours = vitrim.load(tmp_path / "out")
    state = ours.state_dict()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    untouched = {name: tensor for name, tensor in each.state.items() if name not in expected}
    assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())
    assert found.plan.sha256 == cut.plan.below(each.encoder).sha256
    assert found.metrics.stock
    theirs = stock(each.library, tmp_path / "out").state_dict()
    assert theirs.keys() == state.keys() and all(
        torch.equal(theirs[name], state[name].to(theirs[name].dtype)) for name in state
    )
    assert found.metrics.after.parameters == sum(tensor.numel() for tensor in ours.parameters())
    assert snapshot([each.folder]) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_repair_as_in_memory(each, tmp_path):
    images = images_for(each)
    found = prune_checkpoint(each.source, tmp_path / "out", recipe=REPAIR, data=images, quiet=True)
    expected, cut = in_memory(each, REPAIR, images)
    state = vitrim.load(tmp_path / "out").state_dict()
    assert largest_difference(state, expected) <= (1e-2 if each.dtype == torch.bfloat16 else 1e-4)
    errors = {f"{each.encoder}.{path}".strip("."): errors for path, errors in cut.errors.items()}
    assert found.metrics.cut_errors.keys() == errors.keys()
    for path, known in errors.items():
        assert found.metrics.cut_errors[path] == pytest.approx(known, rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Files


def test_transformers_gets_shards_of_the_size_asked_for_and_reads_them(build, tmp_path):
    each = build("clip")
    found = prune_checkpoint(each.source, tmp_path / "out", recipe=PRUNE, shard_size="20KB", quiet=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 3
    assert all(len(load_file(file)) == 1 or sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in files)
    assert index["metadata"]["total_size"] == found.metrics.after.num_bytes
    state = stock("transformers", tmp_path / "out").state_dict()
    whole = prune_checkpoint(each.source, tmp_path / "whole", recipe=PRUNE, quiet=True)
    assert sorted(file.name for file in whole.out.glob("*.safetensors*")) == ["model.safetensors"]
    expected = tensors_of(whole.out)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert all(torch.equal(vitrim.load(tmp_path / "out").state_dict()[name], expected[name]) for name in state)


def test_timm_gets_one_file_unless_it_could_not_read_it_anyway(build, tmp_path):
    each = build("timm shards")
    for width in (24, None):
        recipe = Recipe(hidden_dim=width) if width else Recipe(mlp_ratio=1, scope="blocks.0")
        found = prune_checkpoint(each.source, tmp_path / str(width), recipe=recipe, shard_size="50KB", quiet=True)
        files = sorted(file.name for file in found.out.glob("*.safetensors"))
        assert found.metrics.stock == (width == 24) == (files == ["model.safetensors"])
        assert width or files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
        assert vitrim.load(found.out)(torch.stack(IMAGES[:2])).isfinite().all()


def test_a_scope_is_cut_and_the_rest_is_carried_along(build, tmp_path):
    each = build("clip")
    recipe = Recipe(mlp_ratio=1, scope="text_model")
    found = prune_checkpoint(each.source, tmp_path / "out", recipe=recipe, quiet=True)
    assert list(found.metrics.widths) == ["text_model.encoder.layers.0.mlp"]
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in tensors_of(found.out)


@pytest.mark.parametrize("pattern", ["{0}", "local-dir:{0}", "timm/local-dir:{0}", "{0}/model.safetensors"])
def test_sources_by_every_name(build, tmp_path, pattern):
    each = build("timm")
    source = pattern.format(each.source)
    found = prune_checkpoint(source, tmp_path / "out", recipe=Recipe(method="magnitude", mlp_ratio=1), quiet=True)
    assert found.metrics.model == source
    assert about(found)["origin"]["name"] == source and about(found)["origin"]["library"] == "timm"


@pytest.mark.parametrize("name, source", [("clip", "hf/org/name"), ("timm", "timm/hf-hub:org/name")])
def test_a_hub_id_is_fetched_without_pickles(build, tmp_path, monkeypatch, name, source):
    asked = []

    def download(repository, *, ignore_patterns):
        asked.append((repository, {"*.bin", "*.pth"} <= set(ignore_patterns)))
        return build(name).source

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = prune_checkpoint(source, tmp_path / "out", recipe=Recipe(method="magnitude", mlp_ratio=1), quiet=True)
    assert asked == [("org/name", True)] and found.metrics.model == source


def test_a_method_that_needs_no_images_gets_none(build, tmp_path):
    each, recipe = build("timm"), Recipe(method="dgmr-paper", mlp_ratio=1)
    with_images = prune_checkpoint(each.source, tmp_path / "a", recipe=recipe, data=IMAGES, quiet=True)
    without = prune_checkpoint(each.source, tmp_path / "b", recipe=recipe, quiet=True)
    assert bytes_of(with_images.out) == bytes_of(without.out) and without.metrics.notes == ()
    selected = prune_checkpoint(each.source, tmp_path / "c", recipe=PRUNE, quiet=True)
    assert "no images given" in selected.metrics.notes[0]


def about(found):
    return json.loads((found.out / "vitrim.json").read_text())


# Memory


def calibration_bytes(each, recipe, choice):
    job = open_checkpoint(each.source, recipe)
    batches = first_images(open_images(IMAGES), 2000, seed=0, batch_size=recipe.calibrate.batch_size)[0]
    needs = selection.estimate_calibration(job, recipe, checkpoint_widths(job, recipe)[0], batches)
    offloaded, moments = needs.choices[choice]
    return needs.bytes(offloaded=offloaded, moments=moments)


@pytest.fixture(scope="module")
def repaired(build, tmp_path_factory):
    """A run with everything in memory."""
    out = tmp_path_factory.mktemp("repaired") / "out"
    return prune_checkpoint(build("timm").source, out, recipe=REPAIR, data=IMAGES, quiet=True)


def test_views_are_calibrated_on_as_in_memory(build, repaired, tmp_path):
    each, recipe = (
        build("timm"),
        Recipe(mlp_ratio=1, repair={"refit_steps": 10}, calibrate={"batch_size": 8, "views": 2}),
    )
    found = prune_checkpoint(each.source, tmp_path / "out", recipe=recipe, data=IMAGES, quiet=True)
    drawn = draw_calibration(open_images(IMAGES), recipe.calibrate, 0)
    expected, _ = in_memory(each, recipe, IMAGES, drawn.batches)
    assert largest_difference(vitrim.load(found.out).state_dict(), expected) <= 1e-4
    assert all(
        errors["repaired"] != pytest.approx(repaired.metrics.cut_errors[path]["repaired"], rel=1e-3)
        for path, errors in found.metrics.cut_errors.items()
    )


def test_activations_on_disk_change_nothing(build, repaired, tmp_path, monkeypatch):
    each, seen = build("timm"), []
    put = activations.Store.put
    monkeypatch.setattr(activations.Store, "put", lambda self, *given: (seen.append(self.folder), put(self, *given)))
    enough = calibration_bytes(each, REPAIR, 1)
    assert enough < calibration_bytes(each, REPAIR, 0)
    found = prune_checkpoint(
        each.source, tmp_path / "out", recipe=REPAIR, data=IMAGES, memory_budget=enough, quiet=True
    )
    assert {path.parent.name for path in seen} == {"teacher", "student"}
    assert (
        bytes_of(found.out) == bytes_of(repaired.out) and about(found)["plan_sha256"] == about(repaired)["plan_sha256"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_moments_in_float32_change_next_to_nothing(build, tmp_path, monkeypatch):
    each, types = build("timm"), []
    # bfloat16 products of the refit round at 2^-9: they would tell any two runs apart that are not equal bit for bit.
    monkeypatch.setattr(refit, "has_fast_bf16", lambda _: False)
    exact = prune_checkpoint(each.source, tmp_path / "exact", recipe=REPAIR, data=IMAGES, quiet=True)
    for module in (memory, products):
        monkeypatch.setattr(module, "TILE_ROWS", 20)  # several tiles, the last one smaller
    monkeypatch.setattr(
        selection, "cut_", lambda *args, **kwargs: (types.append(kwargs["moments"]), cut_(*args, **kwargs))[1]
    )
    enough = calibration_bytes(each, REPAIR, 3)
    assert enough < calibration_bytes(each, REPAIR, 1)
    found = prune_checkpoint(
        each.source, tmp_path / "out", recipe=REPAIR, data=IMAGES, memory_budget=enough, quiet=True
    )
    assert types == [torch.float32]
    assert [edit.keep for edit in found.plan.edits] == [edit.keep for edit in exact.plan.edits]
    assert largest_difference(tensors_of(found.out), tensors_of(exact.out)) <= 1e-4


def test_a_budget_that_is_too_small_says_what_would_be_enough(build, tmp_path):
    each = build("timm")
    enough = min(calibration_bytes(each, REPAIR, choice) for choice in range(4))
    with pytest.raises(RecipeError, match="needs ") as caught:
        prune_checkpoint(
            each.source, tmp_path / "out", recipe=REPAIR, data=IMAGES, memory_budget=enough - 1, quiet=True
        )
    assert "calibrate.batch_size" in str(caught.value) and list(tmp_path.iterdir()) == []
    said = re.search(r"needs (\S+ \S+);", str(caught.value))
    assert said is not None and enough <= parse_bytes(said[1]) < 1.1 * enough
    prune_checkpoint(each.source, tmp_path / "out", recipe=REPAIR, data=IMAGES, memory_budget=said[1], quiet=True)


@pytest.mark.parametrize("size", ["", "4 apples", "GB", "-1GB", "0", "1e9"])
def test_sizes_that_are_none(build, tmp_path, size):
    with pytest.raises(RecipeError, match="size: "):
        prune_checkpoint(build("timm").source, tmp_path / "out", recipe=PRUNE, shard_size=size, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_sizes():
    said = {"4GB": 4 * 10**9, "1.5 GiB": 3 * 2**29, "20kb": 20_000, "7": 7, "7b": 7}
    assert {text: parse_bytes(text) for text in said} == said


@pytest.mark.parametrize("scope", [None, "blocks.1"])
def test_one_block_of_each_model_is_in_memory_at_a_time(build, tmp_path, monkeypatch, scope):
    each, most = build("timm"), []
    enter = FileBackedModel.enter

    def counting(self, block):
        enter(self, block)
        here = {name.split(".")[1] for name, p in self.model.named_parameters() if "blocks" in name and not p.is_meta}
        most.append(len(here))

    monkeypatch.setattr(FileBackedModel, "enter", counting)
    recipe = REPAIR.updated({"scope": scope})
    prune_checkpoint(each.source, tmp_path / "out", recipe=recipe, data=IMAGES, quiet=True)
    assert set(most) == {1} and len(most) > 6


# What a run will need, said before it


@pytest.mark.defaults
def test_inspect_says_what_pruning_will_need(build, tmp_path):
    each = build("timm bf16")
    found = vitrim.inspect(each.source, mlp_ratio=1)
    done = prune_checkpoint(each.source, tmp_path / "out", recipe=PRUNE, quiet=True)
    said = found.checkpoint
    before, after = done.metrics.before, done.metrics.after
    assert (said.source, said.output) == (before.num_bytes, after.num_bytes) and said.dtypes == ("bfloat16",)
    assert said.memory > said.program > 10**8 and 0 < said.seconds < 60
    assert said.calibration["images"] == 2000
    assert said.calibration["disk"] == 3 * 2000 * 17 * 32 * 4
    assert said.calibration["memory"] > said.calibration["least"] > 0
    assert found.to_json()["checkpoint"]["output"] == said.output
    json.dumps(found.to_json())


def test_inspect_reads_no_values(build, monkeypatch):
    each = build("clip")
    monkeypatch.setattr("vitrim.storage.tensor_files.TensorFiles.chunks", None)
    assert vitrim.inspect(each.source, mlp_ratio=1).checkpoint.dtypes == ("bfloat16", "int64")


def test_inspect_names_what_can_not_be_pruned_file_to_file(build, tmp_path):
    shutil.copytree(build("timm").folder, tmp_path / "copy")
    state = tensors_of(tmp_path / "copy")
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.weight is missing"):  # timm can't load it either
        vitrim.inspect(str(tmp_path / "copy"), mlp_ratio=1)
    (tmp_path / "copy" / "model.safetensors").unlink()
    assert vitrim.inspect(str(tmp_path / "copy"), mlp_ratio=1).notes == ()


def test_a_giant_is_forecast_within_reason():
    """EVA-CLIP-E: what moments of 15,360 units take, by hand."""
    site = MlpSite(path="m", kind="plain", d_model=1792, d_hidden=15360, value="v", output="o")
    needs = MemoryEstimate(activations=0, resident=0, sample=0, batch=0, chunk=0, hidden=15360, kept=1792, d_model=1792)
    square, cross = 15360**2 * 8, 15360 * 1792 * 8
    assert needs.bytes(offloaded=False, moments=torch.float64) == int(MARGIN * (2 * square + 8 * cross))
    assert needs.bytes(offloaded=False, moments=torch.float32) == int(MARGIN * (square + 8 * cross))
    assert 100 < selection_bytes(site, 1792, 2) / 1e6 < 500


# The command line


def test_the_command_line(build, tmp_path, capsys):
    each = build("clip")
    command = ["prune-checkpoint", each.source, str(tmp_path / "out"), "--mlp-ratio", "1", "--shard-size", "20KB"]
    assert run(command) == 0
    printed = capsys.readouterr()
    first = next(line for line in printed.err.split("\n") if each.source in line)  # torch may log before it
    assert "peak memory without images" in first and "(an estimate)" in first and each.source in first
    assert "parameters" in printed.out and "CLIPModel" in printed.out
    assert run([*command[:2], str(tmp_path / "b"), "--method", "magnitude", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and json.loads(printed.out)["before"]["num_bytes"] > 0
    assert run(["inspect", each.source]) == 0
    assert "prune-checkpoint at params_ratio 0.5" in capsys.readouterr().out


def test_images_on_the_command_line(tmp_path, capsys):
    source = str(Path(vitrim.__file__).parent / "assets" / "digits-vit")
    (tmp_path / "recipe.yaml").write_text("calibrate: {num_images: 32, batch_size: 16}\nrepair: {refit: false}\n")
    command = ["prune-checkpoint", source, str(tmp_path / "out"), "--data", "digits", "--memory-budget", "1GB"]
    assert run([*command, "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr()
    assert "for 128 images" in next(line for line in printed.err.split("\n") if source in line)  # four views of each
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["cut_errors"]) == 6
    assert all(errors["repaired"] < errors["unrepaired"] for errors in metrics["cut_errors"].values())
