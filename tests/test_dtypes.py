"""What is judged is what is returned, in its own type; what that type can't hold stays in float32, and is said."""

import copy
import logging

import pytest
import torch

import vitrim
from tests.support.checkpoints import IMAGES, VIT, tensors_of, timm_folder
from tests.support.models import build_case
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps

RECIPE = {"method": "random", "keep_ratio": 0.5, "repair": {"refit": False}, "seed": 1, "calibrate": {"batch_size": 4}}
NO_REFIT = vitrim.RepairOptions(refit=False)
ENDS = "and float16 ends at 65504, so the result is in float32"


def near_the_end_(model):
    """Units in equal pairs with output weights of up to 5e4: cut to half, the other has to weigh twice as much."""
    with torch.no_grad():
        for block in model.blocks:
            fc1, fc2, half = block.mlp.fc1, block.mlp.fc2, block.mlp.fc1.out_features // 2
            fc1.weight.mul_(1e-3)
            fc1.bias.mul_(1e-3)
            for tensor in (fc1.weight, fc1.bias, fc2.weight.T):
                tensor[half:] = tensor[:half]
            fc2.weight.mul_(5e4 / fc2.weight.abs().max())
    return model.half()


def judged(found):
    """The returned model's own error on the held-out images of a run."""
    return found.metrics.after_cut.relative_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_error_is_that_of_the_returned_model(dtype, monkeypatch):
    held_out = keep_held_out(monkeypatch)
    original = build_case("timm-vit").copy().to(dtype)
    found = vitrim.compress(original, data=IMAGES, recipe=RECIPE, quiet=True)
    assert {p.dtype for p in found.model.parameters()} == {dtype}
    expected = fidelity(found.model, copy.deepcopy(original).float(), held_out)["relative_error"]
    assert judged(found) == pytest.approx(expected, rel=1e-3)
    assert judged(found) != fidelity(copy.deepcopy(found.model).float(), copy.deepcopy(original).float(), held_out)


def keep_held_out(monkeypatch):
    """The list into which a run's held-out batches go."""
    from vitrim.compression import phases

    held_out, split = [], phases.split_images

    def keeping(*args, **options):
        done = split(*args, **options)
        held_out.extend(done.held_out)
        return done

    monkeypatch.setattr(phases, "split_images", keeping)
    return held_out


def test_a_cast_that_overflows_is_not_made(monkeypatch):
    held_out = keep_held_out(monkeypatch)
    original = near_the_end_(build_case("timm-vit").copy())
    found = vitrim.compress(original, data=IMAGES, recipe=RECIPE, quiet=True)
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert sum(ENDS in note for note in found.metrics.notes) == 1
    assert all(torch.isfinite(tensor).all() for tensor in found.model.state_dict().values())
    expected = fidelity(found.model, copy.deepcopy(original).float(), held_out)["relative_error"]
    assert judged(found) == pytest.approx(expected, rel=1e-5) and expected < 1


def test_in_place_all_of_the_model_becomes_float32(caplog):
    model = near_the_end_(build_case("timm-vit").copy())
    with caplog.at_level(logging.WARNING, "vitrim"):
        vitrim.prune_(model, "random", [torch.stack(IMAGES)], keep_ratio=0.5, repair=NO_REFIT, seed=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and ENDS in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_file_to_file_writes_float32(tmp_path, monkeypatch):
    from tests.support import checkpoints

    monkeypatch.setattr(checkpoints, "shaken", lambda build, dtype: near_the_end_(build()).eval())
    source = timm_folder(tmp_path / "source", "vit_tiny_patch16_224", VIT, torch.float16)
    found = vitrim.prune_checkpoint(source, tmp_path / "out", data=IMAGES, recipe=RECIPE, quiet=True)
    assert sum(ENDS in note for note in found.metrics.notes) == 1
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in after.values())
    cut = {name for site in find_mlps(vitrim.load(str(tmp_path / "out"))) for name in (site.value, site.output)}
    same = [name for name in before if name.rpartition(".")[0] not in cut]
    assert same and all(torch.equal(after[name], before[name].float()) for name in same)


def test_a_result_that_is_not_finite_is_not_returned(monkeypatch):
    from vitrim.ops import feedback
    from vitrim.repair import closed_form

    def broken(*args, **options):
        weight_DK, bias_D = fit(*args, **options)
        return weight_DK * (float("nan") if options["where"] == "blocks.1.mlp" else 1), bias_D

    fit = closed_form.fit_output
    monkeypatch.setattr(closed_form, "fit_output", broken)
    monkeypatch.setattr(feedback, "fit_output", broken)
    model = build_case("timm-vit").copy()
    with pytest.raises(vitrim.errors.ModelError, match=r"^blocks\.1\.mlp\.fc2\.weight: holds .* NaN or infinite"):
        vitrim.compress(model, data=IMAGES, recipe=RECIPE, quiet=True)
    with pytest.raises(vitrim.errors.ModelError, match=r"^blocks\.1\.mlp\.fc2\.weight: holds .* NaN or infinite"):
        vitrim.prune_(model, "random", [torch.stack(IMAGES)], keep_ratio=0.5, repair=NO_REFIT)
