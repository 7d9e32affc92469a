"""The ordering of Subspace Node Pruning (arXiv 2405.17506): units by the variance that no other unit explains.

The ordering implemented: C is the Gram matrix of the hidden activations, over all calibration tokens and not centred;
ZCA orthogonalises all units at once by C^(-1/2), symmetrically, so no unit goes first. In the unnormalised form a row
is divided by its diagonal element, so that a unit enters its own orthogonal component with weight one; the variance of
that component is 1 / (C^(-1/2))_jj squared, and units are kept from the largest down. We have this from the paper's
abstract and from what others wrote about it ("unnormalised ZCA", "non-redundant variance after orthogonalisation"), not
from its code. Its least squares is this package's repair. Its widths by cumulative variance are left out: the recipe
sets the widths. A unit's effect on the output plays no part.

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
    """Subspace Node Pruning: keeps units with the most activation variance that no other unit explains."""

    name = "subspace-node"
    paper = "Subspace Node Pruning"
    arxiv = "2405.17506"
    summary = "units with the most activation variance that no other unit explains"
    needs = "images"
    repairs = False

    def select(self, view: SiteView) -> Tensor:
        """Return units by unexplained variance, largest first; without images, the MLP's inputs are assumed white."""
        if view.stats is None:
            rows_HD = view.weights.input_rows.to(working_dtype(view.weights.input_rows.device))
            gram_HH = rows_HD @ rows_HD.T
        else:
            gram_HH = view.stats.hidden_HH
        return unexplained_variance(gram_HH).sort(descending=True, stable=True).indices[: view.num_keep].cpu()


def unexplained_variance(gram_HH: Tensor) -> Tensor:
    """Return the energy of each unit's component in the unnormalised ZCA basis, (H,), in units of the Gram matrix."""
    values_H, vectors_HH = torch.linalg.eigh(gram_HH.to(working_dtype(gram_HH.device)))
    floor = values_H[-1] * len(values_H) * torch.finfo(values_H.dtype).eps  # smaller eigenvalues are rounding error
    root_H = values_H.clamp(min=torch.clamp(floor, min=torch.finfo(values_H.dtype).tiny)).rsqrt()
    return (vectors_HH.square() @ root_H).square().reciprocal()
