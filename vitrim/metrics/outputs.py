"""Gathers a model's outputs for images batch by batch, so that one pass serves several measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vitrim.errors import DataError


class Outputs:
    """Pooled features, predicted classes and labels of N images, on the CPU; a label is -1 where it is unknown."""

    def __init__(self) -> None:
        self._pooled: list[Tensor] = []
        self._predicted: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, pooled_BD: Tensor | None, scores_BC: Tensor | None, labels_B: Tensor) -> None:
        """Add a batch; outputs that the model does not have, or that nobody will ask for, are None in every batch."""
        self._pooled += [] if pooled_BD is None else [pooled_BD.float().cpu()]
        self._predicted += [] if scores_BC is None else [scores_BC.argmax(1).cpu()]
        self._labels.append(labels_B)

    @property
    def pooled_ND(self) -> Tensor:
        """Features in float32; joined outside inference mode, in which a tensor could not take part in training."""
        return torch.cat(self._pooled)

    @property
    def labels_N(self) -> Tensor:
        """Class numbers (int64)."""
        return torch.cat(self._labels)

    @property
    def num_labelled(self) -> int:
        """How many images have a label."""
        return int((self.labels_N >= 0).sum()) if len(self) else 0

    def __len__(self) -> int:
        return sum(map(len, self._labels))

    def top1(self) -> float:
        """Return the accuracy of the model's own head, 0..1.

        Raises:
            DataError: no image had a label.
        """
        known = self.labels_N >= 0 if len(self) else torch.zeros(0)
        if not known.any():
            raise DataError("top1: no image has a label; pass a labelled source.")
        return float((torch.cat(self._predicted) == self.labels_N)[known].double().mean())


def images_and_labels(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of each batch that has images; labels are -1 where a batch brings none."""
    for batch in batches:
        parts: Sequence[Any] = (batch,) if isinstance(batch, Tensor) else batch
        images = parts[0]
        if len(images):
            labels = parts[1] if len(parts) > 1 else torch.full((len(images),), -1)
            yield images, labels.cpu()
