"""Measures retrieval of captions by images and of images by captions: recall among the k most similar, both ways.

Similarities are computed for a few queries against all candidates at a time, never for all against all, so a million
pairs take no more memory than their vectors. Several captions may belong to one image: a query by image is right if any
of its own captions is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.errors import DataError
from vitrim.metrics.fidelity import CHUNK_NUMBERS
from vitrim.models.features import evaluating
from vitrim.models.towers import embed_images, unit

MAX_QUERIES = 1024


def image_text_recall(
    images_ND: Tensor,
    texts_MD: Tensor,
    image_of_M: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_numbers: int = CHUNK_NUMBERS,
) -> dict[str, dict[str, float]]:
    """Measure the recall in both directions, by cosine.

    Candidates that tie count as in a random order of the tie, so vectors that collapsed to one point get the recall of
    guessing.

    Args:
        images_ND: one vector for each image.
        texts_MD: one vector for each caption, on the same device.
        image_of_M: the image that each caption belongs to, int64; every image has at least one.
        ks: how many results to look at.
        chunk_numbers: how many similarities to hold at a time.

    Returns:
        `image_to_text` and `text_to_image`, each with `recall@k` in 0..1.

    Raises:
        DataError: the shapes don't fit, or an image has no caption.

    Cost: 4 N M D operations; O(chunk_numbers) memory beside the vectors.
    """
    _check(images_ND, texts_MD, image_of_M)
    order = image_of_M.argsort(stable=True)
    images_ND, texts_MD, image_of_M = unit(images_ND), unit(texts_MD)[order], image_of_M[order]
    counts_N = image_of_M.bincount(minlength=len(images_ND))
    last_N = counts_N.cumsum(0)
    found = {"image_to_text": dict.fromkeys(ks, 0.0), "text_to_image": dict.fromkeys(ks, 0.0)}
    for start, stop in _chunks(len(images_ND), len(texts_MD), chunk_numbers):
        similar_QM = images_ND[start:stop] @ texts_MD.T
        own = slice(int(last_N[start] - counts_N[start]), int(last_N[stop - 1]))
        for k, hits in _hits_of_images(similar_QM, own, image_of_M[own] - start, ks).items():
            found["image_to_text"][k] += hits
    for start, stop in _chunks(len(texts_MD), len(images_ND), chunk_numbers):
        similar_QN = texts_MD[start:stop] @ images_ND.T
        own_Q1 = similar_QN.gather(1, image_of_M[start:stop, None])
        num_better_Q, num_tied_Q = (similar_QN > own_Q1).sum(1), (similar_QN == own_Q1).sum(1)
        for k in ks:
            found["text_to_image"][k] += float(((k - num_better_Q) / num_tied_Q).clamp(0, 1).sum())
    sizes = {"image_to_text": len(images_ND), "text_to_image": len(texts_MD)}
    return {way: {f"recall@{k}": hits[k] / sizes[way] for k in ks} for way, hits in found.items()}


def embed_captioned(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, list[list[str]], Tensor, int]:
    """Run an image tower over images that have captions.

    Args:
        model: a pair, or an image tower that stands alone.
        batches: of `PairSet.batches`.

    Returns:
        Vectors (N, E) float32 on the CPU, not normalised; the captions of each; the numbers of the images (N,) in their
        source; and how many could not be read.

    Raises:
        DataError: there was no image.
    """
    vectors, captions, rows, num_skipped = [], [], [], 0
    with evaluating(model):
        for batch in batches:
            if len(batch.images_BCHW):
                vectors.append(embed_images(model, batch.images_BCHW).cpu())
            captions += batch.captions
            rows.append(batch.rows_B)
            num_skipped += batch.num_skipped
    if not vectors:
        raise DataError(f"captions: no image could be read ({num_skipped} failed); check the files.")
    # Joined outside inference mode: an inference tensor could not take part in training later.
    return torch.cat(vectors), captions, torch.cat(rows), num_skipped


def _hits_of_images(similar_QM: Tensor, own: slice, image_of_own: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Count for each k how many of these images find one of their own captions, which stand in the columns `own`.

    `tied` candidates are as good as the best own caption, `wrong` of them of other images, and `better` are better. So
    k results hold k - better of the tied, in random order: they miss every own one by the hypergeometric law.
    """
    mine = similar_QM[image_of_own, torch.arange(own.start, own.stop, device=similar_QM.device)]
    best_Q = similar_QM.new_full((len(similar_QM),), -torch.inf).scatter_reduce(0, image_of_own, mine, "amax")
    num_better_Q = (similar_QM > best_Q[:, None]).sum(1)
    num_tied_Q = (similar_QM == best_Q[:, None]).sum(1)
    is_best = (mine == best_Q[image_of_own]).long()
    num_wrong_Q = num_tied_Q.scatter_add(0, image_of_own, -is_best)
    hits = {}
    for k in ks:
        missed_Q = torch.ones(len(similar_QM), dtype=torch.float64)
        for drawn in range(k):
            factor_Q = (num_wrong_Q - drawn).clamp(min=0).cpu() / (num_tied_Q - drawn).clamp(min=1).cpu()
            missed_Q = torch.where(drawn < (k - num_better_Q).cpu(), missed_Q * factor_Q, missed_Q)
        hits[k] = float((1 - missed_Q).sum())
    return hits


def _chunks(num_queries: int, num_candidates: int, numbers: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of queries to compare at a time."""
    size = max(1, min(MAX_QUERIES, numbers // num_candidates))
    for start in range(0, num_queries, size):
        yield start, min(start + size, num_queries)


def _check(images_ND: Tensor, texts_MD: Tensor, image_of_M: Tensor) -> None:
    """Raise a DataError for vectors and owners that can't be compared."""
    shapes = f"images {tuple(images_ND.shape)}, texts {tuple(texts_MD.shape)}, owners {tuple(image_of_M.shape)}"
    if not len(images_ND) or images_ND.shape[-1] != texts_MD.shape[-1] or len(image_of_M) != len(texts_MD):
        raise DataError(f"retrieval: got {shapes}; pass vectors of one width, and the image of each text.")
    if int(image_of_M.min()) < 0 or int(image_of_M.max()) >= len(images_ND):
        raise DataError(f"retrieval: texts belong to images 0..{len(images_ND) - 1}; got {int(image_of_M.max())}.")
    if not bool(image_of_M.bincount(minlength=len(images_ND)).all()):
        raise DataError("retrieval: an image has no caption; leave such images out.")
