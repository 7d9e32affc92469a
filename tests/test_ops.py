"""The closed-form parts against slow, obvious references."""

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import stored_stats
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrim.errors import BudgetError
from vitrim.ops.forward_selection import select_on_moments
from vitrim.ops.gram_schmidt import residual_curve, select_units
from vitrim.ops.least_squares import fit_output, squared_error


def naive_gram_schmidt(rows, num_keep):
    """The published loop: rewrite the whole matrix at each pick, restart from raw rows past the rank."""
    rows = rows.double()
    picked = []
    while len(picked) < num_keep:
        residual = rows.clone()
        residual[picked] = 0
        start = residual.norm(dim=1).max()
        round_size = 0
        while len(picked) < num_keep and round_size < rows.shape[1]:
            norms = residual.norm(dim=1)
            norms[picked] = -1
            best = int(norms.argmax())
            if norms[best] <= 1e-12 * start:
                break
            direction = residual[best] / norms[best]
            residual -= torch.outer(residual @ direction, direction)
            picked.append(best)
            round_size += 1
        if round_size == 0:
            picked += [i for i in range(len(rows)) if i not in picked][: num_keep - len(picked)]
    return picked


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 10_000), st.data())
@settings(max_examples=60, deadline=None)
def test_selection_equals_the_naive_loop(num_rows, width, seed, data):
    num_keep = data.draw(st.integers(1, num_rows))
    rows = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    picks = select_units(rows, num_keep).tolist()
    assert picks == naive_gram_schmidt(rows, num_keep)
    assert len(set(picks)) == num_keep


@pytest.mark.parametrize("shape", [(96, 24), (400, 100), (64, 64)])
def test_selection_equals_lapack_pivoted_qr(shape):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = scipy.linalg.qr(rows.T.numpy(), mode="r", pivoting=True)[1]
    assert select_units(rows, shape[1]).tolist() == order[: shape[1]].tolist()


def test_selection_keeps_lapack_order_when_norms_fall_by_many_decades():
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64))[0] for n in (160, 40))
    rows = left @ torch.diag(torch.logspace(0, -9, 40, dtype=torch.float64)) @ right.T
    order = scipy.linalg.qr(rows.T.numpy(), mode="r", pivoting=True)[1]
    assert select_units(rows, 36).tolist() == order[:36].tolist()


def test_duplicates_are_taken_once_a_round_and_zero_rows_last():
    base = torch.eye(4)[:3] * torch.tensor([[3.0], [2.0], [1.0]])
    rows = torch.cat([base, base, torch.zeros(2, 4)])
    assert select_units(rows, 3).tolist() == [0, 1, 2]
    assert select_units(rows, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_selection_ignores_a_positive_scale_and_the_span_is_complete_after_d_picks():
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    picks = select_units(rows, 12)
    assert torch.equal(picks, select_units(rows * 1e-6, 12))
    curve = residual_curve(rows, picks)
    assert curve[0] == 1 and curve[-1] < 1e-10 and bool((curve.diff() <= 1e-12).all())


def test_residual_curve_equals_projection_errors():
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    order = select_units(rows, 5)
    for k, left in enumerate(residual_curve(rows, order)):
        basis = np.linalg.qr(rows[order[:k]].T.numpy())[0]
        error = rows.numpy() - rows.numpy() @ basis @ basis.T
        assert left == pytest.approx(np.square(error).sum() / rows.square().sum().item(), abs=1e-12)


@pytest.mark.parametrize("num_keep", [0, 6, -1])
def test_a_count_outside_the_rows_is_refused(num_keep):
    with pytest.raises(BudgetError, match=r"use 1\.\.5"):
        select_units(torch.randn(5, 3), num_keep)


def test_pivoted_cholesky_picks_what_pivoted_qr_of_the_activations_picks():
    hidden = torch.randn(500, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hidden = hidden @ torch.randn(30, 30, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    order = scipy.linalg.qr(hidden.numpy(), mode="r", pivoting=True)[1]
    assert select_on_moments(hidden.T @ hidden, 30).tolist() == order.tolist()


def test_forward_selection_takes_the_unit_that_lowers_the_error_most():
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(300, 14, generator=generator, dtype=torch.float64)
    target = hidden @ torch.randn(14, 5, generator=generator, dtype=torch.float64)
    target += 0.1 * torch.randn(300, 5, generator=generator, dtype=torch.float64)
    expected: list[int] = []
    for _ in range(8):
        errors = {
            unit: float(np.linalg.lstsq(hidden[:, [*expected, unit]].numpy(), target.numpy(), rcond=None)[1].sum())
            for unit in range(14)
            if unit not in expected
        }
        expected.append(min(errors, key=errors.__getitem__))
    assert select_on_moments(hidden.T @ hidden, 8, cross_HD=hidden.T @ target).tolist() == expected


def test_moment_selection_past_the_rank_starts_a_new_round_without_repeats():
    hidden = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    hidden = torch.cat([hidden, hidden, torch.zeros(50, 2)], dim=1)
    for cross in (None, hidden.T @ hidden[:, :3]):
        picks = select_on_moments(hidden.T @ hidden, 10, cross_HD=cross).tolist()
        assert sorted(picks) == list(range(10))
        assert {i % 4 for i in picks[:4]} == {0, 1, 2, 3}


@pytest.mark.parametrize("with_bias", [True, False])
def test_fit_equals_ridge_on_the_stored_activations(with_bias):
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(200, 10, generator=generator, dtype=torch.float64) + 0.5
    target = torch.randn(200, 4, generator=generator, dtype=torch.float64) + 1
    keep = torch.tensor([7, 1, 4])
    start = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    bias = torch.zeros(4, dtype=torch.float64) if with_bias else None
    x, y = hidden[:, keep], target
    if with_bias:
        x, y = x - x.mean(0), y - y.mean(0)
    penalty = 0.1 * float(x.square().sum(0).mean())
    rows = torch.cat([x, penalty**0.5 * torch.eye(3, dtype=torch.float64)])
    right = torch.cat([y, penalty**0.5 * start.T])
    expected = np.linalg.lstsq(rows.numpy(), right.numpy(), rcond=None)[0].T
    weight, new_bias = fit_output(stored_stats(hidden, target), keep, start, bias, ridge=0.1)
    np.testing.assert_allclose(weight, expected, atol=1e-10)
    if with_bias:
        assert new_bias is not None
        np.testing.assert_allclose(new_bias, target.mean(0) - hidden[:, keep].mean(0) @ weight.T, atol=1e-10)


@given(st.integers(0, 1000), st.floats(1e-8, 1e3))
@settings(max_examples=30, deadline=None)
def test_a_fit_is_never_worse_than_no_repair_and_the_error_from_moments_is_exact(seed, ridge):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    target = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    keep = torch.randperm(8, generator=generator)[:4]
    start, bias = (
        torch.randn(3, 4, generator=generator, dtype=torch.float64),
        torch.randn(3, generator=generator),
    )
    stats = stored_stats(hidden, target)
    weight, new_bias = fit_output(stats, keep, start, bias, ridge=ridge)
    before, after = squared_error(stats, keep, start, bias), squared_error(stats, keep, weight, new_bias)
    assert after <= before + 1e-9
    slow = (hidden[:, keep] @ start.T + bias - target).square().sum(1).mean()
    assert before == pytest.approx(float(slow), rel=1e-9)


def test_a_dependent_unit_is_folded_exactly_and_a_huge_ridge_changes_only_the_bias():
    generator = torch.Generator().manual_seed(10)
    kept = torch.randn(100, 5, generator=generator, dtype=torch.float64)
    hidden = torch.cat([kept, kept @ torch.randn(5, 2, generator=generator, dtype=torch.float64) + 1], dim=1)
    weight = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    target, keep, bias = hidden @ weight.T, torch.arange(5), torch.zeros(3)
    stats = stored_stats(hidden, target)
    assert squared_error(stats, keep, *fit_output(stats, keep, weight[:, :5], bias, ridge=1e-12)) < 1e-10
    unchanged, _ = fit_output(stats, keep, weight[:, :5], bias, ridge=1e12)
    torch.testing.assert_close(unchanged, weight[:, :5])
