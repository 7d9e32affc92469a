"""The Lazy Neuron Phenomenon (arXiv 2210.06313): counting active units, and letting only the top k through."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vitrim
from vitrim.calibrate.activity import measure_activity
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, SiteNotFoundError
from vitrim.layers.top_k import TopKLinear, keep_top
from vitrim.models.sites import find_mlps
from vitrim.surgery import Plan, TopKActivation, apply_
from vitrim.types import MlpSite


def cut(case, **values):
    student = case.copy()
    return student, cut_(student, case.model, case.sites, Recipe.parse(values), None, quiet=True).plan


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=12, max_size=12),
    num_active=st.integers(1, 12),
    by=st.sampled_from(["magnitude", "value"]),
)
def test_lazy_neuron_keeps_k_entries_ties_included_unchanged_and_idempotent(values, num_active, by):
    tokens = torch.tensor(values, dtype=torch.float32).view(2, 6)
    num_active = min(num_active, 6)
    kept = keep_top(tokens, num_active, by=by)
    assert ((kept == tokens) | (kept == 0)).all()
    assert (kept != 0).sum(-1).max() <= num_active
    scores = tokens.abs() if by == "magnitude" else tokens
    for row, score in zip(kept, scores, strict=True):  # the slow way: what is kept is worth what the best k are worth
        best = sorted(score.tolist(), reverse=True)[:num_active]
        chosen = sorted(score[row != 0].tolist(), reverse=True)
        assert chosen == [value for value in best if value != 0][: len(chosen)]
        assert len(chosen) == sum(value != 0 for value in best)
    if by == "magnitude":  # of negative values, zero is larger than all: by value a second time may keep other entries
        assert torch.equal(keep_top(kept, num_active, by=by), kept)


def test_lazy_neuron_by_value_equals_by_magnitude_behind_a_relu():
    tokens = torch.randn(4, 9, 30, generator=torch.Generator().manual_seed(0)).relu()
    assert torch.equal(keep_top(tokens, 7, by="value"), keep_top(tokens, 7, by="magnitude"))


def test_lazy_neuron_with_all_units_is_the_dense_model_to_the_bit(kind, run):
    for asked in ({"keep_ratio": 1.0}, {"options": {"num_active": kind.sites[0].d_hidden}}):
        student, plan = cut(kind, method="top-k", **asked)
        assert len(plan.edits) == (len(kind.sites) if "options" in asked else 0)
        assert torch.equal(run(student, kind.batches[0]), run(kind.model, kind.batches[0]))


def test_lazy_neuron_edit_equals_masking_the_output_projections_input(kind, run):
    student, plan = cut(kind, method="top-k", options={"num_active": 5})
    masked = copy.deepcopy(kind.model)
    for site in kind.sites:
        masked.get_submodule(site.output).register_forward_pre_hook(lambda _, args: (keep_top(args[0], 5),))
    assert torch.equal(run(student, kind.batches[0]), run(masked, kind.batches[0]))
    assert [edit.describe() for edit in plan.edits] == [
        f"5 of {site.d_hidden} units active a token" for site in kind.sites
    ]
    replayed = kind.copy()
    apply_(replayed, Plan.from_json(plan.to_json()).edits)
    assert torch.equal(run(replayed, kind.batches[0]), run(student, kind.batches[0]))


def test_lazy_neuron_gathered_columns_equal_the_dense_product():
    torch.manual_seed(0)
    for bias in (True, False):
        layer = TopKLinear.of(nn.Linear(40, 12, bias=bias), 6, by="magnitude")
        tokens = torch.randn(3, 5, 40)
        dense = layer(tokens)
        weight = layer.weight.clone()
        layer.gather_()
        torch.testing.assert_close(layer(tokens), dense, atol=1e-5, rtol=1e-5)
        assert torch.equal(layer.weight, weight) and layer.weight.t().is_contiguous()
        again = TopKLinear.of(nn.Linear(40, 12, bias=bias), 6, by="magnitude")
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(tokens), dense)
        assert layer(tokens[0, 0]).shape == (12,)


@pytest.mark.parametrize("gather", [False, True])
def test_lazy_neuron_gives_no_gradient_to_what_was_dropped(gather):
    torch.manual_seed(1)
    layer = TopKLinear.of(nn.Linear(20, 4), 3, by="magnitude")
    layer = layer.gather_() if gather else layer
    tokens = torch.randn(2, 20, requires_grad=True)
    layer(tokens).square().sum().backward()
    assert tokens.grad is not None and torch.equal(tokens.grad != 0, keep_top(tokens.detach(), 3) != 0)


def test_lazy_neuron_counts_are_exact_on_constructed_activations():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4)

        def forward(self, tokens):
            return self.fc2(self.act(self.fc1(tokens)))

    mlp = Mlp()
    mlp.fc1.weight.data.copy_(torch.eye(4))
    site = MlpSite(path="", kind="plain", d_model=4, d_hidden=4, value="fc1", output="fc2")
    tokens = torch.tensor([[1.0, -1, 0, 2], [3, -2, 0, 0], [1, 1, 0, 0]])  # 2 + 1 + 2 of 12 are active
    for batches in ([tokens], [tokens[:1], tokens[1:]]):
        (row,) = measure_activity(mlp, [site], batches, thresholds=(0.5, 1.9))
        assert row.nonzero == pytest.approx(5 / 12)
        rms = ((1 + 4 + 9 + 1 + 1) / 12) ** 0.5
        sizes = [1, 2, 3, 1, 1]
        assert row.above == {share: pytest.approx(sum(s > share * rms for s in sizes) / 12) for share in (0.5, 1.9)}
        assert row.silent == 1 and sum(row.firing) == 4
        assert row.firing[9] == 1 and row.firing[3] == 2  # unit 0 always; units 1 and 3 for one token of three


def test_lazy_neuron_half_of_a_fresh_relu_layer_is_active():
    torch.manual_seed(0)

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)

        def forward(self, tokens):
            return self.fc2(self.act(self.fc1(tokens)))

    mlp = Mlp()
    nn.init.zeros_(mlp.fc1.bias)
    site = MlpSite(path="", kind="plain", d_model=64, d_hidden=512, value="fc1", output="fc2")
    (row,) = measure_activity(mlp, [site], [torch.randn(500, 64)])
    assert row.nonzero == pytest.approx(0.5, abs=0.02)


def test_an_mlp_behind_top_k_is_not_taken_for_one_whose_units_can_be_cut(build):
    student, _ = cut(build("timm-vit"), method="top-k", options={"num_active": 5})
    with pytest.raises(SiteNotFoundError):
        find_mlps(student)


def test_counts_and_modules_that_are_not_there_are_refused(build):
    case = build("timm-vit")
    site = case.sites[0]
    for count in (0, site.d_hidden + 1):
        with pytest.raises(BudgetError, match="active of"):
            apply_(case.copy(), [TopKActivation(site=site, num_active=count)])
    twice = [TopKActivation(site=site, num_active=5)] * 2
    with pytest.raises(SiteNotFoundError, match="is TopKLinear"):
        apply_(case.copy(), twice)


def test_inspect_counts_activity_in_the_api_and_on_the_command_line(capsys):
    from importlib.resources import files

    from vitrim.cli.app import run

    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    found = vitrim.inspect(model, activity="digits", limit=40)
    assert [row.path for row in found.activity] == [site.path for site in found.sites]
    for row in found.activity:
        assert 1 > row.above[0.01] > row.above[0.1] > row.above[1.0] > 0 and row.nonzero > 0.99  # it is a GELU
        assert sum(row.firing) == 384 and row.silent == 0
    assert vitrim.inspect(model).activity == ()
    assert run(["inspect", model, "--activity", "digits", "--limit", "40"]) == 0
    assert all(row.path in capsys.readouterr().out for row in found.activity[:1])
    assert run(["inspect", model, "--activity", "digits", "--limit", "40", "--json"]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)["activity"]
    assert first["nonzero"] == found.activity[0].nonzero


@pytest.mark.fresh
def test_a_top_k_model_is_saved_and_loads_in_a_fresh_process(tmp_path):
    from importlib.resources import files

    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
    steps = [{"method": "dgmr", "keep_ratio": 0.5, "repair": {"refit": False}}, {"method": "top-k", "keep_ratio": 0.25}]
    recipe = {"calibrate": {"num_images": 64}, "steps": steps}
    found = vitrim.compress(model, data="digits", recipe=Recipe.parse(recipe), out=tmp_path / "out", quiet=True)
    assert found.metrics.reload_difference <= 1e-6 and not found.metrics.stock
    assert found.plan.method == "dgmr+top-k" and len(found.metrics.edits) == len(found.metrics.widths)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "48 of 192 units active a token" in page
    tokens = torch.randn(2, 3, 32, 32)
    assert torch.equal(vitrim.load(tmp_path / "out")(tokens), found.model(tokens))
