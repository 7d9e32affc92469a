"""Relaxed Recursive Transformers (arXiv 2410.20672): blocks looped, each depth with low-rank factors of its own."""

import copy
from importlib.resources import files

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vitrim
from tests.support.distillation import assert_equal, weights
from tests.support.distillation import run as distil
from tests.support.models import timm_vit
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs
from vitrim.errors import BudgetError, CheckpointError, RecipeError, SiteNotFoundError
from vitrim.layers.recursive import RecursiveLinear, Shared
from vitrim.models.sites import find_mlps
from vitrim.output.export import _multiplied_out
from vitrim.repair.relative_steps import RelativeSteps
from vitrim.surgery import ToRecursive, apply_

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def deep(depth=6):
    """A ViT of six blocks, all values random."""
    torch.manual_seed(0)
    model = timm_vit(depth=depth, init_values=0.5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def cut(model, *, keep_ratio=None, **options):
    student = copy.deepcopy(model)
    budget = {"keep_ratio": keep_ratio, "round_to": 1} if keep_ratio else {}
    values = {"method": "recursive", "options": options, **budget}
    return student, cut_(student, model, find_mlps(model), Recipe.parse(values), None, quiet=True)


def weight(model, block, layer):
    return model.get_submodule(f"blocks.{block}.{layer}").weight.detach().double()


def residual(student, model):
    """Squared error of all matrices."""
    pairs = [(weight(student, b, n), weight(model, b, n)) for b in range(6) for n in LAYERS]
    return sum(float((mine - theirs).square().sum()) for mine, theirs in pairs)


@pytest.mark.parametrize("start", ["stepwise", "average", "lower"])
def test_at_full_rank_with_norms_of_their_own_the_model_is_what_it_was(start, run):
    model = deep()
    student, _ = cut(model, num_blocks=3, rank=32, norms="own", start=start)
    torch.testing.assert_close(run(student, IMAGES), run(model, IMAGES), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("start", "sources"), [("stepwise", (0, 2, 5)), ("lower", (0, 1, 2)), ("average", None)])
def test_without_factors_it_is_the_tied_model(start, sources, run):
    model = deep()
    student, _ = cut(model, num_blocks=3, rank=0, start=start)
    slow, states = copy.deepcopy(model), [block.state_dict() for block in model.blocks]
    for number, block in enumerate(slow.blocks):
        which = number % 3
        pairs = [states[sources[which]]] if sources else [states[which], states[which + 3]]
        block.load_state_dict({name: sum(state[name] for state in pairs) / len(pairs) for name in states[0]})
    torch.testing.assert_close(run(student, IMAGES), run(slow, IMAGES), atol=1e-5, rtol=1e-5)
    names = [name for name in student.state_dict() if name.startswith(("blocks.3", "blocks.4", "blocks.5"))]
    assert not names  # nothing stands there that the first three do not own


@pytest.mark.parametrize("start", ["stepwise", "average", "lower"])
def test_what_is_lost_are_the_singular_values_behind_the_rank_and_it_falls(start):
    model = deep()
    bare = cut(model, num_blocks=2, rank=0, start=start)[0]
    found = []
    for rank in (0, 3, 8, 32):
        student = cut(model, num_blocks=2, rank=rank, start=start)[0]
        sigma = [torch.linalg.svdvals(weight(model, b, n) - weight(bare, b, n)) for b in range(6) for n in LAYERS]
        expected = sum(float(values[rank:].square().sum()) for values in sigma)
        found.append(residual(student, model))
        assert found[-1] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found == sorted(found, reverse=True)


def test_the_mean_leaves_the_least_over_and_zero_starts_leave_all_of_it():
    model = deep()
    lost = {start: residual(cut(model, num_blocks=3, rank=0, start=start)[0], model) for start in ("stepwise", "lower")}
    mean = residual(cut(model, num_blocks=3, rank=0)[0], model)
    assert mean < min(lost.values())
    zero, _ = cut(model, num_blocks=3, rank=4, factors="zero")
    assert residual(zero, model) == pytest.approx(mean)
    layer = zero.blocks[4].mlp.fc1
    assert not layer.up.any() and float(layer.down.detach().std()) == pytest.approx(32**-0.5, rel=0.2)
    tied = cut(model, num_blocks=3, rank=4, start="lower")[0].blocks  # nothing is left of the first three
    assert not tied[1].mlp.fc1.up.any() and tied[1].mlp.fc1.down.any() and tied[4].mlp.fc1.up.any()


def test_parameters_stand_once_gradients_add_up_and_macs_are_those_of_all_blocks():
    model = deep()
    student, _ = cut(model, num_blocks=3, rank=4)
    matrices, factors = 3 * (96 * 32 + 32 * 32 + 2 * 96 * 32), 6 * 4 * ((96 + 32) * 3 + 64)
    looped = sum(p.numel() for p in student.blocks.parameters())
    rest = sum(p.numel() for b in model.blocks[:3] for p in b.parameters()) - matrices
    assert looped == matrices + factors + rest
    student(IMAGES).square().sum().backward()
    owner = student.blocks[1].mlp.fc1
    apart = copy.deepcopy(student)
    apart.zero_grad()
    user = apart.blocks[4].mlp.fc1
    user._parameters["shared"] = torch.nn.Parameter(user.shared.detach().clone())
    apart(IMAGES).square().sum().backward()
    total = apart.blocks[1].mlp.fc1.shared.grad + user.shared.grad
    assert user.shared.grad.any()
    torch.testing.assert_close(owner.shared.grad, total, atol=1e-3, rtol=1e-3)
    plain = cut(model, num_blocks=3, rank=0)[0]
    assert count_macs(plain, IMAGES[:1]) == count_macs(model, IMAGES[:1])


def test_the_budget_pays_for_blocks_first_then_for_ranks():
    model, dense = deep(), 96 * 32 + 32 * 32 + 2 * 96 * 32
    for share, blocks in ((0.2, 1), (0.5, 3), (0.8, 3), (0.4, 2)):
        student, report = cut(model, keep_ratio=share)
        assert len(report.plan.edits) == blocks
        stored = sum(
            parameter.numel()
            for module in student.modules()
            if isinstance(module, RecursiveLinear)
            for name, parameter in module.named_parameters()
            if name != "bias"
        )
        assert share - 0.1 < stored / (6 * dense) <= share + 0.01


def test_ranks_by_singular_values_cost_no_more_and_lose_less():
    model = deep()
    with torch.no_grad():
        for block in model.blocks[::2]:
            block.mlp.fc1.weight += torch.randn(96, 1) @ torch.randn(1, 32)
    equal, allotted = (cut(model, num_blocks=3, rank=6, norms="own", ranks=ranks)[0] for ranks in ("equal", "singular"))
    sizes = [sum(p.numel() for p in student.parameters()) for student in (equal, allotted)]
    assert 0.99 * sizes[0] <= sizes[1] <= sizes[0]

    def lost(student):
        pairs = [(weight(student, b, n), weight(model, b, n)) for b in range(6) for n in LAYERS]
        return sum(float((a - b).square().sum() / b.square().sum()) for a, b in pairs)

    assert lost(allotted) < lost(equal)


def test_what_can_not_be_is_refused_in_a_line():
    model = deep()
    for options, error, message in (
        ({"num_blocks": 4, "rank": 2}, RecipeError, "4 does not divide 6 blocks; use one of 1, 2, 3, 6"),
        ({"num_blocks": 3, "rank": 33}, BudgetError, r"33 is above the 32 of the blocks' matrices; use 0\.\.32"),
        ({"num_blocks": 3, "keep_ratio": 0.4}, BudgetError, r"does not pay for 3 of 6 blocks.*use 0\.5 or more"),
        ({"num_blocks": 2, "keep_ratio": 0.333}, BudgetError, r"a share of 0\.333 does not .*use 0\.334 or more"),
    ):
        with pytest.raises(error, match=message):
            cut(model, **options)
    with torch.no_grad():
        model.blocks[2].mlp.fc1 = torch.nn.Linear(32, 48)
        model.blocks[2].mlp.fc2 = torch.nn.Linear(48, 32)
    with pytest.raises(SiteNotFoundError, match=r"blocks\.2: has other shapes than blocks\.0"):
        cut(model, num_blocks=3, rank=2)
    _, report = cut(deep(), num_blocks=6, rank=2)
    assert not report.plan.edits and "nothing is looped" in report.notes[0]


@pytest.mark.parametrize(
    ("method", "size", "message"),
    [
        ("recursive", {"mlp_ratio": 1}, "mlp_ratio: says nothing about what recursive cuts; give keep_ratio or params"),
        ("recursive", {"macs_ratio": 0.5}, "macs_ratio: says nothing about what recursive cuts; give keep_ratio"),
        ("recursive", {"widths": {"blocks.0.mlp": 16}}, "widths: says nothing about what recursive cuts"),
        ("tome", {"hidden_dim": 16}, "hidden_dim: says nothing about what tome cuts; give keep_ratio"),
        ("replace-me", {"mlp_ratio": 1}, "mlp_ratio: says nothing about what replace-me cuts; give keep_ratio"),
    ],
)
def test_a_size_that_says_nothing_about_what_is_cut_is_refused(method, size, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({"method": method, **size})


def test_the_share_is_that_of_loops_and_no_mlp_rounds_it():
    model, dense = deep(), 96 * 32 + 32 * 32 + 2 * 96 * 32
    factors = 3 * (96 + 32) + 64  # of a rank, in a block
    for rank in (1, 2, 3):
        share = (3 * dense + 6 * rank * factors) / (6 * dense)  # widths in steps of 16 of 96 could not say it
        recipe = Recipe.parse({"method": "recursive", "keep_ratio": share})
        report = cut_(copy.deepcopy(model), model, find_mlps(model), recipe, None, quiet=True)
        assert {ranks for edit in report.plan.edits for ranks in edit.ranks} == {(rank,) * 4}
    found = vitrim.compress(model, method="recursive", params_ratio=0.6, quiet=True)
    before, after = found.metrics.before.parameters, found.metrics.after.parameters
    assert 0.6 * before - 6 * factors < after <= 0.6 * before  # one rank more would be too much


def test_an_edit_that_does_not_fit_is_refused_and_changes_nothing():
    model = deep()
    edit = cut(model, num_blocks=3, rank=2)[1].plan.edits[0]
    for change, error, message in (
        ({"paths": ("blocks.0", "blocks.0")}, BudgetError, "two different blocks"),
        ({"sizes": edit.sizes[1:]}, BudgetError, "sizes and ranks for each"),
        ({"ranks": ((40,) * 4,) * 2}, BudgetError, r"rank 40 beside it; use 0\.\.32"),
        ({"layers": ("attn.qkv", "attn.proj", "mlp.fc1", "norm1")}, SiteNotFoundError, "is no linear layer"),
        ({"tied": ("attn.scale",)}, SiteNotFoundError, "has modules of its own"),
        ({"tensors": {}}, CheckpointError, "the plan does not hold it"),
    ):
        with pytest.raises(error, match=message):
            apply_(model, [ToRecursive(**{**edit.__dict__, **change})])
    assert not any(isinstance(module, RecursiveLinear) for module in model.modules())


def test_blocks_in_shards_are_refused():
    student, _ = cut(deep(2), num_blocks=1, rank=2)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for block in student.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        with pytest.raises(RecipeError, match=r"recover\.fsdp: blocks that share tensors"):
            student(IMAGES)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("given", [{"optimizer": "relative", "lr": 0.003}, {}, {"lr": None, "optimizer": "relative"}])
def test_stopped_distillation_behind_it_goes_on_bit_for_bit(tmp_path, given):
    model = timm_vit(depth=4, img_size=16)
    start, _ = cut(model, num_blocks=2, rank=2, start="lower", norms="own")
    options = {"steps": 9, "num_validations": 9, **given}
    whole, stopped, again = (copy.deepcopy(start) for _ in range(3))
    expected = distil(whole, model, options=options)

    def interrupt(found):
        if found.step == 4:
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        distil(stopped, model, options=options, work=tmp_path, on_validation=interrupt)
    found = distil(again, model, options=options, work=tmp_path, resume=True)
    assert_equal(weights(whole), weights(again))
    assert found.curve == expected.curve and found.improved
    layer, before = whole.blocks[0].mlp.fc1, start.blocks[0].mlp.fc1
    assert not before.up.any() and layer.up.any() and not torch.equal(layer.shared, before.shared)


def test_a_step_of_factors_is_a_share_of_what_they_are_added_to():
    layer = cut(deep(), num_blocks=3, rank=4, factors="zero")[0].blocks[4].mlp.fc1
    with torch.no_grad():
        layer.down.copy_(torch.linalg.qr(torch.randn(32, 4))[0].T)
        expected = float(layer.shared.norm()) * (4 / 32) ** 0.5
        assert layer.norms()[layer.up] == pytest.approx(expected)
        layer.down.mul_(3)
    assert layer.norms()[layer.up] == pytest.approx(expected / 3)
    steps = RelativeSteps(layer, [layer.up, layer.down], norms=layer.norms())
    layer.up.grad, layer.down.grad = torch.randn_like(layer.up), torch.zeros_like(layer.down)
    steps.param_groups[0]["lr"] = 0.01
    steps.step()
    assert float((layer.up @ layer.down).detach().norm()) == pytest.approx(0.01 * expected, rel=0.05)


@pytest.mark.fresh
def test_it_is_distilled_written_and_loaded_in_a_fresh_process(tmp_path):
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    recipe = {"method": "recursive", "keep_ratio": 0.6, "recover": {"steps": 3, "lr": 1e-4, "batch_size": 16}}
    found = vitrim.compress(model, data="digits", recipe=recipe, out=tmp_path / "out", quiet=True)
    assert found.metrics.reload_difference <= 1e-6 and not found.metrics.stock
    assert found.metrics.after.parameters < 0.75 * found.metrics.before.parameters
    loaded = vitrim.load(tmp_path / "out")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), found.model(images))


def test_its_graph_has_plain_layers_in_every_block(run):
    student, _ = cut(deep(), num_blocks=3, rank=2)
    expected = run(student, IMAGES)
    plain = _multiplied_out(copy.deepcopy(student))
    assert not any(isinstance(module, RecursiveLinear | Shared) for module in plain.modules())
    graph = torch.export.export(plain, (IMAGES,)).module()
    torch.testing.assert_close(graph(IMAGES).detach(), expected, atol=1e-4, rtol=1e-4)
