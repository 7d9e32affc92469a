"""Self-attention whose heads have fewer query and key dimensions than value dimensions, or fewer of both.

The softmax keeps the scale of the heads that were: dropping dimensions must not change the temperature. There is no
mask and no position inside it; who passes one is refused, so that nothing is silently left out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vitrim.errors import ModelError


class SlimAttention(nn.Module):
    """Projections q, k, v, attention, projection `proj`; `as_tuple` for libraries that expect (output, weights)."""

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

    def forward(self, hidden_states: Tensor, *args: Any, is_causal: bool = False, **kwargs: Any) -> Any:
        """Attention of the tokens (B, N, D) to each other.

        Raises:
            ModelError: a mask, positions or anything else was passed along.
        """
        if is_causal or any(isinstance(value, Tensor | tuple) for value in (*args, *kwargs.values())):
            raise ModelError("attention with fewer head dimensions takes no mask and no rotary positions.")
        q, k, v = (self._heads(layer(hidden_states)) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        output = self.proj(mixed.transpose(1, 2).flatten(2))
        return (output, None) if self.as_tuple else output

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, N, heads x F) as (B, heads, N, F)."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
