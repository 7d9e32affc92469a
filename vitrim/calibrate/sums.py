"""Sums of the calibration activations of layers and MLPs, for methods that look at the whole model.

Shapes: T vectors, G groups, K values of a vector, H hidden units, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitrim.errors import ModelError
from vitrim.ops.products import Products
from vitrim.share import ALONE, Share
from vitrim.types import LayerSite, LayerSums, MlpWeights, Stats, T

# Limit for the float64 sums of one pass over the images; larger models take several passes. A ViT-L needs 0.8 GiB.
MAX_SUM_BYTES = 2**30


def check_finite(path: str, what: str, *tensors: Tensor, share: Share = ALONE) -> None:
    """Check activations, or sums of them, before anything is solved with them; those of all processes that share them.

    Raises:
        ModelError: a value is NaN or infinite.
    """
    if share.total(float(not all(bool(torch.isfinite(tensor).all()) for tensor in tensors))):
        raise ModelError(
            f"{path}: {what} is not finite on the calibration images, whose own values are; run the model on them and "
            "look where that begins, or leave this part out with scope."
        )


@dataclass(kw_only=True)
class LayerAdder:
    """Sums of a layer's inputs, or of its outputs if those are narrower."""

    layer: LayerSite
    sums: Products = field(default_factory=Products)

    @property
    def of_inputs(self) -> bool:
        """Whether inputs are summed: if they are narrower, and never for a convolution, whose inputs overlap."""
        return self.layer.kind != "conv" and self.layer.num_cols < self.layer.num_rows

    @property
    def num_bytes(self) -> int:
        """Memory of the sums in bytes."""
        width = self.layer.num_cols if self.of_inputs else self.layer.num_rows
        return 8 * self.layer.groups * width * (width + 1)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add a batch, with channels last."""
        seen = inputs if self.of_inputs else outputs
        self.sums.add(seen.reshape(-1, self.layer.groups, seen.shape[-1] // self.layer.groups).transpose(0, 1))

    def finished(self) -> LayerSums | None:
        """Return the sums, or None for a layer that was never called."""
        if not self.sums.num_tokens:
            return None
        self.sums.finish_()
        return LayerSums(
            layer=self.layer,
            of_inputs=self.of_inputs,
            num_tokens=self.sums.num_tokens,
            total_GK=self.sums.total_K,
            square_GKK=self.sums.square_KK,
        )


def passes(places: Sequence[T], bytes_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield places in groups whose sums fit into memory together; one that does not fit alone has a group of its own.

    Args:
        places: where something is summed.
        bytes_of: returns the memory that the sums of a place take.
    """
    group: list[T] = []
    num_bytes = 0
    for place in places:
        needed = bytes_of(place)
        if group and num_bytes + needed > MAX_SUM_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(place)
        num_bytes += needed
    if group:
        yield group


@dataclass(kw_only=True)
class HiddenAdder:
    """Sums of an MLP's hidden units; sums of its outputs follow from the output projection's weights."""

    sums: Products = field(default_factory=Products)

    def add(self, hidden: Tensor) -> None:
        """Add a batch."""
        self.sums.add(hidden.flatten(0, -2))

    def stats(self, weights: MlpWeights) -> Stats:
        """Return the sums, together with those of the output projection's outputs."""
        self.sums.finish_()
        total_H, square_HH, count = self.sums.total_K.cpu(), self.sums.square_KK.cpu(), self.sums.num_tokens
        output_DH, own_bias = weights.output_DH.to(square_HH), weights.output_bias_D
        bias_D = torch.zeros(len(output_DH)).to(square_HH) if own_bias is None else own_bias.to(square_HH)
        mean_part_D = output_DH @ total_H
        energy = float(torch.einsum("dh,hg,dg->", output_DH, square_HH, output_DH) + 2 * bias_D @ mean_part_D)
        return Stats(
            num_tokens=count,
            hidden_H=total_H,
            hidden_HH=square_HH,
            target_D=mean_part_D + count * bias_D,
            cross_HD=square_HH @ output_DH.T + torch.outer(total_H, bias_D),
            target_square=energy + count * float(bias_D @ bias_D),
            rounding=self.sums.rounding,
        )
