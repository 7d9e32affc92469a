"""Self-attention whose heads have fewer dimensions for queries and keys, for values, or for both.

The softmax keeps the scale of the original heads: dropping dimensions must not change the temperature. Masks and
positions are not supported, and are refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vitrim.errors import ModelError


class SlimAttention(nn.Module):
    """Self-attention with projections `q`, `k`, `v` and `proj`.

    With `as_tuple` it returns (output, None), for libraries that expect attention weights beside the output.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_qk: int,
        num_v: int,
        scale: float,
        qkv_bias: bool,
        proj_bias: bool,
        as_tuple: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.scale, self.as_tuple = num_heads, scale, as_tuple
        place = {"device": device, "dtype": dtype}
        self.q = nn.Linear(d_model, num_heads * num_qk, bias=qkv_bias, **place)
        self.k = nn.Linear(d_model, num_heads * num_qk, bias=qkv_bias, **place)
        self.v = nn.Linear(d_model, num_heads * num_v, bias=qkv_bias, **place)
        self.proj = nn.Linear(num_heads * num_v, d_model, bias=proj_bias, **place)

    def forward(
        self, hidden_states: Tensor, *args: Any, queries: Tensor | None = None, is_causal: bool = False, **kwargs: Any
    ) -> Any:
        """Attend the tokens (B, N, D) to each other, or with `queries` (B, K, D) these alone to the tokens.

        Raises:
            ModelError: a mask, positions or another tensor was passed.
        """
        if is_causal or any(isinstance(value, Tensor | tuple) for value in (*args, *kwargs.values())):
            raise ModelError("attention with fewer head dimensions takes no mask and no rotary positions.")
        q = self._heads(self.q(hidden_states if queries is None else queries))
        k, v = (self._heads(layer(hidden_states)) for layer in (self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        output = self.proj(mixed.transpose(1, 2).flatten(2))
        return (output, None) if self.as_tuple else output

    def with_keys(self, hidden_states: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the tokens (B, N, D) attend to, and their keys (B, N, F), the mean over the heads.

        Args:
            hidden_states: the tokens.
            bias: added to the logits of all heads, broadcast to (B, heads, N, N).
        """
        q, k, v = (self._heads(layer(hidden_states)) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2)), k.mean(1)

    def attention_maps(self, hidden_states: Tensor) -> Iterator[Tensor]:
        """Yield what each head's softmax gives (B, N, N), computed anew since fused attention does not return it."""
        q, k = (self._heads(layer(hidden_states)) for layer in (self.q, self.k))
        for head in range(self.num_heads):
            yield (q[:, head] @ k[:, head].mT * self.scale).softmax(-1)

    def _heads(self, projected: Tensor) -> Tensor:
        """Reshape (B, N, heads * F) to (B, heads, N, F)."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
