"""The metric of the final features: what it is, and what selection makes of it."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

import vitrim
from tests.support.activations import stored_stats
from tests.support.rescaled import tiny_vit
from vitrim.calibrate import final_metrics
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import ModelError, RecipeError
from vitrim.methods import Dgmr
from vitrim.models.sites import find_mlps
from vitrim.types import MlpSite, MlpWeights, SiteView


class Tokens(nn.Module):
    """Five tokens, each through two layers; then all together to a vector of features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.last, self.unused = nn.Linear(20, num_features), nn.Linear(2, 2)

    def behind(self, tokens_BND: Tensor) -> Tensor:
        """Return features for what the second layer put out."""
        return self.last(torch.tanh(tokens_BND).flatten(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.behind(self.second(torch.tanh(self.first(inputs))))


def tokens(num_features: int) -> tuple[Tokens, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tokens(num_features).double(), torch.randn(24, 5, 6, dtype=torch.float64)


def by_jacobians(model: Tokens, inputs: Tensor) -> Tensor:
    """J'J of all features by each token that the second layer puts out, summed over tokens, with trace 4."""
    outputs = model.second(torch.tanh(model.first(inputs)))
    total = torch.zeros(4, 4, dtype=torch.float64)
    for image in outputs.detach():
        jacobian = torch.func.jacrev(lambda one: model.behind(one[None])[0])(image)  # (features, tokens, width)
        for number in range(5):
            total += jacobian[:, number].T @ jacobian[:, number]
    return (total * 4 / total.trace()).detach()


def test_of_one_feature_the_metric_is_exact():
    model, inputs = tokens(1)  # the sign of a probe cancels
    found = final_metrics(model, ["second"], list(inputs.split(10)), num_probes=1)["second"]
    torch.testing.assert_close(found, by_jacobians(model, inputs), atol=1e-12, rtol=1e-12)


def test_of_many_features_the_metric_is_right_in_the_mean():
    model, inputs = tokens(7)
    expected = by_jacobians(model, inputs)
    errors = [
        float((final_metrics(model, ["second"], [inputs], num_probes=count)["second"] - expected).norm())
        for count in (8, 1024)
    ]
    assert errors[1] < 0.02 * expected.norm()
    assert errors[1] < 0.3 * errors[0]  # as one over the root of 128, by chance


def test_as_many_images_count_as_asked_for():
    model, inputs = tokens(1)
    found = final_metrics(model, ["second"], list(inputs.split(10)), num_images=13, num_probes=1)["second"]
    torch.testing.assert_close(found, by_jacobians(model, inputs[:13]), atol=1e-12, rtol=1e-12)


def test_a_model_is_left_as_it_was():
    model, inputs = tokens(3)
    model.train()
    final_metrics(model, ["first", "second"], [inputs])
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.second._forward_hooks


def test_an_output_that_moves_nothing_has_a_metric_of_zeros():
    model, inputs = tokens(3)
    nn.init.zeros_(model.last.weight)
    assert not final_metrics(model, ["second"], [inputs])["second"].any()


@pytest.mark.parametrize(("break_", "said"), [("unused", "unused: did not run"), ("detached", "have no gradient")])
def test_where_no_gradient_comes_back_it_is_said(break_, said):
    model, inputs = tokens(3)
    if break_ == "detached":
        model.last.register_forward_hook(lambda _, args, output: output.detach())
    with pytest.raises(ModelError, match=said):
        final_metrics(model, ["unused" if break_ == "unused" else "second"], [inputs])


def picked(hidden: Tensor, target: Tensor, select_on: str, *, bias: bool, metric: Tensor | None = None) -> list[int]:
    """Six of 14 units."""
    site = MlpSite(path="mlp", kind="plain", d_model=5, d_hidden=14, value="fc1", output="fc2")
    output_bias = torch.zeros(5) if bias else None
    view = SiteView(
        site=site,
        weights=MlpWeights(value_HD=torch.ones(14, 5), output_DH=torch.ones(5, 14), output_bias_D=output_bias),
        num_keep=6,
        generator=torch.Generator(),
        stats=stored_stats(hidden, target),
        metric_DD=metric,
    )
    return Dgmr(select_on=select_on).select(view).tolist()


def hidden_and_target() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, mix, behind = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((200, 14), (14, 14), (14, 5))
    )
    hidden = (hidden + 1) @ mix
    return hidden, hidden.relu() @ behind


@pytest.mark.parametrize("bias", [True, False])
def test_dgmr_picks_what_lowers_the_error_in_the_metric_the_most(bias):
    hidden, target = hidden_and_target()
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    metric = root @ root.T
    found = picked(hidden, target, "features", bias=bias, metric=metric)
    assert found != picked(hidden, target, "outputs", bias=bias)
    if bias:
        hidden, target = hidden - hidden.mean(0), target - target.mean(0)
    picks: list[int] = []
    while len(picks) < 6:
        errors = {}
        for unit in set(range(14)) - set(picks):
            columns = hidden[:, [*picks, unit]]
            error = target - columns @ torch.linalg.lstsq(columns, target).solution
            errors[unit] = float(((error @ metric) * error).sum())
        picks.append(min(errors, key=errors.__getitem__))
    assert found == picks


def test_in_a_metric_of_ones_the_picks_are_those_on_outputs():
    hidden, target = hidden_and_target()
    ones = torch.eye(5, dtype=torch.float64)
    found = picked(hidden, target, "features", bias=True, metric=ones)
    assert found == picked(hidden, target, "outputs", bias=True)


def kept(**options):
    images = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0)).split(16)
    model = tiny_vit("gelu", depth=2)
    student, recipe = copy.deepcopy(model), Recipe.parse({"keep_ratio": 0.5, "repair": False, "options": options})
    return [edit.keep for edit in cut_(student, model, find_mlps(model), recipe, images, quiet=True).plan.edits]


def test_each_output_gets_its_own_metric_on_the_way_through_a_model(monkeypatch):
    module, of_ones = importlib.import_module("vitrim.compression.asking"), {}

    def ones(model, paths, batches):
        of_ones.update({path: torch.eye(32, dtype=torch.float64) for path in paths})
        assert sum(map(len, batches)) == 32  # the last batch judges
        return of_ones

    expected = kept()
    assert kept(select_on="features") != expected
    monkeypatch.setattr(module, "final_metrics", ones)
    assert kept(select_on="features") == expected
    kept(select_on="features", parts="attention", heads="whole")
    assert sorted(of_ones) == [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attn.proj", "mlp.fc2")]


def test_file_to_file_refuses_at_once(tmp_path):
    recipe = {"options": {"select_on": "features"}}
    with pytest.raises(RecipeError, match=r"options.select_on: 'features' needs the whole model in memory"):
        vitrim.prune_checkpoint(tmp_path / "none", tmp_path / "out", recipe=recipe, data="digits")
    assert not list(tmp_path.iterdir())
