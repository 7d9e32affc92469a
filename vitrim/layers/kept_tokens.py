"""A pre-norm transformer block that puts out some of its tokens: the others serve as keys and values, and end there.

Queries, the residual, its projection and the MLP are those of the kept tokens alone, so sequences really get shorter.
The block's own layers stay under their own names; only their order is known here, by what libraries call them. That it
is this order is tried on images before anything is cut (`calibrate.token_blocks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vitrim.errors import ModelError, SiteNotFoundError
from vitrim.layers.attention import SlimAttention


class BlockNames(NamedTuple):
    """What the parts of a block are called, in the order in which tokens pass through them."""

    norm: str
    attention: str
    behind_attention: tuple[str, ...]
    mlp_norm: str
    mlp: str
    behind_mlp: tuple[str, ...]


# Parts behind attention and MLP (layer scale, drop path, dropout) may be missing.
BLOCKS = (
    BlockNames("norm1", "attn", ("ls1", "drop_path1"), "norm2", "mlp", ("ls2", "drop_path2")),
    BlockNames("norm1", "attention", ("layer_scale1", "drop_path"), "norm2", "mlp", ("layer_scale2", "drop_path")),
    BlockNames("layernorm_before", "attention", ("dropout",), "layernorm_after", "mlp", ("dropout",)),
    BlockNames("layer_norm1", "self_attn", (), "layer_norm2", "mlp", ()),
)


def block_names(block: nn.Module, path: str) -> BlockNames:
    """Return what the parts of a block are called.

    Raises:
        SiteNotFoundError: it has other parts than a block that can be split, or tensors of its own.
    """
    have = {name for name, _ in block.named_children()}
    own = [name for name, _ in (*block.named_parameters(recurse=False), *block.named_buffers(recurse=False))]
    for names in BLOCKS:
        needed = {names.norm, names.attention, names.mlp_norm, names.mlp}
        if needed <= have <= needed | {*names.behind_attention, *names.behind_mlp} and not own:
            return names
    raise SiteNotFoundError(
        f"{path}: is no block of norm, attention, norm and MLP that tokens can leave ({type(block).__name__}); use a "
        "method that cuts widths."
    )


class SplitBlock(nn.Module):
    """A block's parts under their own names, run by a subclass that lets tokens end between them.

    Args:
        block: the block whose parts are taken over; its attention must be a `SlimAttention`.
        names: what they are called.
        positions: where the tokens that go on stood in the model's whole sequence.
        num_given: how many tokens come in.
    """

    def __init__(self, block: nn.Module, names: BlockNames, *, positions: Sequence[int], num_given: int) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self.names, self.positions, self.num_given = names, tuple(positions), num_given

    def check(self, tokens_BND: Tensor, *others: object) -> None:
        """Check what a block is called with.

        Raises:
            ModelError: there are more or fewer tokens than those that it was made for, or a mask.
        """
        if tokens_BND.shape[1] != self.num_given:
            raise ModelError(
                f"the kept tokens were chosen among {self.num_given} and these images have {tokens_BND.shape[1]}; use "
                "images of the size that the model was searched on, or search again on these."
            )
        if any(isinstance(value, Tensor) for value in others):
            raise ModelError("a block that lets tokens end takes no mask and no rotary positions.")

    def part(self, name: str, tokens: Tensor) -> Tensor:
        """Run one part of the block on tokens."""
        return self.get_submodule(name)(tokens)

    def through(self, names: Sequence[str], tokens: Tensor) -> Tensor:
        """Run those of some parts that the block has on tokens, one after the other."""
        for name in names:
            tokens = self.part(name, tokens) if name in self._modules else tokens
        return tokens

    def with_mlp(self, tokens: Tensor) -> Tensor:
        """Return tokens with what the MLP adds to them."""
        names = self.names
        return tokens + self.through(names.behind_mlp, self.part(names.mlp, self.part(names.mlp_norm, tokens)))


class KeptTokens(SplitBlock):
    """A block that puts out the tokens `kept_tokens` of those that it is given; `given` are their positions, too."""

    kept_tokens: Tensor

    def __init__(
        self,
        block: nn.Module,
        names: BlockNames,
        *,
        positions: Sequence[int],
        given: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__(block, names, positions=positions, num_given=len(given))
        place = {position: number for number, position in enumerate(given)}
        index = torch.tensor([place[position] for position in positions], dtype=torch.long)
        self.register_buffer("kept_tokens", index.to(device))

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the kept ones of the tokens (B, N, D)."""
        self.check(hidden_states, *args, *kwargs.values())
        return self.run(hidden_states, self.kept_tokens)

    def run(self, tokens_BND: Tensor, index_K: Tensor) -> Tensor:
        """Return the tokens (B, K, D) at an index, as the block makes them of themselves and all others."""
        normed_BND = self.part(self.names.norm, tokens_BND)
        attention = self.get_submodule(self.names.attention)
        mixed = attention(normed_BND, queries=normed_BND.index_select(1, index_K))
        mixed_BKD = mixed[0] if isinstance(mixed, tuple) else mixed
        kept_BKD = tokens_BND.index_select(1, index_K)
        return self.with_mlp(kept_BKD + self.through(self.names.behind_attention, mixed_BKD))

    def attention_maps(self, tokens_BND: Tensor) -> Iterator[Tensor]:
        """Yield the attention (B, N, N) of each head, rows summing to 1; only one is held at a time."""
        attention = cast(SlimAttention, self.get_submodule(self.names.attention))
        yield from attention.attention_maps(self.part(self.names.norm, tokens_BND))

    def extra_repr(self) -> str:
        """Return how many tokens stay."""
        return f"{len(self.positions)} of {self.num_given} tokens"
