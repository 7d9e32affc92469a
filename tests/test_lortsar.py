"""LORTSAR: best factors of each kind of layer, ranks under one budget, and the whole way on a model of skeletons."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import vitrim
from tests.support.skeletons import pairs, write_table
from vitrim.calibrate import LiveModelView
from vitrim.errors import BudgetError, RecipeError, SiteNotFoundError
from vitrim.methods import make_method
from vitrim.models.layers import find_layers
from vitrim.models.skeleton import Hyperformer
from vitrim.surgery import ToLowRank, apply_

LAYERS = {
    "linear": lambda: nn.Linear(9, 7),
    "1x1": lambda: nn.Conv2d(6, 8, 1, stride=(2, 1)),
    "5x1": lambda: nn.Conv2d(4, 6, (5, 1), padding=(4, 0), dilation=(2, 1)),
    "grouped": lambda: nn.Conv2d(12, 6, 1, groups=3, bias=False),
    "grouped 5x1": lambda: nn.Conv2d(4, 8, (5, 1), groups=2),
}
ARGS = {"num_heads": 1, "depth": 2, "num_frames": 8, "num_classes": 3}


def proposed(model, batches=None, share=0.5, **options):
    view = LiveModelView(model, (), {}, batches, seed=0, share=share)
    edits = []
    for edit in make_method("lortsar", options).propose(view):
        apply_(model, [edit])
        edits.append(edit)
    return edits


def flattened(layer):
    """The kernel of each group as rows of outputs, one value at a time."""
    weight, groups = layer.weight.detach().double(), getattr(layer, "groups", 1)
    rows, found = weight.shape[0] // groups, []
    for group in range(groups):
        matrix = [[float(v) for v in weight[group * rows + row].reshape(-1)] for row in range(rows)]
        found.append(torch.tensor(matrix, dtype=torch.float64))
    return found


@pytest.mark.parametrize("layer_kind", list(LAYERS))
def test_factors_are_exact_at_full_rank_and_the_best_of_each_rank_below(layer_kind):
    torch.manual_seed(0)
    layer = LAYERS[layer_kind]()
    matrices = flattened(layer)
    sigma = [torch.linalg.svdvals(matrix) for matrix in matrices]
    inputs = torch.randn(2, 9) if layer_kind == "linear" else torch.randn(2, layer.in_channels, 12, 3)
    full = min(matrices[0].shape)
    for rank in range(1, full + 1):
        model = nn.Sequential(layer)
        [site] = find_layers(model)
        apply_(model, [ToLowRank(layer=site, rank=rank)])
        found = flattened(type("Whole", (), {"weight": model[0].weight, "groups": site.groups}))
        error = sum(float((mine - own).square().sum()) for mine, own in zip(found, matrices, strict=True))
        assert error == pytest.approx(sum(float(s[rank:].square().sum()) for s in sigma), abs=1e-5)
        if rank == full:
            torch.testing.assert_close(model(inputs), layer(inputs), atol=1e-5, rtol=1e-5)


def test_a_1x1_convolution_is_factored_as_the_linear_layer_it_is_with_one_bias_and_fewer_parameters():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(9, 7, 1), nn.Linear(9, 7)
    with torch.no_grad():
        linear.weight.copy_(conv.weight[..., 0, 0])
        linear.bias.copy_(conv.bias)
    inputs = torch.randn(2, 9, 5, 3)
    for rank in range(1, 4):
        both = [nn.Sequential(copy.deepcopy(layer)) for layer in (conv, linear)]
        for model in both:
            before = sum(p.numel() for p in model.parameters())
            apply_(model, [ToLowRank(layer=find_layers(model)[0], rank=rank)])
            shapes = [tuple(p.shape) for p in model.parameters()]
            assert sum(p.numel() for p in model.parameters()) < before and shapes.count((7,)) == 1 and len(shapes) == 3
        wanted = both[1](inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(both[0](inputs), wanted, atol=1e-5, rtol=1e-5)


class Three(nn.Module):
    """Three layers in a list, and a first and a last one outside of it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Linear(5, 4)
        self.parts = nn.ModuleList([nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, (3, 1), groups=2), nn.Conv2d(8, 5, 1)])

    def forward(self, x):
        x = self.stem(x)
        for part in self.parts:
            x = part(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("share", [0.6, 0.8])
def test_ranks_under_a_budget_are_the_best_of_all(seen, share):
    torch.manual_seed(1)
    model, batches = Three().eval(), [torch.randn(16, 3, 7, 4)] if seen else None
    layers = [layer for layer in find_layers(model) if layer.path.startswith("parts")]
    choices = []
    for layer in layers:
        own = model.get_submodule(layer.path).weight.detach()
        energies = [torch.linalg.svdvals(m.double()).square() for m in layer.matrices(own)]
        if seen:
            caught = []
            hook = model.get_submodule(layer.path).register_forward_hook(lambda _, __, out, c=caught: c.append(out))
            model(batches[0])
            hook.remove()
            rows = caught[0].detach().double().movedim(1, -1).reshape(-1, layer.groups, layer.num_rows)
            rows = rows - rows.mean(0)
            energies = [torch.linalg.svdvals(rows[:, g]).square() for g in range(layer.groups)]
        total = sum(float(e.sum()) for e in energies)
        size = layer.groups * layer.num_rows * layer.num_cols
        ranks = [(r, layer.groups * r * (layer.num_rows + layer.num_cols)) for r in range(1, layer.break_even)]
        lost = [sum(float(e[r:].sum()) for e in energies) / total for r, _ in ranks]
        choices.append([*zip(ranks, lost, strict=True), ((None, size), 0.0)])
    budget = int(share * sum(each[-1][0][1] for each in choices))
    best = min(
        (pick for pick in itertools.product(*choices) if sum(cost for (_, cost), _ in pick) <= budget),
        key=lambda pick: sum(error for _, error in pick),
    )
    wanted = {layer.path: rank for layer, ((rank, _), _) in zip(layers, best, strict=True) if rank is not None}
    assert {edit.layer.path: edit.rank for edit in proposed(model, batches, share)} == wanted


def test_the_budget_is_kept_and_the_first_layer_the_head_and_what_is_no_layer_stay():
    model = Hyperformer(**ARGS).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = sum(p.numel() for p in model.parameters())
    layers = [layer for layer in find_layers(model) if layer.path.startswith("blocks")]
    total = sum(layer.groups * layer.num_rows * layer.num_cols for layer in layers)
    edits = proposed(model, share=0.5)
    saved = whole - sum(p.numel() for p in model.parameters())
    assert 0 <= saved - 0.5 * total < 100 and all(edit.layer.path.startswith("blocks.") for edit in edits)
    kept = [name for name in before if name in model.state_dict()]
    assert {"head.weight", "data_bn.weight", "blocks.0.attention.outer", "blocks.1.attention.distance"} <= set(kept)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in kept)
    assert any(edit.layer.groups == 6 for edit in edits) or any(edit.layer.kernel == (5, 1) for edit in edits)


def test_equal_shares_and_energy_are_other_ways_and_wrong_ones_are_refused():
    edits = proposed(Hyperformer(**ARGS).eval(), share=0.5, allocate=False)
    assert all(edit.rank == max(1, edit.layer.break_even // 2) for edit in edits)
    assert proposed(Hyperformer(**ARGS).eval(), energy=0.6)
    with pytest.raises(RecipeError, match="leave rank and energy out"):
        make_method("lortsar", {"allocate": True, "energy": 0.5})
    with pytest.raises(BudgetError, match="rank 1 in all layers keeps"):
        proposed(Hyperformer(**ARGS).eval(), share=0.01)


def test_a_model_of_skeletons_goes_the_whole_way(tmp_path):
    train = write_table(tmp_path / "data" / "train.parquet", pairs(60))
    write_table(tmp_path / "data" / "test.parquet", pairs(12), views=(3,))
    args = {"num_heads": 1, "depth": 2, "num_frames": 8, "num_classes": 3}
    labels = {"loss": "labels", "steps": 4, "batch_size": 12, "optimizer": "sgd", "lr": 0.05, "drops": [0.5]}
    given = {"data": train, "method": "lortsar", "recover": labels, "quiet": True}
    first = vitrim.compress(
        "vitrim/skeleton-hyperformer", model_args=args, keep_ratio=1.0, out=tmp_path / "trained", **given
    )
    assert first.metrics.stock and first.plan.edits == () and first.metrics.recovery["optimizer"] == "sgd"
    result = vitrim.compress(str(tmp_path / "trained"), params_ratio=0.7, out=tmp_path / "small", **given)
    assert 0.65 < result.metrics.after.parameters / result.metrics.before.parameters <= 0.7
    assert 0 <= result.metrics.after.top1 <= 100
    again = vitrim.load(tmp_path / "small")
    inputs = torch.randn(2, 3, 8, 20)
    torch.testing.assert_close(again(inputs), result.model.eval()(inputs), atol=1e-5, rtol=1e-4)
    exported = vitrim.export(str(tmp_path / "small"), tmp_path / "small.pt2", to="torch", latency=False)
    assert exported.differences["noise"] < 1e-4
    assert np.isfinite(result.metrics.after_cut.relative_error)


def test_labels_of_other_classes_and_methods_that_cut_mlps_are_refused_in_one_line():
    model = Hyperformer(**ARGS)
    with pytest.raises(SiteNotFoundError, match="it is convolutional"):
        vitrim.compress(model, data=pairs(12), method="dgmr", quiet=True)
    given = {"loss": "labels", "steps": 1, "batch_size": 4, "lr": 0.1}
    with pytest.raises(RecipeError, match=r"recover\.loss=labels: .*classes 0 to 2.*classes 0 to 1"):
        vitrim.compress(
            "vitrim/skeleton-hyperformer",
            model_args={**ARGS, "num_classes": 2},
            data=pairs(12),
            method="lortsar",
            keep_ratio=0.5,
            recover=given,
            quiet=True,
        )
