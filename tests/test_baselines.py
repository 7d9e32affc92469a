"""The baselines Taylor, Subspace Node Pruning's ordering and torch-pruning, against slow versions of themselves."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import scipy.linalg
import torch
from torch import Tensor

from tests.support.activations import stored_stats
from vitrim.calibrate import LiveModelView
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import MissingExtraError
from vitrim.methods import Taylor, make_method
from vitrim.methods.subspace_node import unexplained_variance
from vitrim.models.features import features
from vitrim.surgery import read_weights, submodule
from vitrim.tokens import Features
from vitrim.types import MlpSite, MlpWeights, SiteView


def view_of(value: Tensor, output: Tensor, *, num_keep: int, gate: Tensor | None = None, stats=None) -> SiteView:
    site = MlpSite(path="mlp", kind="plain", d_model=value.shape[1], d_hidden=len(value), value="fc1", output="fc2")
    return SiteView(
        site=site,
        weights=MlpWeights(value_HD=value, gate_HD=gate, output_DH=output),
        num_keep=num_keep,
        generator=torch.Generator().manual_seed(0),
        stats=stats,
    )


def select(name: str, view: SiteView, **options) -> list[int]:
    return make_method(name, options).select(view).tolist()


def test_taylor_is_the_squared_jacobian_times_the_activations():
    """Of features that are linear in one token's units, where the first order is all there is."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 1, 12, generator=generator), torch.randn(12, 5, generator=generator)
    weight = weight * torch.logspace(0, -2, 12)[torch.randperm(12, generator=generator)][:, None]
    site = MlpSite(path="mlp", kind="plain", d_model=5, d_hidden=12, value="mlp.i", output="mlp.o")

    def differentiate(loss, paths, see):
        inputs = hidden.clone().requires_grad_()
        total = loss(Features(pooled_BD=(inputs @ weight)[:, 0], patches_BND=None))
        see(paths[0], inputs.detach(), torch.autograd.grad(total, inputs)[0])

    view = SimpleNamespace(sites=[site], widths={"mlp": 12}, generator=generator, differentiate=differentiate)
    exact = hidden[:, 0].square().mean(0) * weight.square().sum(1)
    edit = next(Taylor(draws=200).propose(view))
    found = exact[list(edit.keep)]
    assert bool((found[1:] <= found[:-1] * 1.2).all())  # 8,000 draws: a standard error of 1.6%


def test_taylor_keeps_the_units_whose_fading_moves_all_features_most(build):
    case = build("timm-vit")
    bench = LiveModelView(case.copy(), case.sites, {site.path: 24 for site in case.sites}, case.batches, seed=0)
    edits = list(Taylor(draws=40).propose(bench))
    assert [len(edit.keep) for edit in edits] == [24, 24]
    site, step = case.sites[0], 1e-3
    exact = torch.zeros(site.d_hidden)
    model = case.copy().double()
    batch = torch.cat(case.batches).double()

    def tokens() -> Tensor:
        with torch.inference_mode():
            found = features(model, batch)
        return torch.cat([found.pooled_BD[:, None], found.patches_BND], dim=1)

    dense = tokens()
    for unit in range(site.d_hidden):
        factor = torch.ones(site.d_hidden, dtype=torch.float64)
        factor[unit] -= step
        handle = submodule(model, site.output).register_forward_pre_hook(lambda _, args, f=factor: (args[0] * f,))
        exact[unit] = float(((tokens() - dense) / step).square().sum())
        handle.remove()
    best = exact.sort(descending=True).values[:24].sum()
    assert float(exact[list(edits[0].keep)].sum()) > 0.97 * float(best)
    assert float(exact[:24].sum()) < 0.9 * float(best)  # any 24 units would not do


def test_subspace_node_is_the_inverse_square_of_the_diagonal_of_zca():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    hidden = hidden @ torch.randn(9, 9, generator=generator, dtype=torch.float64) + 1
    gram = hidden.T @ hidden
    zca = torch.from_numpy(scipy.linalg.inv(scipy.linalg.sqrtm(gram.numpy())))
    unnormalised = zca / zca.diagonal()[:, None]
    components = unnormalised @ gram @ unnormalised.T
    torch.testing.assert_close(components, torch.diag(components.diagonal()), atol=1e-8, rtol=0)  # orthogonal
    torch.testing.assert_close(unexplained_variance(gram), components.diagonal(), rtol=1e-8, atol=0)
    view = view_of(torch.randn(9, 4), torch.randn(4, 9), num_keep=5, stats=stored_stats(hidden, hidden[:, :4]))
    slow = sorted(range(9), key=lambda unit: -float(components[unit, unit]))
    assert select("subspace-node", view) == slow[:5]


def test_subspace_node_takes_independent_units_by_energy_and_redundant_ones_last():
    hidden = torch.eye(6, dtype=torch.float64) * torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0, 6.0])
    energies = hidden.square().sum(0)
    torch.testing.assert_close(unexplained_variance(hidden.T @ hidden), energies)
    hidden[:, 0] = hidden[:, 5]  # two of one kind: each is explained by the other
    view = view_of(torch.randn(6, 4), torch.randn(4, 6), num_keep=6, stats=stored_stats(hidden, hidden[:, :4]))
    picked = select("subspace-node", view)
    assert picked[:4] == [2, 4, 3, 1] and set(picked[4:]) == {0, 5}


def test_subspace_node_of_silent_units_is_finite_and_takes_them_last():
    hidden = torch.diag(torch.tensor([0.0, 2.0, 0.0, 1.0], dtype=torch.float64))
    assert bool(unexplained_variance(hidden).isfinite().all())
    assert bool(unexplained_variance(torch.zeros(3, 3)).isfinite().all())
    view = view_of(torch.randn(4, 4), torch.randn(4, 4), num_keep=2, stats=stored_stats(hidden, hidden))
    assert select("subspace-node", view) == [1, 3]


def test_subspace_node_without_images_looks_at_input_weights():
    value = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0]))
    assert select("subspace-node", view_of(value, torch.randn(4, 4), num_keep=3)) == [1, 3, 2]


def group_magnitude(view: SiteView, p: int) -> list[float]:
    """The library's default, by its description: the mean over the group's layers of the p-th powers' sums."""
    weights = view.weights
    layers = [weights.value_HD, weights.output_DH.T, *([] if weights.gate_HD is None else [weights.gate_HD])]
    return [
        sum(float(rows[unit].abs().pow(p).sum()) for rows in layers) / len(layers) for unit in range(weights.num_units)
    ]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_torch_pruning_scores_the_whole_group(gated, p):
    pytest.importorskip("torch_pruning")
    generator = torch.Generator().manual_seed(0)
    value, gate = (torch.randn(20, 6, generator=generator) for _ in range(2))
    output = torch.randn(7, 20, generator=generator)  # as wide as some other model, too
    view = view_of(value, output, gate=gate if gated else None, num_keep=20)
    scores = group_magnitude(view, p)
    assert select("torch-pruning", view, p=p) == sorted(range(20), key=lambda unit: -scores[unit])


def test_torch_pruning_options_reach_the_library_and_weights_are_not_touched():
    pytest.importorskip("torch_pruning")
    generator = torch.Generator().manual_seed(1)
    view = view_of(torch.randn(30, 6, generator=generator), torch.randn(6, 30, generator=generator), num_keep=30)
    before = view.weights.value_HD.clone(), torch.get_rng_state()
    picks = {
        str(options): tuple(select("torch-pruning", view, **options))
        for options in ({}, {"importance": "fpgm"}, {"reduction": "max"}, {"reduction": "first"}, {"reduction": "prod"})
    }
    assert len(set(picks.values())) == 5
    value_norms = view.weights.value_HD.square().sum(1)
    assert list(picks[str({"reduction": "first"})]) == value_norms.sort(descending=True).indices.tolist()
    assert torch.equal(view.weights.value_HD, before[0]) and torch.equal(torch.get_rng_state(), before[1])


def test_torch_pruning_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"^torch-pruning is not installed; pip install 'vitrim\[bench\]'\.$"):
        select("torch-pruning", view_of(torch.randn(4, 2), torch.randn(2, 4), num_keep=2))


@pytest.mark.parametrize("method", ["amp", "taylor", "torch-pruning"])
def test_a_choice_is_the_same_bare_and_under_repair(build, method):
    case = build("timm-vit-scaled")
    kept = []
    for repair in (False, {"refit": False}):
        student = case.copy()
        recipe = Recipe.parse({"method": method, "hidden_dim": 12, "repair": repair})
        report = cut_(student, case.model, case.sites, recipe, case.batches, quiet=True)
        kept.append([edit.keep for edit in report.plan.edits])
        assert bool(report.errors) == bool(repair)
        site = case.sites[0]
        old = read_weights(case.model, site).output_DH[:, list(kept[0][0])]
        assert torch.equal(read_weights(student, site).output_DH, old) == (not repair)
    assert kept[0] == kept[1]
