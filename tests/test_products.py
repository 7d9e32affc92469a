"""Fast sums of products against slow float64 ones, on activations that float32 is worst at."""

import pytest
import torch

from vitrim.calibrate.sums import HiddenAdder, LayerAdder
from vitrim.calibrate.walk import Sums
from vitrim.ops import products
from vitrim.ops.forward_selection import select_on_moments
from vitrim.ops.least_squares import centred_moments
from vitrim.ops.products import FLOAT32, Products
from vitrim.types import LayerSite


def hard_rows(num=600, width=37, seed=0, tiny=1e-24):
    """Rows with heavy tails, massive columns, tiny ones, means far above the spread, and constant and zero columns."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(width, width, generator=generator) / width**0.5
    rows = torch.randn(num, width, generator=generator) @ mixture
    rows = rows.sign() * rows.abs() ** 2.5
    rows[:, ::5] *= 1e3
    rows[:, 1::7] *= tiny
    rows[:, 2::6] += 1e3
    rows[:, 3], rows[:, 4] = 7.3, 0.0
    return rows


def worst(found, wanted, size_K, size_D):
    """The largest error of sums of products, each relative to the sizes of its two columns."""
    scale = torch.outer(size_K, size_D)
    return float(((found - wanted).abs() / torch.where(scale > 0, scale, 1)).max())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32])
@pytest.mark.parametrize("matmuls", ["highest", "medium"])  # medium: float32 products in bfloat16 where there are any
def test_sums_are_as_good_as_in_float64(monkeypatch, stored, matmuls):
    monkeypatch.setattr(products, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(products, "TILE_ROWS", 16)
    rows = hard_rows(tiny=1e-24 if stored == torch.float64 else 1e-14)  # the square of 1e-24 is no float32
    targets = hard_rows(width=11, seed=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmuls)
    try:
        sums = Sums(stored)
        for batch, wanted in zip(rows.split(150), targets.split(150), strict=True):
            sums.add(batch, wanted)
        stats = sums.done("mlp")
    finally:
        torch.set_float32_matmul_precision(before)
    x, t = rows.double(), targets.double()
    assert stats.hidden_HH.dtype == stored and torch.equal(stats.hidden_HH, stats.hidden_HH.T)
    assert bool(((stats.hidden_H - x.sum(0)).abs() <= 1e-6 * x.abs().sum(0)).all())
    assert bool(((stats.target_D - t.sum(0)).abs() <= 1e-6 * t.abs().sum(0)).all())
    assert abs(stats.target_square - float(t.square().sum())) <= 1e-12 * stats.target_square
    assert worst(stats.hidden_HH.double(), x.T @ x, x.norm(dim=0), x.norm(dim=0)) < 1e-6
    assert worst(stats.cross_HD, x.T @ t, x.norm(dim=0), t.norm(dim=0)) < 1e-6
    if stored == torch.float64:
        gram, cross = centred_moments(stats)
        x, t = x - x.mean(0), t - t.mean(0)
        varies = x.norm(dim=0) > 1e-20
        size = x.norm(dim=0)[varies]
        assert worst(gram[varies][:, varies], (x.T @ x)[varies][:, varies], size, size) < 2e-6
        assert worst(cross[varies], (x.T @ t)[varies], size, t.norm(dim=0)) < 2e-6


def test_float32_without_shift_would_lose_them():
    rows = hard_rows()[:, 2::6]
    x = rows.double() - rows.double().mean(0)
    plain = rows.T @ rows
    centred = plain.double() - torch.outer(rows.double().mean(0), rows.double().sum(0))
    assert worst(centred, x.T @ x, x.norm(dim=0), x.norm(dim=0)) > 1e-4


def test_groups_are_summed_as_one_by_one():
    rows = hard_rows(200, 12).unflatten(1, (3, 4)).transpose(0, 1)
    sums = Products()
    for part in rows.split(90, dim=1):
        sums.add(part)
    sums.finish_()
    assert sums.square_KK.shape == (3, 4, 4)
    torch.testing.assert_close(sums.square_KK, rows.double().mT @ rows.double(), rtol=1e-5, atol=0)
    layer = LayerSite(path="a", kind="conv", num_in=12, num_out=12, groups=3, kernel=(1,))
    adder = LayerAdder(layer=layer)
    adder.add(torch.zeros(200, 4), rows.transpose(0, 1).flatten(1)[:, None])  # channels last
    torch.testing.assert_close(adder.finished().square_GKK, sums.square_KK, rtol=1e-5, atol=0)


def test_rows_of_double_precision_keep_it():
    rows = torch.randn(300, 20, dtype=torch.float64)
    sums = Products()
    sums.add(rows)
    sums.finish_()
    assert sums.rounding == torch.finfo(torch.float64).eps
    torch.testing.assert_close(sums.square_KK, rows.T @ rows, rtol=1e-13, atol=1e-12)


def test_copies_of_units_are_not_picked_for_what_rounding_leaves_of_them():
    """Of three exact copies of each of 20 units one is picked, whatever the others' remainders are in float32."""
    hidden = torch.randn(4000, 20) @ torch.randn(20, 20)
    hidden, adder = torch.cat([hidden, 2 * hidden, hidden - 3], 1)[:, torch.randperm(60)], HiddenAdder()
    target = hidden @ torch.randn(60, 8)
    sums = Sums()
    for rows, wanted in zip(hidden.split(500), target.split(500), strict=True):
        sums.add(rows, wanted)
        adder.add(rows)
    stats = sums.done("mlp")
    assert stats.rounding == FLOAT32 and float(adder.sums.rounding) == FLOAT32
    gram, cross = centred_moments(stats)
    for of in (None, cross):
        picks = select_on_moments(gram, 20, cross_HD=of, rounding=stats.rounding)
        assert torch.linalg.matrix_rank((hidden - hidden.mean(0))[:, picks].double()) == 20
