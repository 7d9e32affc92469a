"""Devices by name."""

from __future__ import annotations

import torch

from vitrim.errors import RecipeError


def resolve_device(name: str) -> torch.device:
    """Return a torch device by name; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        RecipeError: the name is unknown, or the machine has no such device.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError):  # unknown name, no such device, or no driver for it
            raise RecipeError(f"device: {name!r} is not available here; use auto, cpu, cuda or mps.") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
