"""Heads of fewer dimensions by factors: against slow, obvious versions of themselves."""

import pytest
import torch

from tests.support.activations import stored_stats
from vitrim.ops.head_factors import LogitSums, ValueSums, factor_logits, factor_values, mixed, select_heads
from vitrim.ops.least_squares import fit_output, squared_error

HEADS, DIMS, WIDTH = 3, 5, 7


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logit_sums(query, key, wanted_query, wanted_key):
    return LogitSums(
        query_GFF=query.mT @ query,
        key_GFF=key.mT @ key,
        query_cross_GFF=query.mT @ wanted_query,
        key_cross_GFF=key.mT @ wanted_key,
    )


def value_sums(stats, weight, bias, num_heads=HEADS, scale=None):
    return ValueSums(stats=stats, output_DA=weight, output_bias_D=bias, num_heads=num_heads, scale_D=scale)


def test_logits_are_the_best_of_their_rank():
    """The slow way: the logits of every pair of tokens as one matrix, cut off after its largest singular values."""
    query, key = random(HEADS, 40, DIMS), random(HEADS, 40, DIMS, seed=1) * torch.linspace(0.1, 2, DIMS)
    left, right = factor_logits(logit_sums(query, key, query, key), 2, ridge=1e-12)
    values, singular, others = torch.linalg.svd(query @ key.mT)
    best = (values[:, :, :2] * singular[:, None, :2]) @ others[:, :2]
    torch.testing.assert_close((query @ left.mT) @ (key @ right.mT).mT, best)


def test_logits_of_full_rank_are_those_wanted_if_the_wanted_queries_and_keys_are_linear_in_ours():
    query, key, mix = random(HEADS, 40, DIMS), random(HEADS, 40, DIMS, seed=1), random(HEADS, DIMS, DIMS, seed=2)
    left, right = factor_logits(logit_sums(query, key, query @ mix, key @ mix), DIMS, ridge=1e-12)
    torch.testing.assert_close((query @ left.mT) @ (key @ right.mT).mT, query @ mix @ mix.mT @ key.mT)


def test_a_huge_ridge_leaves_logits_as_they_are_and_dead_dimensions_are_no_matter():
    query, key, other = random(HEADS, 40, DIMS), random(HEADS, 40, DIMS, seed=1), random(HEADS, 40, DIMS, seed=2)
    left, right = factor_logits(logit_sums(query, key, other, other), DIMS, ridge=1e9)
    torch.testing.assert_close(left.mT @ right, torch.eye(DIMS).double().expand(HEADS, -1, -1), atol=1e-6, rtol=0)
    query[..., 2:] = 0
    left, right = factor_logits(logit_sums(query, key, query, key), 2, ridge=1e-12)
    torch.testing.assert_close((query @ left.mT) @ (key @ right.mT).mT, query @ key.mT, atol=1e-6, rtol=1e-6)


def values(seed=0):
    """Mixed values of all heads, a target that needs more than they have, and a projection that is not the best."""
    hidden = random(300, HEADS * DIMS, seed=seed) @ random(HEADS * DIMS, HEADS * DIMS, seed=seed + 1) + 1
    weight = random(WIDTH, HEADS * DIMS, seed=seed + 2)
    return hidden, hidden @ weight.T + 0.3 * random(300, WIDTH, seed=seed + 3) + 2, weight


def fitted_error(stats, weight, mixture, bias):
    small, start = mixed(stats, weight, mixture)
    keep = torch.arange(start.shape[1])
    return squared_error(small, keep, *fit_output(small, keep, start, bias, ridge=1e-12))


@pytest.mark.parametrize("bias", [None, torch.zeros(WIDTH).double()])
def test_values_beat_every_choice_of_dimensions_and_what_gradients_find_from_elsewhere(bias):
    hidden, target, weight = values()
    stats = stored_stats(hidden, target)
    found = factor_values(value_sums(stats, weight, bias), 1, ridge=1e-12)
    assert found.shape == (HEADS, 1, DIMS)
    error = fitted_error(stats, weight, found, bias)
    for choice in torch.cartesian_prod(*[torch.arange(DIMS)] * HEADS):
        picked = torch.nn.functional.one_hot(choice, DIMS).double()[:, None]
        assert error < fitted_error(stats, weight, picked, bias)
    free = random(HEADS, 1, DIMS, seed=9).requires_grad_()
    columns = hidden if bias is None else hidden - hidden.mean(0)
    wanted = target if bias is None else target - target.mean(0)
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        small = columns @ torch.block_diag(*free).T
        value = (wanted - small @ torch.linalg.lstsq(small, wanted).solution).square().sum() / len(hidden)
        value.backward()
        return value

    optimizer.step(loss)
    assert error < 1.02 * loss().item()


def test_values_of_one_head_are_reduced_rank_regression_and_channels_count_by_their_scale():
    hidden, target, weight = values()
    hidden, weight, scale = hidden[:, :DIMS], weight[:, :DIMS], torch.linspace(0.1, 3, WIDTH).double()
    found = factor_values(value_sums(stored_stats(hidden, target), weight, None, 1, scale), 2, ridge=1e-12)
    fit = hidden @ torch.linalg.lstsq(hidden, target).solution * scale
    best = torch.linalg.svd(fit, full_matrices=False)
    low_rank = (best.U[:, :2] * best.S[:2]) @ best.Vh[:2] / scale
    small = hidden @ found[0].T
    torch.testing.assert_close(small @ torch.linalg.lstsq(small, target).solution, low_rank)


def test_mixed_sums_are_those_of_mixed_values_and_the_start_changes_a_head_the_least():
    hidden, target, weight = values()
    mixture = random(HEADS, 2, DIMS, seed=5)
    small, start = mixed(stored_stats(hidden, target), weight, mixture)
    slow = hidden @ torch.block_diag(*mixture).T
    torch.testing.assert_close(small.hidden_HH, slow.T @ slow)
    torch.testing.assert_close(small.cross_HD, slow.T @ target)
    torch.testing.assert_close(small.hidden_H, slow.sum(0))
    for head in range(HEADS):
        own, kept = slice(head * DIMS, (head + 1) * DIMS), slice(head * 2, head * 2 + 2)
        solution = torch.linalg.lstsq(slow[:, kept], hidden[:, own] @ weight[:, own].T).solution
        torch.testing.assert_close(start[:, kept], solution.T)


def test_all_dimensions_of_all_heads_are_the_whole():
    hidden, target, weight = values()
    stats = stored_stats(hidden, target)
    found = factor_values(value_sums(stats, weight, torch.zeros(WIDTH)), DIMS, ridge=1e-12)
    every = torch.eye(DIMS).double().expand(HEADS, -1, -1)
    bias = torch.zeros(WIDTH).double()
    assert fitted_error(stats, weight, found, bias) == pytest.approx(fitted_error(stats, weight, every, bias))


@pytest.mark.parametrize("bias", [None, torch.zeros(WIDTH).double()])
def test_heads_are_picked_one_by_one_by_what_they_add_to_the_prediction(bias):
    """The slow way: least squares for every candidate."""
    hidden, target, weight = values()
    found = select_heads(value_sums(stored_stats(hidden, target), weight, bias), HEADS, ridge=1e-12)
    columns, wanted = (hidden, target) if bias is None else (hidden - hidden.mean(0), target - target.mean(0))
    picks = []
    while len(picks) < HEADS:
        errors = {}
        for head in set(range(HEADS)) - set(picks):
            own = torch.cat([columns[:, h * DIMS : (h + 1) * DIMS] for h in [*picks, head]], dim=1)
            errors[head] = float((own @ torch.linalg.lstsq(own, wanted).solution - wanted).square().sum())
        picks.append(min(errors, key=errors.__getitem__))
    assert found.tolist() == picks
