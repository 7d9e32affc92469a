"""Training with labels: the loss, the optimizers, the schedule, exact resume, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.skeletons import pairs
from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for, open_images
from vitrim.data.inputs import open_inputs
from vitrim.errors import DataError, Interrupted, RecipeError
from vitrim.metrics.classify import top1
from vitrim.models.load import load_model
from vitrim.models.origin import Reading
from vitrim.models.skeleton import Hyperformer
from vitrim.recover.labels import train_labels_
from vitrim.recover.losses import label_loss
from vitrim.recover.schedule import rate_shape

ARGS = {"num_heads": 1, "depth": 2, "num_frames": 8, "num_classes": 3}


def made(**given):
    model, origin = load_model("vitrim/skeleton-hyperformer", reading=Reading(model_args={**ARGS, **given}))
    images = open_inputs(pairs(48), origin)
    train = images.subset(range(36)).augmented(augment_for(origin.preprocessing, "light", flip=False), 0)
    held_out = list(images.subset(range(36, 48)).loader(batch_size=6))
    return model, train, held_out


def trained(model, train, held_out, *, context=None, on_validation=None, **given):
    options = {"steps": 20, "batch_size": 12, "optimizer": "sgd", "lr": 0.1, "num_validations": 4, **given}
    options = RecoverOptions(loss="labels", **options)
    context = replace(context or RunContext(), quiet=True)
    return train_labels_(model, train, held_out=held_out, options=options, context=context, on_validation=on_validation)


def test_label_loss_is_the_mean_of_minus_the_logarithm_of_the_right_class():
    scores, labels = torch.randn(4, 3), torch.tensor([0, 2, -1, 1])
    wanted = -sum(float(scores[n].softmax(0)[y].log()) for n, y in enumerate(labels) if y >= 0) / 4
    assert float(label_loss(scores, labels)) == pytest.approx(wanted, rel=1e-5)


def test_the_rate_warms_up_and_falls_to_a_tenth_at_each_drop():
    rates = [rate_shape(step, 20, 0.1, drops=(0.5, 0.75)) for step in range(20)]
    assert rates[:2] == [0.5, 1.0] and rates[2:10] == [1.0] * 8
    assert rates[10:15] == pytest.approx([0.1] * 5) and rates[15:] == pytest.approx([0.01] * 5)


def test_a_model_learns_made_up_actions_and_keeps_its_best_state():
    model, train, held_out = made()
    result = trained(model, train, held_out, steps=40)
    errors = [point["relative_error"] for point in result.curve]
    assert result.optimizer == "sgd" and result.best_error == min(errors) < 0.8 * errors[0]
    assert top1(model, held_out) >= 0.6
    assert not model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not torch.equal(model.data_bn.running_mean, torch.zeros(60))  # batch norms were in training mode


def test_steps_of_sgd_are_those_written_out_by_hand():
    model, train, held_out = made()
    by_hand = copy.deepcopy(model).train()
    images = torch.stack([train[n][0] for n in range(36)])
    labels = torch.tensor([train[n][1] for n in range(36)])
    velocity = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    for _ in range(3):
        by_hand.zero_grad()
        label_loss(by_hand(images), labels).backward()
        norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
        for name, p in by_hand.named_parameters():
            gradient = p.grad * min(1.0, 1.0 / float(norm + 1e-6)) + (0.01 * p.detach() if p.ndim > 1 else 0)
            velocity[name] = 0.9 * velocity[name] + gradient
            p.data -= 0.05 * (gradient + 0.9 * velocity[name])
    still = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    given = {"steps": 3, "batch_size": 36, "lr": 0.05, "warmup_ratio": 0.0, "drops": (1.0,), "num_validations": 1}
    result = trained(model, open_images(still), held_out, weight_decay=(0.01, 0.01), **given)
    assert result.best_step == 3
    for (name, mine), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3, msg=name)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    model, train, held_out = made()
    whole, stopped = copy.deepcopy(model), copy.deepcopy(model)
    drop_out = nn.Dropout(0.2)
    for each in (whole, stopped):
        each.head = nn.Sequential(drop_out, each.head)
    trained(whole, train, held_out)
    again = copy.deepcopy(stopped)

    def stop(validation):
        if validation.step == 10:
            raise Interrupted("stopped here")

    context = RunContext(work=tmp_path)
    with pytest.raises(Interrupted):
        trained(stopped, train, held_out, context=context, on_validation=stop)
    trained(again, train, held_out, context=replace(context, resume=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_loss_of_the_task_is_given_the_models_own_output():
    model, train, held_out = made()
    seen = []

    def squared(output, labels_B):
        seen.append(tuple(output.shape))
        return (output.mean(1) - labels_B).square().mean()

    options = RecoverOptions(loss="labels", steps=2, batch_size=12, optimizer="adamw", lr=1e-3)
    train_labels_(model, train, held_out=held_out, options=options, context=RunContext(quiet=True), loss=squared)
    assert (12, 3) in seen


def test_labels_out_of_range_or_missing_and_options_of_a_teacher_are_refused():
    model, train, held_out = made()
    with pytest.raises(DataError, match=r"label 2 is outside of the 2 classes of the head; use 0\.\.1"):
        trained(Hyperformer(**{**ARGS, "num_classes": 2}), train, held_out)
    bare = [batch._replace(labels_B=torch.full_like(batch.labels_B, -1)) for batch in held_out]
    with pytest.raises(DataError, match="no held-out image has a label"):
        trained(model, train, bare)
    with pytest.raises(DataError, match="has no labels to train with"):
        trained(model, train.relabelled((), None), held_out)
    with pytest.raises(RecipeError, match="cache_teacher: goes with distillation"):
        trained(model, train, held_out, optimizer="adamw", cache_teacher=True)
