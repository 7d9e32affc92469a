"""Blocks that run in cycles (SDPose): what is read behind each, what is distilled, and what one pass costs."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from tests.support.models import timm_vit
from tests.support.people import tiny
from vitrim.errors import ModelError
from vitrim.models.cycles import Cycle, cycles
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
