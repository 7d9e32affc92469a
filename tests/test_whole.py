"""A budget that keeps everything returns the original bit for bit, whatever the method and the door."""

import copy

import pytest
import torch

import vitrim
from tests.support.checkpoints import IMAGES, VIT, tensors_of, timm_folder
from tests.support.models import build_case
from vitrim.methods import METHODS

CUTTING = [name for name, method in METHODS.items() if method.takes != "nothing"]
BATCHES = [torch.stack(IMAGES[:8]), torch.stack(IMAGES[8:16])]
WHOLE = "every hidden unit stays, so nothing was cut or repaired."


def differing(model, original):
    """Names of the tensors that are not the original's, by type, shape and bits."""
    mine, theirs = model.state_dict(), original.state_dict()
    names = mine.keys() | theirs.keys()
    return sorted(
        name
        for name in names
        if not (name in mine and name in theirs and mine[name].dtype == theirs[name].dtype)
        or not torch.equal(mine[name], theirs[name])
    )


@pytest.mark.parametrize("name", CUTTING)
def test_compress_and_prune_in_place_change_nothing(name):
    original = build_case("timm-vit").model
    found = vitrim.compress(original, data=IMAGES[:16], method=name, keep_ratio=1, quiet=True)
    assert differing(found.model, original) == []
    assert found.metrics.after_cut.relative_error == 0
    assert any("stay" in note or "whole" in note or "nothing was" in note for note in found.metrics.notes)
    pruned = copy.deepcopy(original)
    vitrim.prune_(pruned, name, BATCHES, keep_ratio=1)
    assert differing(pruned, original) == []


@pytest.mark.parametrize("options", [{"parts": "both"}, {"parts": "attention"}])
def test_corp_leaves_attention_whole_too(options):
    original = build_case("timm-vit").model
    pruned = copy.deepcopy(original)
    vitrim.prune_(pruned, vitrim.methods.Corp(**options), BATCHES, keep_ratio=1)
    assert differing(pruned, original) == []


@pytest.mark.parametrize(
    ("budget", "dtype"),
    [
        ({"params_ratio": 1}, torch.bfloat16),
        ({"macs_ratio": 1}, torch.float16),
        ({"mlp_ratio": 3}, torch.float32),
        ({"hidden_dim": 96}, torch.float64),
    ],
)
def test_every_way_to_keep_everything_in_every_type(budget, dtype):
    original = build_case("timm-vit").copy().to(dtype)
    found = vitrim.compress(original, data=IMAGES[:16], repair=True, quiet=True, **budget)
    assert differing(found.model, original) == [] and WHOLE in found.metrics.notes


@pytest.mark.parametrize(("name", "data"), [("random", None), ("dgmr-paper", None), ("dgmr", IMAGES[:16])])
def test_file_to_file_writes_the_same_tensors(tmp_path, name, data):
    source = timm_folder(tmp_path / "source", "vit_tiny_patch16_224", VIT, torch.float16)
    found = vitrim.prune_checkpoint(source, tmp_path / "out", method=name, keep_ratio=1, data=data, quiet=True)
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert list(found.metrics.notes) == [WHOLE]


def test_a_later_step_that_repairs_still_does(build):
    original = build("timm-vit").model
    rest = {"method": "dgmr", "keep_ratio": 1, "repair": {"refit": False}}
    steps = [{"method": "random", "keep_ratio": 0.5, "repair": False}, rest]
    found = vitrim.compress(original, data=IMAGES[:16], recipe={"steps": steps}, quiet=True)
    assert WHOLE not in found.metrics.notes and len(found.metrics.cut_errors) == 2
