"""What is left of a model: its features against the original's, and what they are good for."""

from vitrim.metrics.classify import extract, knn_top1, linear_probe_top1, top1
from vitrim.metrics.fidelity import block_fidelity, fidelity, retrieval_recall

__all__ = [
    "block_fidelity",
    "extract",
    "fidelity",
    "knn_top1",
    "linear_probe_top1",
    "retrieval_recall",
    "top1",
]
