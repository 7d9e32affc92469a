"""Sums over calibration tokens that a method of a whole model asks for, batch by batch from hooks.

What `walk` sums up for a repair is another thing: it has a teacher, whose output is the target.

Shapes: N tokens, H hidden units, D model width, G groups of a layer, K numbers of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.ops.gram_schmidt import working_dtype
from vitrim.types import LayerSide, LayerSite, LayerStats, MlpWeights, Stats


class HiddenSums:
    """Running sums of one MLP's hidden activations, held on the CPU."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.hidden_H, self.hidden_HH = torch.zeros(()), torch.zeros(())

    def see(self, _: str, hidden: Tensor, __: Tensor) -> None:
        """Add a batch: what the output projection took in, (..., H)."""
        hidden_NH = hidden.flatten(0, -2).to(working_dtype(hidden.device))
        self.hidden_H = self.hidden_H + hidden_NH.sum(0).cpu()
        self.hidden_HH = self.hidden_HH + (hidden_NH.T @ hidden_NH).cpu()
        self.num_tokens += len(hidden_NH)

    def done(self, weights: MlpWeights) -> Stats:
        """The sums, with those of what the output projection makes of the activations, which follow from them."""
        total_H, gram_HH, count = self.hidden_H, self.hidden_HH, self.num_tokens
        output_DH, bias = weights.output_DH.to(gram_HH), weights.output_bias_D
        bias_D = torch.zeros(len(output_DH)).to(gram_HH) if bias is None else bias.to(gram_HH)
        energy = float(torch.einsum("dh,hg,dg->", output_DH, gram_HH, output_DH) + 2 * bias_D @ (output_DH @ total_H))
        return Stats(
            num_tokens=count,
            hidden_H=total_H,
            hidden_HH=gram_HH,
            target_D=output_DH @ total_H + count * bias_D,
            cross_HD=gram_HH @ output_DH.T + torch.outer(total_H, bias_D),
            target_square=energy + count * float(bias_D @ bias_D),
        )


class LayerSums:
    """Running float64 sums of what one layer takes in, or of what it puts out, held where the layer runs."""

    def __init__(self, layer: LayerSite, side: LayerSide) -> None:
        self.layer, self.side = layer, side
        self.num_tokens = 0
        self.total_GK: Tensor | None = None
        self.square_GKK: Tensor | None = None

    def see(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add a batch."""
        of_outputs = outputs.movedim(1, -1) if self.layer.kind == "conv" else outputs
        seen = inputs if self.side == "inputs" else of_outputs
        groups = self.layer.groups
        rows_GNK = seen.reshape(-1, groups, seen.shape[-1] // groups).transpose(0, 1).double()
        total_GK, square_GKK = rows_GNK.sum(1), rows_GNK.mT @ rows_GNK
        self.num_tokens += rows_GNK.shape[1]
        self.total_GK = total_GK if self.total_GK is None else self.total_GK.add_(total_GK)
        self.square_GKK = square_GKK if self.square_GKK is None else self.square_GKK.add_(square_GKK)

    def done(self) -> LayerStats | None:
        """The sums; None of a layer that was never called."""
        if self.total_GK is None or self.square_GKK is None or not self.num_tokens:
            return None
        return LayerStats(num_tokens=self.num_tokens, total_GK=self.total_GK, square_GKK=self.square_GKK)
