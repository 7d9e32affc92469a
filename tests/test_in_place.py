"""`prune_`: a live model pruned where it stands is the model that `compress` gives back."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch

import vitrim
from vitrim.errors import DataError, RecipeError, SiteNotFoundError
from vitrim.surgery import apply_

SIZE = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZE).eval()


BATCHES = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)]


def test_it_is_what_the_same_cut_gives_on_a_copy(model):
    by_class = copy.deepcopy(model)
    plan = vitrim.prune_(model, "magnitude", mlp_ratio=1)
    again = vitrim.prune_(by_class, vitrim.methods.Magnitude(), keep_ratio=0.25)
    expected = vitrim.compress(timm_copy(), method="magnitude", mlp_ratio=1, exact=True, quiet=True)
    assert plan.widths == again.widths == expected.plan.widths == {"blocks.0.mlp": 32, "blocks.1.mlp": 32}
    assert [edit.keep for edit in plan.edits] == [edit.keep for edit in expected.plan.edits]
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) and torch.equal(by_class.state_dict()[name], tensor)


def timm_copy():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZE).eval()


def test_without_a_budget_half_of_the_parameters_stay_and_repair_lowers_the_error(model):
    bare, full = copy.deepcopy(model), copy.deepcopy(model)
    repaired = vitrim.prune_(model, "magnitude", BATCHES, repair=vitrim.RepairOptions(refit=False))
    vitrim.prune_(bare, "magnitude", BATCHES)
    total, left = (sum(p.numel() for p in each.parameters()) for each in (full, model))
    unit = 2 * 32 + 1
    assert 0.5 * total - 2 * unit < left <= 0.5 * total and repaired.widths["blocks.0.mlp"] < 128
    images = torch.cat(BATCHES)
    with torch.no_grad():
        wanted = full.forward_features(images)
        errors = [float((each.forward_features(images) - wanted).square().mean()) for each in (model, bare)]
    assert errors[0] < errors[1]


def test_types_modes_and_gradients_are_as_they_were(model):
    model.to(torch.bfloat16).train()
    model.blocks[0].attn.eval()
    vitrim.prune_(model, "dgmr", BATCHES, mlp_ratio=1, repair=vitrim.RepairOptions(refit_steps=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training and model.blocks[1].mlp.training and not model.blocks[0].attn.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_plan_of_it_replays_on_a_fresh_model(model):
    plan = vitrim.prune_(model, "dgmr", BATCHES, hidden_dim=12, repair=vitrim.RepairOptions(refit_steps=2))
    fresh = timm_copy()
    apply_(fresh, plan.edits)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "corp"}, RecipeError, "needs calibration images"),
        ({"method": "dgrm"}, RecipeError, "did you mean 'dgmr'"),
        ({"mlp_ratio": 1, "keep_ratio": 0.5}, RecipeError, "exactly one"),
        ({"batches": []}, DataError, "prune_: there are no images; pass some, or None to go by the weights alone"),
        (
            {"batches": [BATCHES[0].byte()]},
            DataError,
            r"prune_: batch 0 is uint8 \(8, 3, 16, 16\); pass a list of preproc",
        ),
        ({"batches": BATCHES[0]}, DataError, r"prune_: batch 0 is float32 \(3, 16, 16\); pass a list of preprocessed"),
        ({"batches": [(BATCHES[0], None)]}, DataError, "prune_: batch 0 is tuple; pass a list of preprocessed"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_cut(model, given, error, words):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        vitrim.prune_(model, **given)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_an_mlp_is_refused():
    with pytest.raises(SiteNotFoundError):
        vitrim.prune_(torch.nn.Sequential(torch.nn.Linear(4, 4)), "magnitude")


def test_notes_on_the_cut_are_logged(model, caplog):
    caplog.set_level(logging.WARNING, "vitrim")
    vitrim.prune_(model, batches=[BATCHES[0][:1]], keep_ratio=0.5)
    assert "calibration tokens can't determine a fit" in caplog.text
