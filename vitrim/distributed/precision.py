"""Whether models run in bf16, and where it does not pay although asked for: attention that is trained on a CPU.

Its backward pass in bf16 takes 571 ms where that in float32 takes 104 (torch 2.14, a Xeon with AMX, one thread, 128
images of 65 tokens through six blocks of width 192), more than all that bf16 saves in the products of a step. The call
is caught where torch's own functions are called, so no model's forward is touched.
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
    """Whether models run in bf16: where it was asked for, or where a GPU has it."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16" or (precision == "auto" and on_gpu)


def autocast(precision: Precision, device: torch.device, *, keep_casts: bool = True) -> torch.autocast:
    """Run models in that precision; with `keep_casts` the bf16 copies of weights stay until the context is left."""
    enabled = is_bf16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keep_casts)


def attention_in_float32(device: torch.device, *, enabled: bool) -> AbstractContextManager[Any]:
    """Hold this around forward and backward pass: attention that takes gradients under autocast runs in float32.

    Args:
        device: where the model is; on any but a CPU nothing changes.
        enabled: whether there is autocast at all.
    """
    return _Float32Attention() if enabled and device.type == "cpu" else nullcontext()


def around_recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For torch's `checkpoint`: what to hold around a forward pass, and around its repetition in the backward pass.

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
    """A tensor of floating point in float32; a mask of booleans, a number or None as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
