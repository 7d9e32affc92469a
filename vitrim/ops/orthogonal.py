"""The nearest matrix with orthonormal rows or columns, roughly: for steps that move all directions of a weight alike.

Newton-Schulz iterations need products only, so they run in bfloat16 where a processor has it. The polynomial is that of
Muon (Keller Jordan, 2024): it brings singular values near 1 in five iterations, not exactly to 1, which steps don't
need.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 5
LINEAR, CUBIC, QUINTIC = 3.4445, -4.7750, 2.0315


def orthogonalized(matrix_MN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return U V' of a matrix's singular value decomposition U S V', with singular values of about 0.7 to 1.2.

    Args:
        matrix_MN: any matrix; zeros stay zeros.
        dtype: type in which products are made; the result has the matrix's own.

    Example:
        >>> import torch
        >>> turned = orthogonalized(torch.diag(torch.tensor([100.0, 1.0])))
        >>> bool((turned.diagonal() - 1).abs().max() < 0.35)
        True
    """
    wide = matrix_MN.shape[0] <= matrix_MN.shape[1]
    unit = (matrix_MN if wide else matrix_MN.T) / matrix_MN.norm().clamp(min=torch.finfo(matrix_MN.dtype).tiny)
    turned = unit.to(dtype)
    for _ in range(ITERATIONS):
        gram = turned @ turned.T
        turned = LINEAR * turned + (CUBIC * gram + QUINTIC * gram @ gram) @ turned
    return (turned if wide else turned.T).to(matrix_MN.dtype)
