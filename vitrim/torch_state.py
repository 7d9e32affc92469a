"""torch's global state, as every entry point needs it: the caller's is put aside, and put back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Device types on which autocast can be on without another package being imported.
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Run with gradients, float32 and without autocast, whatever the caller has set; as decorator or `with` block.

    Held are the grad and inference mode, the default dtype and device, deterministic algorithms, and autocast with its
    cache of cast weights. The precision of float32 products (TF32) stays as the caller has it: it is chosen for the
    hardware.
    """
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as held:
        held.enter_context(torch.inference_mode(False))
        held.enter_context(torch.enable_grad())
        held.enter_context(_no_autocast())
        if torch.get_default_device().type != "cpu":
            held.enter_context(torch.device("cpu"))
        try:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Turn autocast off, and its depth to 0: inside the caller's, casts of weights would outlive our own blocks."""
    enabled = [kind for kind in AUTOCAST if torch.is_autocast_enabled(kind)]
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)
        for _ in range(depth):
            torch.autocast_increment_nesting()
