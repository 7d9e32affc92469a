"""A metric on a layer's outputs: which of its errors count how much for what comes behind.

With J the derivative of what comes behind by one output, an error e of the output moves it by J e, so its squared size
is e' M e with the metric M = J'J. Least squares does not depend on M, but which units are best does.

Shapes: H hidden units, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def signs_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs in the shape of a tensor, drawn on the CPU so that all devices agree.

    The mean of v v' over such signs v is the identity, so gradients of v'f give J'J in the mean (Hutchinson).
    """
    return (torch.randint(2, values.shape, generator=generator) * 2 - 1).to(values)


def weighed(cross_HD: Tensor, scale_D: Tensor | None, metric_DD: Tensor | None) -> Tensor:
    """Return cross moments with targets in coordinates in which equal errors count alike.

    Args:
        cross_HD: products of hidden activations with targets, summed.
        scale_D: layer scale behind the output; used where there is no metric.
        metric_DD: metric on the outputs, which knows of the layer scale.
    """
    if metric_DD is not None:
        values_D, vectors_DD = torch.linalg.eigh(metric_DD.to(cross_HD))
        return cross_HD @ (vectors_DD * values_D.clamp(min=0).sqrt())
    return cross_HD if scale_D is None else cross_HD * scale_D.to(cross_HD)
