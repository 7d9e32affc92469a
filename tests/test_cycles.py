"""Blocks that run in cycles (SDPose): what is read behind each, what is distilled, and what one pass costs."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from tests.support.models import timm_vit
from tests.support.people import tiny, write_parquet
from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import open_images
from vitrim.data.poses import PoseSet
from vitrim.errors import ModelError, RecipeError
from vitrim.metrics.judging import read_features, relative_error
from vitrim.models.cycles import Cycle, cycles
from vitrim.models.features import features
from vitrim.recover.cycles import CycleRun
from vitrim.recover.distill import recover_
from vitrim.recover.labels import train_labels_
from vitrim.recover.losses import cycle_loss, heatmap_loss

LABELS = torch.tensor([1, 3])


def classifier():
    torch.manual_seed(0)
    model = timm_vit(depth=3, img_size=16, num_classes=5, class_token=True, global_pool="token").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def joints():
    places = torch.linspace(1, 22, 56).view(2, 14, 2)
    return torch.cat([places, torch.ones(2, 14, 2)], dim=-1)


CASES = {
    "pose": (tiny, torch.randn(2, 3, 32, 24), lambda out: heatmap_loss(out, joints())),
    "classifier": (classifier, torch.randn(2, 3, 16, 16), lambda out: cross_entropy(out, LABELS)),
}


@pytest.fixture(params=CASES)
def subject(request):
    make, images, task = CASES[request.param]
    model = make()
    return model, images, task, [f"blocks.{number}" for number in range(len(model.blocks))]


def test_one_cycle_is_the_model_itself(subject):
    model, images, _, blocks = subject
    [only] = cycles(model, blocks, 1, lambda: model(images))
    assert torch.equal(only.output, model(images))


def test_later_cycles_run_the_blocks_on_what_they_have_put_out(subject):
    model, images, _, blocks = subject
    found = cycles(model, blocks, 3, lambda: model(images))
    for before, after in pairwise(found):
        tokens = before.tokens_BND
        for block in model.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(after.tokens_BND, tokens, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(after.output, model.forward_head(model.norm(tokens)), atol=1e-6, rtol=1e-6)
    assert torch.equal(found[0].output, model(images))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_stem_runs_once_and_each_block_once_a_cycle(subject, count):
    model, images, _, blocks = subject
    calls = []
    for path in ("patch_embed", *blocks):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    model(images)
    assert calls == ["patch_embed", *blocks]  # one pass is what inference costs
    del calls[:]
    ran = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: ran.append(1))
    model.patch_embed.proj.register_forward_hook(lambda *_: ran.append(0))
    cycles(model, blocks, count, lambda: model(images))
    assert ran.count(1) == count * len(blocks) and ran.count(0) == 1


def test_the_loss_of_one_cycle_is_the_tasks(subject):
    model, images, _, blocks = subject
    found = cycles(model, blocks, 1, lambda: model(images))
    assert cycle_loss(model, found, lambda out: out.square().mean()) == model(images).square().mean()


def test_two_cycles_make_one_pair_and_three_make_two():
    model = tiny()
    tokens = [torch.randn(2, 18, 16) for _ in range(3)]
    for count in (2, 3):
        found = [Cycle(each, torch.zeros(())) for each in tokens[:count]]
        wanted = 0.0
        for number in range(count - 1):
            wanted += 0.5 * mse_loss(tokens[number][:, :14], tokens[number + 1][:, :14])
            wanted += 0.25 * mse_loss(tokens[number][:, 14:], tokens[number + 1][:, 14:])
        torch.testing.assert_close(cycle_loss(model, found, lambda out: out, weights=(0.5, 0.25)), wanted)


def test_nothing_is_distilled_only_between_equal_tokens():
    model, tokens = tiny(), torch.randn(2, 18, 16)
    same = [Cycle(tokens, torch.zeros(())), Cycle(tokens.clone(), torch.zeros(()))]
    assert cycle_loss(model, same, lambda out: out) == 0
    for place in (3, 15):
        other = tokens.clone()
        other[0, place, 0] += 1
        assert cycle_loss(model, [same[0], Cycle(other, torch.zeros(()))], lambda out: out) > 0


def test_the_later_cycle_is_pulled_too_unless_detached():
    model = tiny()
    for detach in (False, True):
        tokens = [torch.randn(2, 18, 16, requires_grad=True) for _ in range(2)]
        found = [Cycle(each, torch.zeros(())) for each in tokens]
        cycle_loss(model, found, lambda out: out, detach=detach).backward()
        assert tokens[0].grad is not None and (tokens[1].grad is None) == detach


def test_every_cycle_adds_to_the_gradient_of_the_shared_weights(subject):
    model, images, task, blocks = subject
    weight = model.blocks[0].mlp.fc1.weight

    def gradient(pick):
        found = cycles(model, blocks, 3, lambda: model(images))
        return torch.autograd.grad(cycle_loss(model, pick(found), task, weights=(0, 0)), weight)[0]

    parts = [gradient(lambda found, number=number: [found[number]]) for number in range(3)]
    assert all(part.abs().sum() > 0 for part in parts)
    torch.testing.assert_close(gradient(lambda found: found), sum(parts))


def test_blocks_that_do_not_run_in_this_order_are_refused(subject):
    model, images, _, blocks = subject
    with pytest.raises(ModelError, match="does not run its blocks once each"):
        cycles(model, blocks[::-1], 2, lambda: model(images))


def test_unknown_joints_are_not_learned():
    heatmaps, places = torch.rand(2, 14, 8, 6), joints()
    places[0, 3, 2] = 0
    other = heatmaps.clone()
    other[0, 3] += 1
    assert heatmap_loss(heatmaps, places) == heatmap_loss(other, places)


OPTIONS = {"steps": 4, "batch_size": 4, "lr": 1e-3, "num_validations": 2, "cycles": 2}


def make_students():
    """A classifier of three blocks as the teacher, and one with two of them."""
    teacher = classifier()
    student = copy.deepcopy(teacher)
    student.blocks = student.blocks[:2]
    return teacher.requires_grad_(False), student


def test_features_are_learned_behind_each_cycle_and_judged_behind_the_first():
    teacher, student = make_students()
    options = RecoverOptions(**OPTIONS, cycle_weights=(0.5, 0.25))
    given = {"images": open_images(torch.randn(8, 3, 16, 16)), "held_out": [torch.randn(4, 3, 16, 16)]}
    run = CycleRun(student, teacher, **given, options=options, context=RunContext(quiet=True))
    images = given["held_out"][0]
    target, parts = features(teacher, images), []
    tokens = None
    for _ in range(2):
        tokens = student._pos_embed(student.patch_embed(images)) if tokens is None else tokens
        for block in student.blocks:
            tokens = block(tokens)
        parts.append(student.norm(tokens))
    wanted = sum(mse_loss(part[:, 0], target.pooled_BD) + mse_loss(part[:, 1:], target.patches_BND) for part in parts)
    wanted += 0.5 * mse_loss(parts[0][:, 0], parts[1][:, 0]) + 0.25 * mse_loss(parts[0][:, 1:], parts[1][:, 1:])
    found = read_features(run._reader(), images, "final")
    torch.testing.assert_close(run._compared(found, target), wanted)
    assert run.judge.errors(run._reader())["relative_error"] == pytest.approx(
        relative_error(student, [(images, target)], "final")
    )


def test_a_recovery_in_cycles_betters_one_pass_and_adds_nothing():
    teacher, student = make_students()
    names = [(name, tensor.shape) for name, tensor in student.state_dict().items()]
    images, held_out = open_images(torch.randn(16, 3, 16, 16)), [torch.randn(8, 3, 16, 16)]
    found = recover_(
        student,
        teacher,
        images,
        held_out=held_out,
        options=RecoverOptions(**{**OPTIONS, "steps": 20}),
        context=RunContext(quiet=True),
    )
    assert found.best_error < found.curve[0]["relative_error"]
    assert [(name, tensor.shape) for name, tensor in student.state_dict().items()] == names


def test_joints_are_learned_with_labels_in_cycles(tmp_path):
    model, images = tiny(), open_images(write_parquet(tmp_path / "a.parquet", 16))
    poses = PoseSet(images, model.preprocessing, 14, seed=0)
    held_out = PoseSet(images, model.preprocessing, 14).batches(8)
    options = RecoverOptions(**{**OPTIONS, "steps": 12, "lr": 0.01}, loss="labels")
    found = train_labels_(
        model, poses, held_out=held_out, options=options, loss=heatmap_loss, context=RunContext(quiet=True)
    )
    assert found.best_error < 0.8 * found.curve[0]["relative_error"]
    with torch.no_grad():
        losses = [float(heatmap_loss(model(batch.images_BCHW), batch.labels_B)) for batch in held_out]
    assert sum(losses) / 2 == pytest.approx(found.best_error)


def test_stopped_training_goes_on_bit_for_bit(tmp_path):
    images = open_images(write_parquet(tmp_path / "a.parquet", 12))

    def train(model, *, resume=False, on_validation=None, work=None):
        poses = [PoseSet(images, model.preprocessing, 14, seed=seed) for seed in (0, None)]
        options = RecoverOptions(**{**OPTIONS, "steps": 6, "num_validations": 3}, loss="labels")
        context = RunContext(quiet=True, work=work, resume=resume)
        given = {"held_out": poses[1].batches(6), "options": options, "context": context}
        return train_labels_(model, poses[0], loss=heatmap_loss, on_validation=on_validation, **given)

    def stop(validation):
        if validation.step == 4:
            raise KeyError("stopped")

    whole, stopped, again = tiny(), tiny(), tiny()
    expected = train(whole)
    with pytest.raises(KeyError, match="stopped"):
        train(stopped, on_validation=stop, work=tmp_path)
    found = train(again, work=tmp_path, resume=True)
    assert found.curve == expected.curve
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cycles": 2, "checkpoint_activations": True}, "no checkpoint_activations"),
        ({"cycle_detach": True}, "give cycles, 2 or more"),
        ({"cycles": 2, "cycle_weights": (-1, 0)}, "use 0 or more"),
    ],
)
def test_options_that_say_nothing_are_refused(options, said):
    with pytest.raises(RecipeError, match=said):
        RecoverOptions(steps=1, **options)
