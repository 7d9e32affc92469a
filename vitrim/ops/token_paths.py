"""How much each token matters to those that stay at the end: summed over all paths through heads and blocks.

A path takes one head in each block; its effect is the product of the heads' attention maps, rows of tokens that are
gone left out. There are H^L paths, but their sum of squares needs no list of them: with G = sum of A'A over the paths
A behind a block, one more block in front makes it the sum over its heads of P' G P.

Shapes: B images, N tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def with_shortcut(maps: Iterable[Tensor]) -> Iterable[Tensor]:
    """Add to each head's attention (B, N, N) the identity, which the block's residual sum passes on."""
    return (map_BNN + torch.eye(map_BNN.shape[-1], dtype=map_BNN.dtype, device=map_BNN.device) for map_BNN in maps)


def paths_behind(later_BNN: Tensor, maps: Iterable[Tensor], keep: Tensor) -> Tensor:
    """Return the sum of A'A over all paths from a block's input on, given that from its output on.

    Args:
        later_BNN: the sum over the paths behind the block; the identity behind the last one.
        maps: the attention (B, N, N) of each of the block's heads.
        keep: the tokens that the block puts out; paths through others end.
    """
    kept_BKK = later_BNN[:, keep][:, :, keep]
    total_BNN = torch.zeros_like(later_BNN)
    for map_BNN in maps:
        rows_BKN = map_BNN[:, keep]
        total_BNN += rows_BKN.mT @ (kept_BKK @ rows_BKN)
    return total_BNN


def token_scores(later_BNN: Tensor, maps: Iterable[Tensor], tokens_BND: Tensor) -> Tensor:
    """Return for each token that a block could put out (B, N) the sum over all paths of ||A[:, i] u_i'||^2.

    Args:
        later_BNN: the sum over the paths behind the block, of `paths_behind`.
        maps: the attention (B, N, N) of each of the block's heads.
        tokens_BND: the block's input; u_i is what a head gathers of its absolute values.
    """
    size_BND = tokens_BND.abs()
    gathered_BN = sum((map_BNN @ size_BND).square().sum(-1) for map_BNN in maps)
    return later_BNN.diagonal(dim1=-2, dim2=-1) * gathered_BN
