"""The ordering of Subspace Node Pruning (arXiv 2405.17506): units by the variance that no other unit explains.

How the ordering is computed: C is the Gram matrix of the hidden activations, over all calibration tokens and not
centred. ZCA (whitening by C^(-1/2)) makes all units orthogonal at once, and since C^(-1/2) is symmetric no unit goes
first. Each of its rows is divided by its diagonal element, so that a unit enters its own orthogonal component with
weight one. The variance of that component is 1 / (C^(-1/2))_jj squared, and units are kept from the largest down.

This follows the paper's abstract and what others wrote about it ("unnormalised ZCA", "non-redundant variance after
orthogonalisation"); its code we have not seen. The paper's least squares is this package's repair. Its rule for the
width of each layer, by cumulative variance, is not here: widths are the recipe's. What a unit does to the output plays
no part.

Shapes: H hidden units, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrim.methods.registry import SiteMethod, register
from vitrim.ops.gram_schmidt import working_dtype
from vitrim.types import SiteView


@register
class SubspaceNode(SiteMethod):
    """Keep the units with the most activation variance that no other unit explains."""

    name = "subspace-node"
    paper = "Subspace Node Pruning"
    arxiv = "2405.17506"
    summary = "units with the most activation variance that no other unit explains"
    needs = "images"

    def select(self, view: SiteView) -> Tensor:
        """Units by unexplained variance, largest first.

        Args:
            view: the MLP's calibration sums; without them its weights are looked at, as if its inputs were white.

        Returns:
            Their indices.
        """
        if view.stats is None:
            rows_HD = view.weights.input_rows.to(working_dtype(view.weights.input_rows.device))
            gram_HH = rows_HD @ rows_HD.T
        else:
            gram_HH = view.stats.hidden_HH
        return unexplained_variance(gram_HH).sort(descending=True, stable=True).indices[: view.num_keep].cpu()


def unexplained_variance(gram_HH: Tensor) -> Tensor:
    """Energy of each unit's component in the unnormalised ZCA basis, (H,), in the unit of the Gram matrix."""
    values_H, vectors_HH = torch.linalg.eigh(gram_HH.to(working_dtype(gram_HH.device)))
    floor = values_H[-1] * len(values_H) * torch.finfo(values_H.dtype).eps  # below it an eigenvalue is rounding
    root_H = values_H.clamp(min=torch.clamp(floor, min=torch.finfo(values_H.dtype).tiny)).rsqrt()
    return (vectors_HH.square() @ root_H).square().reciprocal()
