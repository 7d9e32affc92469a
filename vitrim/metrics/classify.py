"""Measures features by classification: a model's own head, nearest neighbours, a linear probe.

Labels are class numbers; -1 means unknown, and such images are left out of every score. The backbone is never
trained: the probe fits a linear classifier on features that were extracted once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitrim.errors import DataError, ModelError
from vitrim.metrics.outputs import Outputs, images_and_labels
from vitrim.models.features import evaluating, features, inputs_for, logits
from vitrim.types import FeaturesAt

PROBE_CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse strengths of the L2 penalty, on the sum of losses
# L-BFGS steps. Ten times as many moved the accuracy on 10,000 CIFAR-10 thumbnails (192 values each) by 0.06
# points at c = 1 and not at all at the other values.
PROBE_MAX_STEPS = 300


def top1(model: nn.Module, batches: Iterable[Any]) -> float:
    """Measure the accuracy of a classifier's own head, 0..1.

    Args:
        model: a model with a head.
        batches: tuples that start with (images_BCHW, labels_B), such as `Batch`.

    Raises:
        DataError: no image had a label.
        ModelError: the model has no classifier.
    """
    outputs = Outputs()
    with evaluating(model):
        for images, labels in images_and_labels(batches):
            scores = logits(model, inputs_for(model, images))
            if scores is None:
                name = type(model).__name__
                raise ModelError(f"{name}: has no classifier; use knn_top1 or linear_probe_top1.")
            outputs.add(None, scores, labels)
    return outputs.top1()


def extract(model: nn.Module, batches: Iterable[Any], *, at: FeaturesAt = "final") -> tuple[Tensor, Tensor]:
    """Collect the pooled features of all images, on the CPU.

    Args:
        model: a vision encoder.
        batches: tensors (B, C, H, W), or tuples that start with (images_BCHW, labels_B), such as `Batch`.
        at: features behind ("final") or in front of ("pre_norm") the final norm.

    Returns:
        Features (N, D) float32 and labels (N,) int64, -1 where unknown.

    Raises:
        DataError: there was no image.
    """
    outputs = Outputs()
    with evaluating(model):
        for images, labels in images_and_labels(batches):
            outputs.add(features(model, inputs_for(model, images), at=at).pooled_BD, None, labels)
    if not len(outputs):
        raise DataError("extract: no images; pass at least one batch.")
    return outputs.pooled_ND, outputs.labels_N


def knn_top1(
    train_ND: Tensor,
    train_labels: Tensor,
    test_ND: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> float:
    """Measure the accuracy of a weighted vote among the nearest neighbours, 0..1.

    The k images of highest cosine vote with exp(cosine / temperature), as in DINO, arXiv 2104.14294, 4.1.

    Args:
        train_ND: features to search, of classes `train_labels` (N,).
        train_labels: -1 where unknown.
        test_ND: features to classify, of classes `test_labels`.
        test_labels: -1 where unknown.
        k: neighbours that vote, 1..N.
        temperature: small values let the nearest ones decide.
        chunk_size: test images compared at a time.

    Raises:
        DataError: one side has no labelled image, or k is outside 1..N.
    """
    train_ND, train_labels = _labelled(train_ND, train_labels, "knn: training")
    test_ND, test_labels = _labelled(test_ND, test_labels, "knn: test")
    if not 1 <= k <= len(train_ND):
        raise DataError(f"knn: k is {k} with {len(train_ND)} training images; use 1..{len(train_ND)}.")
    index_ND, num_right = normalize(train_ND, dim=1), 0
    for start in range(0, len(test_ND), chunk_size):
        queries_QD = normalize(test_ND[start : start + chunk_size], dim=1)
        similar_QK, nearest_QK = (queries_QD @ index_ND.T).topk(k, dim=1)
        # Relative to the nearest neighbour's weight: the vote is the same, and no temperature overflows.
        weights_QK = ((similar_QK - similar_QK[:, :1]) / temperature).exp()
        votes_QC = torch.zeros(len(queries_QD), int(train_labels.max()) + 1)
        votes_QC.scatter_add_(1, train_labels[nearest_QK], weights_QK)
        num_right += int((votes_QC.argmax(1) == test_labels[start : start + chunk_size]).sum())
    return num_right / len(test_ND)


def linear_probe_top1(
    train_ND: Tensor,
    train_labels: Tensor,
    test_ND: Tensor,
    test_labels: Tensor,
    *,
    c: float | None = None,
    seed: int = 0,
) -> float:
    """Measure the accuracy of a logistic regression on standardised features, 0..1.

    Args:
        train_ND: features to fit on.
        train_labels: their classes (N,), two or more.
        test_ND: features to classify; never used to choose `c`.
        test_labels: their classes.
        c: inverse strength of the L2 penalty. None picks the best of PROBE_CS on a seeded fifth of the
            training images (the stronger penalty if two are equal) and fits once more on all of them; where only one
            class would be left to fit on, the strongest penalty is taken.
        seed: of that split.

    Raises:
        DataError: one side has no labelled image, there are too few to hold some out, or all are of one class.

    Cost: scikit-learn's L-BFGS; 10,000 x 192 with 10 classes takes 3 s on one core.
    """
    train_ND, train_labels = _labelled(train_ND, train_labels, "linear probe: training")
    test_ND, test_labels = _labelled(test_ND, test_labels, "linear probe: test")
    if c is None:
        order = torch.randperm(len(train_ND), generator=torch.Generator().manual_seed(seed))
        held, rest = order[: len(order) // 5], order[len(order) // 5 :]
        parts = (train_ND[rest], train_labels[rest], train_ND[held], train_labels[held])
        can_choose = len(held) and len(train_labels[rest].unique()) > 1
        c = max(PROBE_CS, key=lambda candidate: _fit_and_score(*parts, c=candidate)) if can_choose else PROBE_CS[0]
    return _fit_and_score(train_ND, train_labels, test_ND, test_labels, c=c)


def _fit_and_score(train_ND: Tensor, train_labels: Tensor, test_ND: Tensor, test_labels: Tensor, *, c: float) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(train_labels.unique()) < 2 or not len(test_labels):
        raise DataError(f"linear probe: {len(train_labels)} images are too few or of one class; pass more.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=PROBE_MAX_STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # PROBE_MAX_STEPS is meant as a bound
        probe.fit(train_ND.numpy(), train_labels.numpy())
    return float(probe.score(test_ND.numpy(), test_labels.numpy()))


def _labelled(found_ND: Tensor, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return the rows with a known label, on the CPU, in float32."""
    if len(found_ND) != len(labels):
        got = f"{len(found_ND)} features and {len(labels)} labels"
        raise DataError(f"{where}: {got}; pass one label per image, -1 where unknown.")
    found_ND, labels = found_ND.detach().float().cpu(), labels.cpu()
    known = labels >= 0
    if not known.any():
        raise DataError(f"{where}: no image has a label; pass a labelled source.")
    return found_ND[known], labels[known]
