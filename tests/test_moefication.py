"""MoEfication (arXiv 2110.01786): experts of equal size, routers, and ReLU in place of GELU."""

from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn

import vitrim
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, CheckpointError, SiteNotFoundError
from vitrim.layers.moefication import ExpertMlp, Router
from vitrim.methods import Moefication, moefication
from vitrim.methods.moefication import captured_share, expert_scores
from vitrim.models.sites import find_mlps
from vitrim.ops.balanced_kmeans import assign_equally, balanced_kmeans, exchange
from vitrim.surgery import Plan, ReplaceActivation, ToMoefication, apply_, mlp_output, read_weights
from vitrim.surgery.replace_activation import find_activation
from vitrim.types import MlpWeights

ALL = 99


def split(case, **options):
    student = case.copy()
    sizes = {site.d_hidden for site in case.sites}
    number = next(number for number in (4, 5) if all(size % number == 0 for size in sizes))
    given = {"num_experts": number, "epochs": 2, **options}
    given["num_active"] = min(number, given["num_active"])
    recipe = Recipe.parse({"method": "moefication", "options": given})
    return student, cut_(student, case.model, case.sites, recipe, case.batches, quiet=True).plan


def can_be_split(case):
    return all(
        site.norm is None and site.value.startswith(f"{site.path}.") and site.output.startswith(f"{site.path}.")
        for site in case.sites
    )


@pytest.mark.parametrize("router", ["mlp", "similarity", "oracle"])
def test_moefication_with_all_experts_active_is_the_dense_model(kind, router, run):
    if not can_be_split(kind):
        with pytest.raises(SiteNotFoundError, match=r"over all hidden units|spread over"):
            split(kind, num_active=ALL, router=router)
        return
    student, plan = split(kind, num_active=ALL, router=router)
    torch.testing.assert_close(run(student, kind.batches[0]), run(kind.model, kind.batches[0]), atol=1e-5, rtol=1e-5)
    for edit in plan.edits:
        assert sorted(edit.order) == list(range(edit.site.d_hidden)) and edit.site.d_hidden % edit.num_experts == 0


def test_moefication_gathered_tokens_equal_the_masked_form(kind):
    """The slow way: the whole MLP, hidden units outside of a token's experts set to zero."""
    if not can_be_split(kind):
        pytest.skip("refused, see above")
    student, plan = split(kind, num_active=2)
    for edit in plan.edits:
        experts = student.get_submodule(edit.site.path)
        tokens = torch.randn(1, 7, edit.site.d_model, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            chosen = experts.router(tokens[0]).topk(2, dim=-1).indices
            size = edit.site.d_hidden // edit.num_experts
            mask = torch.zeros(7, edit.num_experts).scatter(-1, chosen, 1.0).repeat_interleave(size, dim=1)
            layer = experts.mlp.get_submodule(experts.output)
            hook = layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
            expected = experts.mlp(tokens)
            hook.remove()
            shapes = []
            hook = layer.register_forward_pre_hook(lambda _, args, shapes=shapes: shapes.append(args[0].shape))
            torch.testing.assert_close(experts(tokens), expected, atol=1e-5, rtol=1e-5)
            hook.remove()
        assert sum(shape[1] for shape in shapes) == 7 * 2 and {shape[2] for shape in shapes} == {size}


class Tiny(nn.Module):
    """One residual MLP block with a ReLU, whose units fire rarely."""

    def __init__(self, act=None):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(8, 24), act or nn.ReLU(), nn.Linear(24, 8)
        with torch.no_grad():
            self.mlp.fc1.bias -= 0.8

    def forward(self, tokens):
        return tokens + self.mlp(tokens)


def tiny_edit(model, *, num_active, router="oracle", **more):
    (site,) = find_mlps(model)
    order = balanced_kmeans(model.mlp.fc1.weight.detach(), 6).argsort(stable=True)
    return ToMoefication(
        site=site, order=tuple(order.tolist()), num_experts=6, num_active=num_active, router=router, **more
    )


def test_moefication_of_a_relu_is_exact_once_every_expert_with_an_active_unit_runs():
    model, tokens = Tiny(), torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens)
        edit = tiny_edit(model, num_active=1)
        hidden = model.mlp.act(model.mlp.fc1(tokens)).flatten(0, 1)[:, list(edit.order)]
        needed = (hidden.view(-1, 6, 4) > 0).any(-1).sum(-1)
        for num_active in (1, 3, 5):
            small = Tiny()
            apply_(small, [tiny_edit(model, num_active=num_active)])
            exact = (small(tokens) - expected).abs().flatten(0, 1).amax(-1) < 1e-5
            assert exact[needed <= num_active].all()
            assert num_active == 5 or not exact.all()


def test_moefication_oracle_captures_at_least_what_any_router_does():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, 8, generator=generator)
    oracle = captured_share(scores, scores, 3)
    assert all(captured_share(torch.randn(200, 8, generator=generator), scores, 3) <= oracle for _ in range(20))
    best = scores.sort(dim=1, descending=True).values[:, :3].sum() / scores.sum()
    assert oracle == pytest.approx(float(best))


def test_moefication_oracle_of_a_relu_layer_runs_the_experts_with_the_most_activation():
    """The slow way, and no router captures more; by norms of outputs, some would."""
    model, tokens = Tiny(), torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    edit = tiny_edit(model, num_active=2, score="sum")
    hidden = model.mlp.act(model.mlp.fc1(tokens)).detach()[:, list(edit.order)]
    mass = torch.stack([hidden[:, 4 * expert : 4 * expert + 4].sum(1) for expert in range(6)], dim=1)
    weight = model.mlp.fc2.weight.detach()[:, list(edit.order)]
    expected = model.mlp.fc2.bias.detach().repeat(60, 1)
    for token, chosen in enumerate(mass.topk(2, dim=1).indices.tolist()):
        for unit in (4 * expert + offset for expert in chosen for offset in range(4)):
            expected[token] += hidden[token, unit] * weight[:, unit]
    apply_(model, [edit])
    outputs, scores = model.mlp.contributions(tokens)
    torch.testing.assert_close(model.mlp(tokens), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores, mass, atol=1e-5, rtol=1e-5)
    others = [outputs.norm(dim=-1), Router(8, 6, kind="mlp")(tokens), Router(8, 6, kind="similarity")(tokens)]
    assert all(captured_share(other, mass, 2) < captured_share(scores, mass, 2) for other in others)


def test_moefication_oracle_of_a_token_goes_by_no_other_token(kind):
    """The kind of score is chosen when the experts are split, not by what happens to be in a batch."""
    if not can_be_split(kind):
        pytest.skip("refused, see above")
    student, plan = split(kind, num_active=1, router="oracle")
    layer, d_model = student.get_submodule(plan.edits[0].site.path), plan.edits[0].site.d_model
    tokens = torch.randn(64, d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([layer(token[None]) for token in tokens])
        torch.testing.assert_close(layer(tokens), alone, atol=1e-5, rtol=1e-5)
    assert {edit.score for edit in plan.edits} == {"norm"}  # neither GELU nor a gate is a ReLU
    relu = Tiny()
    recipe = Recipe.parse({"method": "moefication", "options": {"num_experts": 6, "num_active": 1, "epochs": 1}})
    (edit,) = cut_(relu, Tiny(), find_mlps(relu), recipe, [torch.randn(40, 8)], quiet=True).plan.edits
    assert edit.score == "sum" and relu.mlp.score == "sum"


def test_moefication_keeps_the_best_epoch_of_the_router_not_the_second_best(monkeypatch):
    shares = [0.2, 0.5, 0.9, 0.7, 0.6]  # before training, then epoch by epoch
    states, router = [], Router(8, 4, kind="mlp")

    def judge(*_):
        states.append({name: tensor.clone() for name, tensor in router.state_dict().items()})
        return shares[len(states) - 1]

    monkeypatch.setattr(moefication, "captured_share", judge)
    generator = torch.Generator().manual_seed(0)
    inputs, scores = torch.randn(64, 8, generator=generator), torch.rand(64, 4, generator=generator)
    moefication._train_(router, inputs, scores, 1, Moefication(epochs=4), generator)
    assert len(states) == 5 and not torch.equal(states[2]["first.weight"], states[3]["first.weight"])
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in router.state_dict().items())


def test_moefication_scores_are_activation_mass_for_a_relu_and_output_norms_else():
    generator = torch.Generator().manual_seed(0)
    hidden, output = torch.randn(5, 6, generator=generator), torch.randn(3, 6, generator=generator)
    weights = MlpWeights(value_HD=torch.zeros(6, 3), output_DH=output)
    order = torch.tensor([5, 0, 3, 1, 2, 4])
    found = expert_scores(weights, hidden, order, 2, "norm")
    for token in range(5):
        for expert, units in enumerate(([5, 0, 3], [1, 2, 4])):
            put_out = sum(hidden[token, unit] * output[:, unit] for unit in units)
            assert float(found[token, expert]) == pytest.approx(float(put_out.norm()), rel=1e-5)
    positive = expert_scores(weights, hidden.abs(), order, 2, "sum")
    assert float(positive[0, 0]) == pytest.approx(float(hidden[0, [5, 0, 3]].abs().sum()))


def test_moefication_router_is_trained_on_raw_tokens_and_never_worse_than_its_centroids(build):
    """Targets from normalised tokens would be wrong: with biases an MLP is no homogeneous function."""
    case = build("timm-vit")
    student, plan = split(case, num_active=1, epochs=30, num_tokens=10**6)
    plain, plain_plan = split(case, num_active=1, router="similarity")
    site = case.sites[0]
    inputs, hidden = [], []
    hooks = [
        case.model.get_submodule(site.value).register_forward_pre_hook(
            lambda _, args: inputs.append(args[0].flatten(0, 1))
        ),
        case.model.get_submodule(site.output).register_forward_pre_hook(
            lambda _, args: hidden.append(args[0].flatten(0, 1))
        ),
    ]
    with torch.no_grad():
        for batch in case.batches:
            case.model(batch)
    for hook in hooks:
        hook.remove()
    shares = []
    for model, edits in ((student, plan.edits), (plain, plain_plan.edits)):
        scores = expert_scores(
            read_weights(case.model, site), torch.cat(hidden), torch.tensor(edits[0].order), 4, edits[0].score
        )
        with torch.no_grad():
            shares.append(captured_share(model.get_submodule(site.path).router(torch.cat(inputs)), scores, 1))
    assert shares[0] > shares[1]
    router = student.get_submodule(site.path).router
    tokens = torch.randn(3, 32)
    assert torch.allclose(router(tokens), router(7 * tokens), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 5), num_clusters=st.integers(1, 5), seed=st.integers(0, 1000))
def test_moefication_clusters_have_equal_size_and_share_all_units(size, num_clusters, seed):
    rows = torch.randn(size * num_clusters, 3, generator=torch.Generator().manual_seed(seed))
    labels = balanced_kmeans(rows, num_clusters, seed=seed)
    assert labels.bincount(minlength=num_clusters).tolist() == [size] * num_clusters
    assert torch.equal(labels, balanced_kmeans(rows, num_clusters, seed=seed))


def test_equal_assignment_is_near_the_optimum():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        costs = torch.rand(60, 6, generator=generator)
        labels = exchange(costs, assign_equally(costs))
        assert labels.bincount().tolist() == [10] * 6
        rows, columns = linear_sum_assignment(costs.repeat_interleave(10, dim=1).numpy())
        best = costs.repeat_interleave(10, dim=1)[rows, columns].sum()
        assert float(costs.gather(1, labels[:, None]).sum()) <= 1.03 * float(best)


def test_clear_clusters_are_found():
    centres = 10 * torch.eye(4)
    rows = centres.repeat(6, 1) + 0.1 * torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    labels = balanced_kmeans(rows, 4, seed=3)
    assert {tuple(sorted(labels[i::4].tolist())) for i in range(4)} == {(label,) * 6 for label in range(4)}
    with pytest.raises(BudgetError, match="divisor of 24"):
        balanced_kmeans(rows, 5)


def test_moefication_by_activity_puts_units_together_that_fire_together(build):
    student, plan = split(build("timm-vit"), num_active=2, split="activity")
    assert plan.edits[0].order != split(build("timm-vit"), num_active=2)[1].edits[0].order
    assert isinstance(student.get_submodule(plan.edits[0].site.path), ExpertMlp)


def test_moefication_costs_what_the_paper_says():
    """(k / E) of the MLP's products and 2 (d E + E^2) operations of the router for each token."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Tiny()
    router = Router(8, 6, kind="mlp")
    tensors = {f"mlp.router.{name}": tensor for name, tensor in router.state_dict().items()}
    apply_(model, [tiny_edit(model, num_active=2, router="mlp", tensors=tensors)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 50, 8))
    dense = 50 * 2 * (8 * 24 + 24 * 8)
    assert counter.get_total_flops() == dense * 2 // 6 + 50 * 2 * (8 * 6 + 6 * 6)


def test_gradients_reach_router_free_weights_of_chosen_experts_only():
    model = Tiny()
    apply_(
        model,
        [tiny_edit(model, num_active=6 - 1, router="similarity", tensors={"mlp.router.first.weight": torch.eye(6, 8)})],
    )
    model(torch.randn(1, 30, 8)).square().sum().backward()
    assert model.mlp.mlp.fc1.weight.grad is not None and model.mlp.mlp.fc2.bias.grad is not None


def test_experts_are_refused_where_they_cannot_be():
    model = Tiny()
    (site,) = find_mlps(model)
    order = tuple(range(24))
    for wrong in ({"num_experts": 5, "num_active": 1}, {"num_experts": 4, "num_active": 5}):
        with pytest.raises(BudgetError, match="experts; use a number that divides 24 units"):
            apply_(model, [ToMoefication(site=site, order=order, **wrong)])
    with pytest.raises(BudgetError, match="each of its 24 units once"):
        apply_(model, [ToMoefication(site=site, order=order[:-1], num_experts=1, num_active=1)])
    with pytest.raises(CheckpointError, match="the plan does not hold it"):
        apply_(Tiny(), [ToMoefication(site=site, order=order, num_experts=4, num_active=1)])
    apply_(model, [tiny_edit(model, num_active=1)])
    with pytest.raises(SiteNotFoundError):  # the units of experts are no units to be cut
        find_mlps(model)


def test_relufy_puts_a_relu_where_the_activation_was(kind, run):
    student = kind.copy()
    sites = [site for site in kind.sites]
    try:
        [find_activation(student, site) for site in sites]
    except SiteNotFoundError:
        pytest.skip("its activation is no module")
    plan = cut_(student, kind.model, sites, Recipe(method="relufy"), None, quiet=True).plan
    for site in sites:
        tokens = torch.randn(6, site.d_model, generator=torch.Generator().manual_seed(0))
        seen = []
        hook = student.get_submodule(site.output).register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # noqa: B023
        mlp_output(student, site, tokens)
        hook.remove()
        if site.kind == "plain":
            assert (seen[0] >= 0).all()
        assert (seen[0] == 0).any() or site.norm is not None
    replayed = kind.copy()
    apply_(replayed, Plan.from_json(plan.to_json()).edits)
    assert torch.equal(run(replayed, kind.batches[0]), run(student, kind.batches[0]))


def test_an_mlp_that_calls_a_function_can_not_be_relufied():
    class Function(Tiny):
        def __init__(self):
            super().__init__(act=nn.Identity())

    model = Function()
    (site,) = find_mlps(model)
    with pytest.raises(SiteNotFoundError, match="0 modules look like its activation"):
        apply_(model, [ReplaceActivation(site=site)])


@pytest.mark.fresh
def test_moefication_of_a_relu_model_is_saved_and_loads_in_a_fresh_process(tmp_path):
    """The chain of the paper: relufy and distil, then split; all by folders."""
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    few = {"calibrate": {"num_images": 64}}
    relu = Recipe.parse({**few, "method": "relufy", "recover": {"steps": 3, "lr": 1e-4, "batch_size": 16}})
    vitrim.compress(model, data="digits", recipe=relu, out=tmp_path / "relu", quiet=True)
    recipe = Recipe.parse({**few, "method": "moefication", "keep_ratio": 0.5, "options": {"epochs": 1}})
    found = vitrim.compress(str(tmp_path / "relu"), data="digits", recipe=recipe, out=tmp_path / "out", quiet=True)
    assert found.metrics.reload_difference <= 1e-6 and not found.metrics.stock
    assert found.metrics.edits[0]["what"] == "6 of 12 experts active a token, router: mlp"
    assert found.metrics.after.macs < 0.9 * found.metrics.before.macs
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vitrim.load(tmp_path / "out")(images), found.model(images))
