"""Steps that are a share of a weight's norm: orthogonal directions, the same path for rescaled copies of a layer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitrim.ops.orthogonal import orthogonalized
from vitrim.repair.relative_steps import RelativeSteps, descend_, shares


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_orthogonalized_keeps_singular_vectors_and_brings_values_near_one(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalized(matrix, torch.float64) @ right.T
    strong = values > 0.05 * values.norm()
    assert bool(((turned.diagonal()[strong] > 0.6) & (turned.diagonal()[strong] < 1.3)).all())
    torch.testing.assert_close(turned - torch.diag(turned.diagonal()), torch.zeros_like(turned), atol=1e-8, rtol=0)
    assert torch.equal(orthogonalized(torch.zeros(rows, columns)), torch.zeros(rows, columns))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


X = torch.randn(256, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 3, 8)
Y = torch.randn(256, 8, generator=torch.Generator().manual_seed(2))


def trained(model, *, scale=None, num_steps=30):
    """The model's outputs after a few steps, which train all that stands behind the norm."""
    model = copy.deepcopy(model)
    behind = 1.0 if scale is None else scale
    parameters = [p for name, p in model.named_parameters() if not name.startswith("0.")]
    steps = RelativeSteps(model, parameters, scales_M=None if scale is None else {model[3].weight: scale})
    descend_(
        steps, parameters, lambda: [(model(X) * behind - Y).square().sum(1).mean()], peak=0.03, num_steps=num_steps
    )
    steps.close()
    return (model(X) * behind).detach()


def test_a_step_is_a_share_of_the_norm_of_weight_and_bias():
    model = mlp()
    weight, layer = model[1].weight.detach().clone(), model[1]
    bias = layer.bias.detach().clone()
    steps = RelativeSteps(model, list(layer.parameters()))
    (model(X) - Y).square().mean().backward()
    steps.param_groups[0]["lr"] = 0.1
    steps.step()
    size = float(model[0](X).detach().square().mean().sqrt())
    norm = torch.cat([weight, bias[:, None] / size], 1).norm()
    moved = torch.cat([layer.weight - weight, (layer.bias - bias)[:, None] / size], 1).detach().norm()
    assert float(moved / norm) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("factor", [1 / 64, 1 / 8, 8, 64])
def test_rescaled_copies_of_a_model_take_the_same_path(factor):
    model, expected = mlp(), trained(mlp())
    assert float((expected - model(X).detach()).abs().max()) > 0.3
    gained = copy.deepcopy(model)
    gained[0].weight.data *= factor
    gained[0].bias.data *= factor
    gained[1].weight.data /= factor
    torch.testing.assert_close(trained(gained), expected, atol=2e-3, rtol=1e-3)
    scaled = copy.deepcopy(model)
    scaled[3].weight.data /= factor
    scaled[3].bias.data /= factor
    torch.testing.assert_close(trained(scaled, scale=torch.full((8,), factor)), expected, atol=2e-3, rtol=1e-3)


def test_a_layer_scale_is_as_if_it_were_folded_into_the_projection():
    model, scale = mlp(), torch.linspace(0.01, 2, 8)
    folded = copy.deepcopy(model)
    folded[3].weight.data *= scale[:, None]
    folded[3].bias.data *= scale
    torch.testing.assert_close(trained(model, scale=scale), trained(folded), atol=2e-3, rtol=1e-3)


def test_gates_and_values_of_one_matrix_move_as_two():
    class Gated(nn.Module):
        def __init__(self, factor):
            super().__init__()
            torch.manual_seed(3)
            self.both, self.out = nn.Linear(8, 24), nn.Linear(12, 8)
            self.both.weight.data[12:] *= factor
            self.both.bias.data[12:] *= factor
            self.out.weight.data /= factor

        def forward(self, x):
            gate, value = self.both(x).chunk(2, -1)
            return self.out(nn.functional.silu(gate) * value)

    ends = []
    for factor in (1, 16):
        model = Gated(factor)
        parameters = list(model.parameters())
        steps = RelativeSteps(model, parameters, gated=[model.both.weight])
        descend_(steps, parameters, lambda model=model: [(model(X) - Y).square().mean()], peak=0.03, num_steps=10)
        ends.append(model(X).detach())
    torch.testing.assert_close(ends[1], ends[0], atol=2e-3, rtol=1e-3)


def test_vectors_move_by_their_own_size_and_a_norms_bias_by_its_gains():
    model = nn.Sequential(nn.LayerNorm(8))
    model[0].weight.data *= 7
    steps = RelativeSteps(model, list(model.parameters()))
    (model(X) - Y).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    steps.param_groups[0]["lr"] = 0.1
    steps.step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close((p - old).detach().abs(), torch.full((8,), 0.07), atol=1e-5, rtol=1e-4)


def test_step_sizes_rise_to_the_peak_and_fall_to_nothing():
    sizes = list(shares(0.1, 50))
    assert max(sizes) == pytest.approx(0.1) and sizes[-1] < 0.001 and sizes[0] < 0.03
    assert sizes.index(max(sizes)) < 8 and sizes[8:] == sorted(sizes[8:], reverse=True)
    assert len(list(shares(0.1, 1))) == 1
