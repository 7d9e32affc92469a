"""Relufy: replaces a smooth activation by ReLU, so that inactive units are exactly zero. Distil afterwards.

This changes the features. It is the step that MoEfication (arXiv 2110.01786) takes for models trained with GELU; its
authors found a few hundred steps of training enough for a BERT. By itself it makes nothing smaller, but experts and
top-k become exact where units are off.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import ReplaceActivation
from vitrim.types import ModelView


@register
class Relufy(ModelMethod):
    """Relufy: replaces the activation by ReLU, so that inactive units are exactly zero."""

    name = "relufy"
    paper = "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts (its preparation of GELU models)"
    arxiv = "2110.01786"
    summary = "ReLU in place of the activation; to be distilled, then split into experts or thinned by top-k"
    needs = "weights"
    repairs = False
    edits = (ReplaceActivation,)
    takes = "nothing"

    def propose(self, view: ModelView) -> Iterator[ReplaceActivation]:
        """Yield one edit per MLP."""
        for site in view.sites:
            yield ReplaceActivation(site=site)
