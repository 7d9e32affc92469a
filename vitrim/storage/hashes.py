"""Hashes of values, by which equal ones are recognised."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's raw bytes, dtype and shape."""
    import torch

    flat = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{flat.dtype}{tuple(flat.shape)}".encode())
    digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
