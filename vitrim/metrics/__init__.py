"""Measures of a model: its features against the original's, and how well they classify and retrieve."""

from vitrim.metrics.classify import extract, knn_top1, linear_probe_top1, top1
from vitrim.metrics.fidelity import block_fidelity, fidelity, retrieval_recall
from vitrim.metrics.retrieval import embed_captioned, image_text_recall
from vitrim.metrics.zero_shot import build_classifier, prompts_for, zero_shot_top

__all__ = [
    "block_fidelity",
    "build_classifier",
    "embed_captioned",
    "extract",
    "fidelity",
    "image_text_recall",
    "knn_top1",
    "linear_probe_top1",
    "prompts_for",
    "retrieval_recall",
    "top1",
    "zero_shot_top",
]
