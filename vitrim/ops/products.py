"""Running sums of activations and of their products: as exact as solving with them needs, at the price of float32.

Products are in float32, of a bounded number of tokens at a time, and are added up in float64. Float32 would lose a
small spread beside a large mean, and squares of very large or small values. So each value is shifted by its mean over
the first tokens and scaled by a power of two before, and both are undone in float64 at the end: what is left is a
rounding of 1e-7 of the product of two values' sizes. Of second moments, which are symmetric, only the upper tiles are
computed. At 1536 units on one core of an EPYC that takes a third of the time of float64 products.

Processes that share the tokens shift and scale by the main one's first, so that their sums add up. What comes of it is
what one process gets, but for the order in which float64 sums are added.

Shapes: N tokens, K and D values of a token; any dimensions may stand in front.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.ops.gram_schmidt import working_dtype
from vitrim.ops.lazy_blocks import product_dtype
from vitrim.share import ALONE, Share

CHUNK_TOKENS = 2048  # tokens that are multiplied at a time
TILE_ROWS = 256  # rows of second moments that are computed at a time
PROBED = 512  # tokens of the first chunk that tell how exact float32 products are here
FLOAT32, FLOAT64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


class Products:
    """Sums of tokens and of their products with themselves and, if there are any, with other values of the same tokens.

    The sums are plain ones once `finish_` has been called.

    Args:
        stored: dtype of the second moments; float32 halves their memory, and they are added up in float64 all the same.
        share: of the tokens, where several processes add some each; all of them begin and finish, with tokens or not.
    """

    def __init__(self, stored: torch.dtype = torch.float64, share: Share = ALONE) -> None:
        self.stored, self.share, self.num_tokens, self.rounding = stored, share, 0, FLOAT64
        self._sides: list[_Side] = []

    @property
    def total_K(self) -> Tensor:
        """The sum over tokens (K,)."""
        return self._sides[0].total_K

    @property
    def other_total_D(self) -> Tensor:
        """The sum of the other values (D,)."""
        return self._sides[1].total_K

    def add(self, rows_NK: Tensor, others_ND: Tensor | None = None) -> None:
        """Add a batch of tokens."""
        num_chunks = max(1, -(-rows_NK.shape[-2] // CHUNK_TOKENS))
        given = [rows_NK] if others_ND is None else [rows_NK, others_ND]
        for parts in zip(*(each.chunk(num_chunks, dim=-2) for each in given), strict=True):
            floats = [part if part.dtype == torch.float64 else part.float() for part in parts]
            self.begin(floats)
            self._add_some([side.apply(part) for side, part in zip(self._sides, floats, strict=True)])
            if others_ND is not None:
                self.other_square_D += floats[1].to(self.sum_dtype).square().sum(-2)
            self.num_tokens += parts[0].shape[-2]

    def begin(self, parts: list[Tensor] | None = None) -> None:
        """Fix shifts and scales by the first tokens, and see in which precision they can be multiplied.

        Args:
            parts: the first tokens; None on a process that has none, and where all tokens of the main one are over.
        """
        if self._sides:
            return
        with torch.inference_mode(False):  # sums that were begun in that mode are finished outside it
            fixed, self.product_dtype = self.share.on_main(lambda: _fixed(parts or []))
            self._sides = [_Side(*each) for each in fixed]
            if not self._sides:
                return
            first = self._sides[0].shift_K
            self.sum_dtype, self.rounding = working_dtype(first.device), torch.finfo(self.product_dtype).eps
            stored = self.stored if self.stored.itemsize < self.sum_dtype.itemsize else self.sum_dtype
            self.square_KK = torch.zeros(*first.shape, first.shape[-1], dtype=stored, device=first.device)
            for other in self._sides[1:]:
                sizes = *first.shape, other.shift_K.shape[-1]
                self.cross_KD = torch.zeros(*sizes, dtype=self.sum_dtype, device=first.device)
                self.other_square_D = torch.zeros_like(self.cross_KD[..., 0, :])

    def _add_some(self, parts: list[Tensor]) -> None:
        for side, part in zip(self._sides, parts, strict=True):
            side.total_K += part.sum(-2)
        rows_NK, *others = (part.to(self.product_dtype) for part in parts)
        for start in range(0, rows_NK.shape[-1], TILE_ROWS):
            stop = start + TILE_ROWS
            tile, product = self.square_KK[..., start:stop, start:], rows_NK[..., start:stop].mT @ rows_NK[..., start:]
            if tile.dtype == self.sum_dtype:
                tile += product
            else:
                tile.copy_(tile.to(self.sum_dtype) + product)
        for other_ND in others:
            self.cross_KD += rows_NK.mT @ other_ND

    def finish_(self) -> None:
        """Undo shifts and scales and fill in the lower half, in place, tile by tile; nothing can be added behind it.

        Where tokens are shared, every process has the sums over all of them then.
        """
        self.begin()
        self._join_()
        for side in self._sides:
            side.finish_(self.num_tokens)
        rows, *others = self._sides
        for start in range(0, self.square_KK.shape[-1], TILE_ROWS):
            stop, tile = start + TILE_ROWS, self.square_KK[..., start : start + TILE_ROWS, start:]
            full = rows.undo(tile.to(self.sum_dtype), slice(start, stop), rows, slice(start, None))
            corner = full[..., : full.shape[-2]]
            corner.copy_(corner.triu() + corner.triu(1).mT)
            tile.copy_(full)
            self.square_KK[..., stop:, start:stop] = tile[..., full.shape[-2] :].mT
        for other in others:
            self.cross_KD = rows.undo(self.cross_KD, slice(None), other, slice(None))

    def _join_(self) -> None:
        """Add up the sums of all processes, second moments tile by tile."""
        if self.share.num == 1:
            return
        self.num_tokens = int(self.share.total(self.num_tokens))
        self.share.sum_(side.total_K for side in self._sides)
        if len(self._sides) > 1:
            self.share.sum_([self.cross_KD, self.other_square_D])
        for start in range(0, self.square_KK.shape[-1], TILE_ROWS):
            tile = self.square_KK[..., start : start + TILE_ROWS, start:]
            summed = tile.to(self.sum_dtype, copy=True).contiguous()
            self.share.sum_([summed])
            tile.copy_(summed)


def _fixed(parts: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], torch.dtype]:
    """Return what each side is shifted and scaled by, from its first tokens, and the type in which products are."""
    fixed, dtype = [], torch.float64
    for first_NK in parts:
        dtype = working_dtype(first_NK.device)
        shift_K = first_NK.mean(-2, dtype=dtype).to(first_NK.dtype)
        size_K = (first_NK - shift_K[..., None, :]).abs().amax(-2)
        exponent_K = torch.where(size_K > 0, size_K, 1).log2().round()
        fixed.append((shift_K, torch.exp2(-exponent_K.clamp(-100, 100))))
    if parts and dtype == torch.float64:
        dtype = product_dtype(_Side(*fixed[0]).apply(parts[0])[..., :PROBED, :].mT.flatten(0, -2))
    return fixed, dtype


class _Side:
    """What one side of a product is shifted and scaled by, and the sum of its rows."""

    def __init__(self, shift_K: Tensor, scale_K: Tensor) -> None:
        self.shift_K, self.scale_K = shift_K, scale_K
        self.total_K = torch.zeros_like(shift_K, dtype=working_dtype(shift_K.device))

    def apply(self, rows_NK: Tensor) -> Tensor:
        """Return rows, shifted and scaled."""
        return (rows_NK - self.shift_K[..., None, :]).mul_(self.scale_K[..., None, :])

    def finish_(self, num_tokens: int) -> None:
        """Make the total a plain one; `moved_K` is what it is without the shift."""
        self.inverse_K = 1 / self.scale_K.to(self.total_K)
        self.moved_K = self.total_K * self.inverse_K
        self.total_K = self.moved_K + num_tokens * self.shift_K.to(self.total_K)

    def undo(self, sums_KD: Tensor, mine: slice, other: _Side, its: slice) -> Tensor:
        """Return the sums of plain products of some of these values and some of another side's."""
        inverse_K1, moved_K1, shift_K1 = (
            each.to(sums_KD)[..., mine, None] for each in (self.inverse_K, self.moved_K, self.shift_K)
        )
        inverse_1D, total_1D, shift_1D = (
            each.to(sums_KD)[..., None, its] for each in (other.inverse_K, other.total_K, other.shift_K)
        )
        return sums_KD * inverse_K1 * inverse_1D + shift_K1 * total_1D + moved_K1 * shift_1D
