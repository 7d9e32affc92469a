"""The closed-form parts against slow, obvious references."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.activations import stored_stats
from vitrim.errors import BudgetError, ModelError
from vitrim.ops.forward_selection import REFRESH, select_on_moments
from vitrim.ops.gram_schmidt import select_units, select_with_curve
from vitrim.ops.lazy_blocks import Round
from vitrim.ops.least_squares import fit_output, squared_error


def naive_gram_schmidt(rows, num_keep):
    """The published loop: rewrite the whole matrix at each pick, restart from raw rows past the rank.

    Ties go to the lowest index; squared norms within 1e-10 of the largest are tied, whatever rounding says.
    """
    rows = rows.double()
    picked = []
    while len(picked) < num_keep:
        residual = rows.clone()
        residual[picked] = 0
        floor = max(*rows.shape, 100) * torch.finfo(torch.float64).eps * residual.norm(dim=1).max()
        round_size = 0
        while len(picked) < num_keep and round_size < rows.shape[1]:
            squares = residual.square().sum(1)
            squares[picked] = -1
            if squares.max() <= floor**2:
                break
            best = int((squares >= (1 - 1e-10) * squares.max()).nonzero()[0])
            direction = residual[best] / residual[best].norm()
            for _ in range(2):
                residual -= torch.outer(residual @ direction, direction)
            residual[best] = 0
            picked.append(best)
            round_size += 1
        if round_size == 0:
            picked += [i for i in range(len(rows)) if i not in picked][: num_keep - len(picked)]
    return picked


def conditioned(num_rows, width, decades, seed):
    """Rows whose singular values fall over so many decades."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((num_rows, width), (width, width))
    left, right = (torch.linalg.qr(torch.randn(*size, generator=generator, dtype=torch.float64))[0] for size in sizes)
    return left @ torch.diag(torch.logspace(0, -decades, width, dtype=torch.float64)) @ right.T


def random_rows(kind, num_rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    scale = torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    which = torch.randint(max(1, num_rows // 3), (num_rows,), generator=generator)
    if kind == "dependent":
        rank = max(1, width // 2)
        return rows[:, :rank] @ torch.randn(rank, width, generator=generator, dtype=torch.float64)
    if kind == "steep":
        return rows * torch.logspace(0, -8, width) @ torch.linalg.qr(rows.T @ rows)[0]
    return {
        "gaussian": rows,
        "duplicates": rows[which],
        "zeros": rows * (scale < 0.6),
        "scaled": rows * 10 ** (8 * scale - 4),
        "small": rows * 1e-25,
        "integers": rows.clamp(-1, 1).round(),
        "one-hot": torch.eye(width, dtype=torch.float64)[which % width] * (1 + scale.round()),
        "equal angles": torch.eye(max(num_rows, width), dtype=torch.float64)[:num_rows, :width] + 0.5,
    }[kind]


KINDS = [
    "gaussian",
    "duplicates",
    "zeros",
    "scaled",
    "small",
    "integers",
    "one-hot",
    "equal angles",
    "dependent",
    "steep",
]


@given(
    st.sampled_from(KINDS),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 50),
    st.integers(1, 20),
    st.sampled_from([1, 3, 128]),
    st.integers(0, 10_000),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_selection_equals_the_naive_loop(which, dtype, num_rows, width, block, seed, data):
    num_keep = data.draw(st.integers(1, num_rows))
    rows = random_rows(which, num_rows, width, seed).to(dtype)
    counts: list[int] = []
    picks = select_units(rows, num_keep, block=block, on_block=counts.append).tolist()
    assert picks == naive_gram_schmidt(rows, num_keep)
    assert len(set(picks)) == num_keep
    assert counts == sorted(set(counts)) and counts[-1] == num_keep


@pytest.mark.parametrize("shape", [(96, 24), (400, 100), (64, 64), (40, 90), (2500, 150)])
def test_selection_equals_lapack_pivoted_qr(shape):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = scipy.linalg.qr(rows.T.numpy(), mode="r", pivoting=True)[1]
    for block in (1, 3, 128):
        assert select_units(rows, min(shape), block=block).tolist() == order[: min(shape)].tolist()


@pytest.mark.parametrize(("decades", "num_same"), [(9, 36), (12, 30)])
def test_selection_keeps_lapack_order_when_norms_fall_by_many_decades(decades, num_same):
    rows = conditioned(1200, 40, decades, seed=2)
    order = scipy.linalg.qr(rows.T.numpy(), mode="r", pivoting=True)[1]
    for block in (1, 3, 128):
        picks = select_units(rows, 40, block=block)
        assert picks[:num_same].tolist() == order[:num_same].tolist()
        # Past that, the order of residuals near 1e-12 is rounding; their span is not.
        assert torch.linalg.matrix_rank(rows[picks], rtol=1e-15) == 40


def test_float32_weights_get_float64_picks_where_residuals_are_under_float32_rounding():
    generator = torch.Generator().manual_seed(12)
    rows = torch.randn(1500, 10, generator=generator) @ torch.randn(10, 60, generator=generator)
    rows += 1e-6 * torch.randn(1500, 60, generator=generator)
    for block in (3, 96):
        assert select_units(rows, 60, block=block).tolist() == naive_gram_schmidt(rows, 60)


def test_picks_do_not_depend_on_how_exact_this_machine_makes_float32_products():
    rows = 10 + torch.randn(1500, 64, generator=torch.Generator().manual_seed(13))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert select_units(rows, 64, block=2).tolist() == naive_gram_schmidt(rows, 64)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("decades", [0, 6, 12])
def test_directions_are_orthogonal_to_working_precision(decades):
    done = Round(conditioned(1200, 40, decades, seed=16), 40, block=96, on_block=lambda num_picks: None)
    done.pick()
    done.curve()
    np.testing.assert_allclose(done.basis_KD @ done.basis_KD.T, np.eye(40), atol=3e-15)


def test_weights_are_never_copied_whole_in_float64():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                self.numel = max(self.numel, result.numel())
            return result

    rows = torch.randn(10_000, 32, generator=torch.Generator().manual_seed(14)).bfloat16()
    with Largest() as largest:
        select_with_curve(rows, 32)
    assert 0 < largest.numel < rows.numel() / 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    rows = torch.ones(4, 3)
    rows[2, 1] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        select_units(rows, 2)


def test_duplicates_are_taken_once_a_round_and_zero_rows_last():
    base = torch.eye(4)[:3] * torch.tensor([[3.0], [2.0], [1.0]])
    rows = torch.cat([base, base, torch.zeros(2, 4)])
    assert select_units(rows, 3).tolist() == [0, 1, 2]
    assert select_units(rows, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_selection_ignores_a_positive_scale_and_the_span_is_complete_after_d_picks():
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    picks = select_units(rows, 12)
    assert torch.equal(picks, select_units(rows * 1e-6, 12))
    _, curve = select_with_curve(rows, 12)
    assert curve[0] == 1 and curve[-1] < 1e-10 and bool((curve.diff() <= 1e-12).all())


def slow_curve(rows, order):
    rows, lefts = rows.double(), []
    for k in range(len(order) + 1):
        left = rows - rows @ torch.linalg.pinv(rows[order[:k]], rtol=1e-10) @ rows[order[:k]]
        lefts.append(float(left.square().sum() / rows.square().sum()))
    return lefts


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-7)])
@pytest.mark.parametrize("which", ["gaussian", "dependent", "zeros"])
def test_selection_gives_the_residual_curve_on_the_way(which, dtype, tolerance):
    rows = random_rows(which, 300, 30, seed=15).to(dtype)
    for num_keep in (1, 20, 30, 50):
        picks, curve = select_with_curve(rows, num_keep)
        assert torch.equal(picks, select_units(rows, num_keep))
        np.testing.assert_allclose(curve, slow_curve(rows, picks), atol=tolerance)


def test_of_zero_rows_nothing_is_explained():
    picks, curve = select_with_curve(torch.zeros(5, 3), 2)
    assert picks.tolist() == [0, 1] and curve.tolist() == [1, 1, 1]


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


def test_lazily_rewritten_cross_moments_pick_what_rewriting_them_at_each_pick_does():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(900, 400, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 400)
    target = hidden @ torch.randn(400, 20, generator=generator, dtype=torch.float64)
    gram, cross = hidden.T @ hidden, hidden.T @ target
    num_keep = 2 * REFRESH + 20
    residual_gram, residual, expected = gram.clone(), cross.clone(), []
    for _ in range(num_keep):
        scores = residual.square().sum(1) / residual_gram.diagonal()
        scores[expected] = -1
        best = int(scores.argmax())
        column = residual_gram[:, best] / residual_gram[best, best]
        residual -= torch.outer(column, residual[best])
        residual_gram -= torch.outer(column, residual_gram[best].clone())
        expected.append(best)
    assert select_on_moments(gram, num_keep, cross_HD=cross).tolist() == expected


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
    energies = hidden[:, keep].square().sum(0)
    sizes = (start.square() / (start.square() @ energies)[:, None]).sum(0)
    penalty = (0.1 * (sizes * energies).mean() / sizes).sqrt().diag()
    rows = torch.cat([x, penalty])
    right = torch.cat([y, penalty @ start.T])
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
