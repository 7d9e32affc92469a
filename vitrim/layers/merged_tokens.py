"""A pre-norm transformer block that merges similar patches between its attention and its MLP.

Patches are dealt out in turn to two sides; those on the first whose keys are most like one on the other are averaged
into it. A merged token counts for as many patches as it stands for, in averages and in attention, so its size has to
reach the next block. It travels on the tensor of tokens itself; where something has lost it, the block says so.

Shapes: B images, N tokens, D model width, S and T tokens of the two sides.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitrim.errors import ModelError
from vitrim.layers.attention import SlimAttention
from vitrim.layers.kept_tokens import BlockNames, SplitBlock


class MergedTokens(SplitBlock):
    """A block that merges `num_merged` patches into others; the `num_prefix` tokens in front of them stay as they are.

    `num_patches` is how many there are in the model's whole sequence.
    """

    def __init__(
        self,
        block: nn.Module,
        names: BlockNames,
        *,
        num_prefix: int,
        num_given: int,
        num_merged: int,
        num_patches: int,
    ) -> None:
        super().__init__(block, names, positions=range(num_prefix), num_given=num_given)
        self.num_prefix, self.num_merged, self.num_patches = num_prefix, num_merged, num_patches

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return fewer tokens, those in front first.

        Raises:
            ModelError: the sizes of merged tokens were lost on the way from the block before.
        """
        self.check(hidden_states, *args, *kwargs.values())
        size_BN1 = getattr(hidden_states, "token_sizes", None)
        if size_BN1 is None and self.num_given < self.num_patches + self.num_prefix:
            raise ModelError("merged tokens came without their sizes; call the blocks one after the other, unchanged.")
        tokens_BND, names = hidden_states, self.names
        attention = cast(SlimAttention, self.get_submodule(names.attention))
        normed_BND = self.part(names.norm, tokens_BND)
        bias = None if size_BN1 is None else size_BN1.log()[:, None, None, :, 0]
        mixed_BND, key_BNF = attention.with_keys(normed_BND, bias)
        tokens_BND = tokens_BND + self.through(names.behind_attention, mixed_BND)
        if size_BN1 is None:
            size_BN1 = torch.ones_like(tokens_BND[..., :1])
        if self.num_merged:
            tokens_BND, size_BN1 = merge(tokens_BND, size_BN1, key_BNF, self.num_prefix, self.num_merged)
        output = self.with_mlp(tokens_BND)
        output.token_sizes = size_BN1  # type: ignore[attr-defined]
        return output

    def extra_repr(self) -> str:
        """Return how many patches are merged."""
        return f"{self.num_merged} of {self.num_given - self.num_prefix} patches merged into others"


def merge(
    tokens_BND: Tensor, size_BN1: Tensor, key_BNF: Tensor, num_prefix: int, num_merged: int
) -> tuple[Tensor, Tensor]:
    """Return tokens and sizes after merging patches: the tokens in front, what is left of one side, and the other side.

    Args:
        tokens_BND: the tokens.
        size_BN1: how many patches each stands for.
        key_BNF: what tells how alike they are, by cosine.
        num_prefix: tokens in front of the patches.
        num_merged: how many of the first side go; at most half of the patches.
    """
    front, patches = (slice(None, num_prefix), slice(num_prefix, None))
    unit_BNF = normalize(key_BNF[:, patches], dim=-1)
    alike_BST = unit_BNF[:, ::2] @ unit_BNF[:, 1::2].mT
    best_BS, place_BS = alike_BST.max(-1)
    order_BS = best_BS.topk(best_BS.shape[-1], dim=-1).indices  # ONNX knows no stable sort
    # What stays keeps its order: the next block's two sides go by it, and rounding must not deal them anew.
    gone, left = order_BS[:, :num_merged], order_BS[:, num_merged:].sort(dim=-1).values
    into = place_BS.gather(1, gone)
    both = []
    for values in (tokens_BND * size_BN1, size_BN1):
        first, second = values[:, patches][:, ::2], values[:, patches][:, 1::2]
        width = values.shape[-1]

        def at(index: Tensor, width: int = width) -> Tensor:
            return index[..., None].expand(-1, -1, width)

        moved = first.gather(1, at(gone))
        sums = second.scatter_add(1, at(into), moved)
        both.append(torch.cat([values[:, front], first.gather(1, at(left)), sums], dim=1))
    return both[0] / both[1], both[1]
