"""Distillation of class probabilities, for models with a head."""

import pytest
import timm
import torch

import vitrim
from tests.support.distillation import HELD_OUT, make_student, make_teacher, run, weights
from vitrim.errors import RecipeError
from vitrim.models.features import features
from vitrim.recover.losses import class_loss


def test_class_scores_are_compared_by_the_divergence_of_probabilities():
    teacher, images = make_teacher(), HELD_OUT[0]
    student = make_student(teacher)
    with torch.no_grad():
        found = [features(model, images, at="logits") for model in (student, teacher)]
        mine, theirs = (torch.softmax(model(images).double(), dim=1) for model in (student, teacher))
        before = float((theirs * (theirs.log() - mine.log())).sum() / len(images))
        assert float(class_loss(*found)) == pytest.approx(before, rel=1e-4)
    start = weights(student)
    result = run(student, teacher, options={"steps": 40, "features_at": "logits"})
    assert result.best_error < 0.8 * result.curve[0]["relative_error"]
    with torch.no_grad():
        assert float(class_loss(features(student, images, at="logits"), found[1])) < 0.8 * before
    assert not torch.equal(start["head.weight"], student.head.weight)


def test_class_scores_need_a_head():
    recipe = {"mlp_ratio": 1, "recover": {"steps": 1, "features_at": "logits"}}
    with pytest.raises(RecipeError, match=r"recover\.features_at: logits needs a model with a class head; use final"):
        vitrim.compress(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0), data="digits", recipe=recipe)
