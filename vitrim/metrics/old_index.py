"""Searches an index of vectors that was built earlier, by another model, with the queries of today's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrim.errors import DAMAGED, DataError, reason_of
from vitrim.metrics.fidelity import retrieval_recall


@dataclass(frozen=True)
class OldIndex:
    """Vectors of an index: row i is that of image i, and rows behind those of the images are of other ones."""

    vectors_MD: Tensor

    def check(self, num_images: int, num_skipped: int = 0) -> None:
        """Check that it is known which row is whose.

        Raises:
            DataError: there are fewer rows than images, or images that can't be read.
        """
        if num_skipped:
            raise DataError(
                f"old_index: {num_skipped:,} images can't be read, so rows are not theirs; take them out of both."
            )
        if len(self.vectors_MD) < num_images:
            have = f"{len(self.vectors_MD):,} rows for {num_images:,} images"
            raise DataError(f"old_index: {have}; row i must be the vector of image i, in the order of the data.")

    def recall(self, queries_ND: Tensor) -> dict[str, float]:
        """Return the share of queries that find their own row among the k nearest of all, 0..1, by cosine.

        Raises:
            DataError: there are fewer rows than queries.
        """
        self.check(len(queries_ND))
        return {f"old_index_{name}": share for name, share in retrieval_recall(queries_ND, self.vectors_MD).items()}


def read_old_index(source: Any, *, width: int | None) -> OldIndex:
    """Take the vectors of an index from a .npy file or an array (images, numbers).

    Args:
        source: the path of a file as numpy.save writes it, an array, or a tensor.
        width: how many numbers the models' pooled features have; None if nobody knows yet.

    Raises:
        DataError: it can't be read, has another shape or width, is not of numbers, or not all of them are finite.
    """
    name, found = "old_index", source
    if isinstance(source, str | Path):
        name = f"old_index: {source}"
        if not Path(source).is_file():
            raise DataError(f"{name}: no such file; give a .npy file of vectors, a row for each image.")
        try:
            with Path(source).open("rb") as file:
                if file.read(6) != b"\x93NUMPY":  # numpy would take it for a pickle, and say how to open that
                    raise ValueError("it does not begin as one")
            found = np.load(source, allow_pickle=False, mmap_mode="r")
        except (*DAMAGED, EOFError) as error:
            raise DataError(f"{name}: not a .npy file of numbers ({reason_of(error)}).") from None
    array = np.asarray(found.detach().cpu().float() if isinstance(found, Tensor) else found)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        got = f"shape {array.shape}, dtype {array.dtype}"
        raise DataError(f"{name}: {got}; give numbers, a row for each image.")
    if width is not None and array.shape[1] != width:
        raise DataError(f"{name}: rows of {array.shape[1]:,} numbers, and the models' pooled vector has {width:,}.")
    vectors_MD = torch.from_numpy(np.array(array, dtype=np.float32))
    broken = (~vectors_MD.isfinite().all(1)).nonzero()
    if len(broken):
        raise DataError(f"{name}: row {int(broken[0])} is not finite; build the index again without it.")
    return OldIndex(vectors_MD)
