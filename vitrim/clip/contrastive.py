"""Computes the loss that CLIP-like pairs are trained with, and gathers vectors of all processes with their gradients.

Each process has some of the captions of a step. It compares them with all images, and its images with all captions, so
the mean of the parts over the processes is the loss of the whole batch, and so is the mean of the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, logsigmoid


def contrastive_loss(
    images_BE: Tensor,
    texts_BE: Tensor,
    scale: Tensor | float,
    bias: Tensor | float | None = None,
    *,
    own: slice = slice(None),
) -> Tensor:
    """Compute CLIP's symmetric cross-entropy, or SigLIP's sigmoid loss where there is a bias.

    Args:
        images_BE: unit vectors of all images of a step.
        texts_BE: unit vectors of their captions, in the same order.
        scale: factor on the similarities.
        bias: added to them; None for CLIP's loss.
        own: the part of the batch that this process compares.

    Returns:
        The mean over the process's own part; the mean of equal parts is the loss of the whole batch.

    Paper: CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343.
    """
    own_Q = torch.arange(len(texts_BE), device=texts_BE.device)[own]
    texts_QB = scale * texts_BE[own] @ images_BE.T
    if bias is not None:
        signs_QB = torch.full_like(texts_QB, -1).scatter(1, own_Q[:, None], 1)
        return -logsigmoid(signs_QB * (texts_QB + bias)).sum(1).mean()
    images_QB = scale * images_BE[own] @ texts_BE.T
    return (cross_entropy(texts_QB, own_Q) + cross_entropy(images_QB, own_Q)) / 2


def gather_rows(rows_QE: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks; gradients return to a row's own process."""
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return rows_QE
    return _Gather.apply(rows_QE)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    """Gathering with gradients: each process's loss depends on every row, so a row's gradient is their sum."""

    @staticmethod
    def forward(ctx: Any, rows_QE: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(rows_QE) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows_QE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient_BE: Tensor) -> Tensor:  # type: ignore[override]
        total_BE = gradient_BE.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total_BE)
        return total_BE.chunk(distributed.get_world_size())[distributed.get_rank()]
