"""One round of greedy Gram-Schmidt by lazy blocks: the same picks as the naive loop, for a few matrix products.

The naive loop takes the row with the longest part outside the span of its picks, removes that direction from all rows
and starts again. Those residual norms only ever fall, so a norm that is out of date is still an upper bound, and a pick
is certain as soon as no other row's bound reaches it. Hence three nested sets of rows, each brought up to date only
when the next smaller one can't decide any more:

- all rows: bounds, lowered by one product for some 50 to 100 picks;
- the pool, the rows with the largest bounds: lowered by one product for each block;
- the block, the top of the pool: deflated in float64. Picks are pivoted Cholesky of its Gram matrix, ten or so at once.

Every decision is made in float64, on residuals taken from the raw rows. Bounds are lowered by float32 products for
weights of 32 bits or fewer, reduced by what rounding may have added: so float32 weights get the picks of a float64 loop
at the price of float32. Where bounds leave a choice open (many exact ties, residuals under
float32's rounding) one plain step decides, and products are float64 from there on.

Time at K = D, in plain H x D x K products, of which every exact method needs one: 5 at 15360 x 1792, 10 at
4304 x 1152, half as much again on Gaussian weights, whose rows are all alike (`benchmarks/selection.py`). Done in
slices, that product itself takes 1.5 to 2; the rest is float64: 2 to 4 rows are deflated for each pick, 4 K / H
products for every 2 of them, and each direction once more.

Deliberately not used: LAPACK's geqp3. In float64, for the same picks, it needs a copy of the weights, and where it is
faster (1536 x 384: 48 against 80 ms; about even at 3072 x 768) neither matters. In float32 it shared 57% of the picks
on Gaussian weights, 15360 x 1792. It breaks ties by rounding.

Shapes: R rows, D columns, K picks at most, M rows of the pool, B of the block, P picks of a block, N and C any rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitrim.errors import ModelError

# Squared norms this close count as tied, and the lowest index wins. A hundred times what rounding leaves in them, so
# rows that are equal in exact arithmetic stay tied whatever the order of sums; by chance, one pick in 1e6 is as close.
TIE = 1e-11
# A block is closed when its best squared norm fell by this factor: its Gram matrix has lost 2 of float64's 16 digits.
SPENT = 1e-2
# A row whose squared norm falls by this factor is deflated a second time: a tenth of it is left (Kahan's criterion).
SHORT = 1e-2
# Rows of a block, and blocks in a pool. 64 to 160 and 6 to 16 take the same time within 12%, 6144 x 1408 and up.
BLOCK, POOL = 96, 10
# Rows that are converted and multiplied at a time: 29 MiB in float64 at D = 1792.
CHUNK = 2048
EPSILON = torch.finfo(torch.float64).eps


class Round:
    """One round of greedy picks among rows, until there are enough or the other rows lie in the span of the picks.

    Args:
        rows_RD: one row per unit, any float dtype, (R, D); read in chunks, never changed.
        limit: upper bound on the number of picks.
        block: rows that are deflated in float64 at a time.
        on_block: called with the number of picks after each block.

    Raises:
        ModelError: a weight is not finite.
    """

    def __init__(self, rows_RD: Tensor, limit: int, *, block: int, on_block: Callable[[int], None]) -> None:
        self.rows_RD, self.block, self.on_block = rows_RD, block, on_block
        self.limit = min(limit, *rows_RD.shape)
        self.products = product_dtype(rows_RD)
        self.size_R = norms(rows_RD)
        if not bool(self.size_R.isfinite().all()):
            raise ModelError("weights to select from hold NaN or infinite values; load a sound checkpoint.")
        # The numerical rank: smaller residuals are what rounding leaves of rows in the span.
        self.floor = (max(*rows_RD.shape, 100) * EPSILON * float(self.size_R.max())) ** 2
        self.upper_R = self.size_R.square()  # bounds on the squared residual norms; -inf for rows that are taken
        self.basis_KD = rows_RD.new_zeros(self.limit, rows_RD.shape[1], dtype=torch.float64)
        self.picks: list[int] = []
        self.explained: list[Tensor] = []  # squared norm, over all rows, along each direction that all rows know
        self.block_index_B = torch.zeros(1, dtype=torch.int64, device=rows_RD.device)
        self.block_BD = rows_RD[:1].double()  # the residuals of these rows, exact

    def pick(self) -> Tensor:
        """Run the round and return the positions of the picked rows, in pick order."""
        while len(self.picks) < self.limit:
            num_before = len(self.picks)
            pool_M = top(self.upper_R, POOL * self.block)
            pool_MD = self.rows_RD[pool_M].to(self.products)
            while len(self.picks) < self.limit and self._pick_block(pool_M, pool_MD):
                pass
            if len(self.picks) == num_before:
                if not self._plain_step():
                    break
                pool_M = pool_M[:0]  # the pool does not know that pick
            if len(self.picks) < self.limit:
                self._lower_all(pool_M)
        return torch.tensor(self.picks, dtype=torch.int64, device=self.rows_RD.device)

    def curve(self) -> Tensor:
        """Return the share of the rows' squared norm left after 0, 1, ... picks, falling from 1, (picks + 1,)."""
        if sum(map(len, self.explained)) < len(self.picks):
            self._lower_all(self.block_index_B[:0])
        explained_P = torch.cat([self.size_R.new_zeros(0), *self.explained])
        return left_share(explained_P, float(self.size_R.square().sum()))

    def _pick_block(self, pool_M: Tensor, pool_MD: Tensor) -> bool:
        """Pick rows from the top of the pool while each pick is certain; return whether there was one."""
        index_B = pool_M[top(self.upper_R[pool_M], self.block)]
        rivals_R = self.upper_R.index_fill(0, index_B, -torch.inf)
        if len(index_B) == 0 or rivals_R.max() > (1 + 4 * TIE) * self.upper_R[index_B].max():
            return False  # rows outside the pool come first by now
        self._load_block(index_B)
        gram_BB = self.block_BD @ self.block_BD.T
        self.upper_R[index_B] = gram_BB.diagonal()
        limit = self.limit - len(self.picks)
        chosen_P, factor_PP = pick_inside(gram_BB, index_B, rivals_R, limit=limit, floor=self.floor)
        if len(chosen_P) == 0:
            return False
        directions_PD = torch.linalg.solve_triangular(factor_PP, self.block_BD[chosen_P], upper=False)
        directions_PD = orthonormal(directions_PD)
        self._add(index_B[chosen_P], directions_PD)
        pool = self.upper_R[pool_M], self.size_R[pool_M]
        self.upper_R[pool_M], _ = lower(pool_MD, *pool, directions_PD, self.products)
        self.upper_R[index_B] = self.block_BD.square().sum(1)
        self.upper_R[index_B[chosen_P]] = -torch.inf
        return True

    def _load_block(self, index_B: Tensor) -> None:
        """Make these rows the block; rows that stay in it are deflated already."""
        slot_B = torch.searchsorted(self.block_index_B, index_B).clamp(max=len(self.block_index_B) - 1)
        new_N = (self.block_index_B[slot_B] != index_B).nonzero()[:, 0]
        self.block_index_B, self.block_BD = index_B, self.block_BD[slot_B]
        self.block_BD[new_N] = self._residuals(index_B[new_N])

    def _add(self, index_P: Tensor, directions_PD: Tensor) -> None:
        """Record picks: add their directions to the basis and subtract them from the block's rows."""
        added = slice(len(self.picks), len(self.picks) + len(index_P))
        self.basis_KD[added] = directions_PD
        self.block_BD = deflate(self.block_BD, directions_PD)
        self.picks += index_P.tolist()
        self.on_block(len(self.picks))

    def _lower_all(self, pool_M: Tensor) -> None:
        """Bring the bounds of all rows up to date; those of the pool are up to date already."""
        first = sum(map(len, self.explained))
        # Deflated once more, all in one go: orthogonal to working precision, however little was left of their rows.
        directions_PD = orthonormal(deflate(self.basis_KD[first : len(self.picks)], self.basis_KD[:first]))
        self.basis_KD[first : len(self.picks)] = directions_PD
        upper_R, explained_P = lower(self.rows_RD, self.upper_R, self.size_R, directions_PD, self.products)
        self.upper_R = upper_R.index_copy(0, pool_M, self.upper_R[pool_M])
        self.explained.append(explained_P)

    def _plain_step(self) -> bool:
        """Pick one row by the exact norms of all rows that could come next.

        Returns:
            False if all rows lie in the span of the picks.
        """
        self.products = torch.float64
        known = float(self.upper_R[self.block_index_B].max())
        for part_C in (self.upper_R >= max((1 - TIE) * known, self.floor)).nonzero()[:, 0].split(CHUNK):
            self.upper_R[part_C] = self._residuals(part_C).square().sum(1)
        best = float(self.upper_R.max())
        if best <= self.floor:
            return False
        pick_1 = (self.upper_R >= (1 - TIE) * best).nonzero()[:1, 0]
        row_1D = deflate(self._residuals(pick_1), self._basis())
        self._add(pick_1, row_1D / row_1D.norm())
        self.upper_R[pick_1] = -torch.inf
        return True

    def _basis(self) -> Tensor:
        """Return the orthonormal directions of the picks so far."""
        return self.basis_KD[: len(self.picks)]

    def _residuals(self, index_N: Tensor) -> Tensor:
        """Return the part of rows outside the span of the picks, computed from the raw rows."""
        return deflate(self.rows_RD[index_N].double(), self._basis())


def top(upper_N: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` largest finite values in ascending order; the first ones of a tie."""
    count = min(count, int(upper_N.isfinite().sum()))
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=upper_N.device)
    least = upper_N.topk(count).values[-1]
    sure_N = upper_N > (1 + TIE) * least
    tied = ((upper_N >= (1 - TIE) * least) & ~sure_N).nonzero()[:, 0]
    sure = sure_N.nonzero()[:, 0]
    return torch.cat([sure, tied[: count - len(sure)]]).sort().values


def pick_inside(
    gram_BB: Tensor, index_B: Tensor, rivals_R: Tensor, *, limit: int, floor: float
) -> tuple[Tensor, Tensor]:
    """Pick rows of a block by pivoted Cholesky of their Gram matrix while no row outside it can come first.

    Args:
        gram_BB: inner products of the block's residuals, (B, B).
        index_B: their positions among all rows, ascending, so that the first of tied ones is the lowest.
        rivals_R: bounds of all rows, -inf for those of the block.
        limit: upper bound on the number of picks.
        floor: squared norm at or below which a residual is only rounding error.

    Returns:
        Positions of the picks in the block (P,), and the triangular factor of their Gram matrix (P, P).
    """
    device, bound = gram_BB.device, float(rivals_R.max())
    gram_BB = gram_BB.cpu()  # hundreds of tiny steps
    left_B = gram_BB.diagonal().clone()
    stop = max(floor, SPENT * float(left_B.max()))
    factor_BP = gram_BB.new_zeros(len(gram_BB), min(limit, len(gram_BB)))
    picks: list[int] = []
    for step in range(factor_BP.shape[1]):
        best = float(left_B.max())
        pick = int((left_B >= (1 - TIE) * best).int().argmax())
        if best <= stop or (bound >= (1 - TIE) * best and _comes_first(rivals_R, best, int(index_B[pick]))):
            break
        column_B = (gram_BB[pick] - factor_BP[:, :step] @ factor_BP[pick, :step]) / left_B[pick].sqrt()
        factor_BP[:, step] = column_B
        left_B -= column_B.square()
        left_B[pick] = -torch.inf
        picks.append(pick)
    chosen_P = torch.tensor(picks, dtype=torch.int64)
    return chosen_P.to(device), factor_BP[chosen_P, : len(picks)].to(device)


def _comes_first(rivals_R: Tensor, best: float, pick: int) -> bool:
    """Whether a row outside the block may be longer than the best row, or as long with a lower index."""
    return bool((rivals_R > (1 + TIE) * best).any() or (rivals_R[:pick] >= (1 - TIE) * best).any())


def lower(
    rows_ND: Tensor, upper_N: Tensor, size_N: Tensor, directions_PD: Tensor, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Lower the bounds on squared residual norms by each row's part along new orthonormal directions.

    Args:
        rows_ND: raw rows, (N, D).
        upper_N: upper bounds on the squared norms of their residuals, (N,).
        size_N: norms of the raw rows, (N,).
        directions_PD: new directions, float64, orthogonal to all earlier ones, (P, D).
        products: dtype in which rows and directions are multiplied.

    Returns:
        The lowered upper bounds (N,), still valid, and the rows' total squared norm along each direction (P,).
    """
    slack = product_error(rows_ND.shape[1], products) * len(directions_PD) ** 0.5
    directions_DP = directions_PD.to(products).T
    explained_P, lowered_N = directions_PD.new_zeros(len(directions_PD)), (1 + EPSILON) * upper_N
    for start in range(0, len(rows_ND), CHUNK):
        part = slice(start, start + CHUNK)
        squares_CP = (rows_ND[part].to(products) @ directions_DP).double().square_()
        explained_P += size_N.new_ones(len(squares_CP)) @ squares_CP  # four times faster than a sum down the columns
        lowered_N[part] -= (squares_CP.sum(1).sqrt() - slack * size_N[part]).clamp(min=0).square()
    return lowered_N, explained_P


def norms(rows_ND: Tensor) -> Tensor:
    """Return the norms of raw rows in float64 (N,), computed a chunk at a time.

    All chunks are written to one result: many small results would keep the heap from being reused.
    """
    norms_N = rows_ND.new_empty(len(rows_ND), dtype=torch.float64)
    for start in range(0, len(rows_ND), CHUNK):
        norms_N[start : start + CHUNK] = rows_ND[start : start + CHUNK].double().norm(dim=1)
    return norms_N


def deflate(rows_ND: Tensor, basis_PD: Tensor) -> Tensor:
    """Return the part of rows outside an orthonormal basis.

    It is computed a second time for rows of which a tenth or less is left (Kahan's criterion).
    """
    left_ND = rows_ND - (rows_ND @ basis_PD.T) @ basis_PD
    short_N = (left_ND.square().sum(1) < SHORT * rows_ND.square().sum(1)).nonzero()[:, 0]
    if len(short_N):
        again_ND = left_ND[short_N]
        left_ND[short_N] = again_ND - (again_ND @ basis_PD.T) @ basis_PD
    return left_ND


def left_share(explained_K: Tensor, total: float) -> Tensor:
    """Return the share of a total that is left before and after each part is subtracted, never below 0, (K + 1,)."""
    left_K = 1 - explained_K.cumsum(0) / max(total, torch.finfo(torch.float64).tiny)
    return torch.cat([left_K.new_ones(1), left_K]).clamp(min=0)


def orthonormal(rows_PD: Tensor) -> Tensor:
    """Make nearly orthonormal rows orthonormal to working precision, by the Cholesky factor of their Gram matrix."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky(rows_PD @ rows_PD.T), rows_PD, upper=False)


def product_dtype(rows_RD: Tensor) -> torch.dtype:
    """Return float32 for weights of 32 bits or fewer if its products have float32's full precision here, else float64.

    This is measured, because TF32 and bfloat16 products can be switched on in several ways, in torch 2.6 for
    contiguous factors alone, and tiny numbers underflow.
    """
    if rows_RD.dtype == torch.float64:
        return torch.float64
    sample_ND = rows_RD[:: -(-len(rows_RD) // 256)].float().contiguous()
    exact_NN = sample_ND.double() @ sample_ND.double().T
    size_N = exact_NN.diagonal().sqrt()
    allowed_NN = product_error(rows_RD.shape[1], torch.float32) * torch.outer(size_N, size_N)
    good = ((sample_ND @ sample_ND.T).double() - exact_NN).abs() <= allowed_NN
    return torch.float32 if bool(good.all()) else torch.float64


def product_error(width: int, dtype: torch.dtype) -> float:
    """Return the largest error of the product of a row with a unit direction, relative to the row's norm.

    It covers the rounding of the direction and of a sum of D terms, which grows like the root of D (Higham and Mary,
    2019), twice over; of 800,000 measured errors the largest was 0.01 (D = 1792) to 0.4 (D = 2..192) of it.
    """
    return (width**0.5 + 1) * torch.finfo(dtype).eps
