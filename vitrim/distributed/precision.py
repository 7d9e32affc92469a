"""Runs models in bf16 where that was asked for and pays; attention that is trained on a CPU stays in float32.

The backward pass of that attention in bf16 takes 571 ms where that in float32 takes 104 (torch 2.14, a Xeon with AMX,
one thread, 128 images of 65 tokens through six blocks of width 192), more than all that bf16 saves in the products of a
step. The call is caught where torch's own functions are called, so no model's forward is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vitrim.config.options import Precision


def is_bf16(precision: Precision, device: torch.device) -> bool:
    """Return whether models run in bf16: where it was asked for, or with `auto` where a GPU has it."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16" or (precision == "auto" and on_gpu)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices faster in bfloat16 than in float32, without emulating it."""
    if device.type == "cpu":
        tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return bool(tiles or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(precision: Precision, device: torch.device, *, keep_casts: bool = True) -> torch.autocast:
    """Return the autocast of a precision; with `keep_casts`, bf16 copies of weights stay until the context is left."""
    enabled = is_bf16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keep_casts)


def attention_in_float32(device: torch.device, *, enabled: bool) -> AbstractContextManager[Any]:
    """Return a context for forward and backward pass in which attention under autocast runs in float32.

    Args:
        device: where the model is; on any but a CPU nothing changes.
        enabled: whether there is autocast at all.
    """
    return _Float32Attention() if enabled and device.type == "cpu" else nullcontext()


def around_recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return two contexts for torch's `checkpoint`: around a forward pass, and around its repetition in backward.

    The backward pass is itself one of the functions that are caught, and within one torch catches no others.
    """
    return nullcontext(), _Float32Attention() if torch.is_autocast_enabled("cpu") else nullcontext()


class _Float32Attention(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        is_attention = func is scaled_dot_product_attention
        if not (is_attention and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return func(*args, **named)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **{name: _widened(value) for name, value in named.items()})


def _widened(value: Any) -> Any:
    """Return a floating-point tensor in float32; boolean masks, numbers and None as they are."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
