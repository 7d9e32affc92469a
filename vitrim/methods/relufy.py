"""Relufy: ReLU in place of a smooth activation, so that units are really silent. Distil afterwards: features change.

The step that MoEfication (arXiv 2110.01786) takes for models that were trained with GELU, whose authors found a few
hundred steps enough for a BERT. By itself it makes nothing smaller; experts and top-k become exact where units are off.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import ReplaceActivation
from vitrim.types import ModelView


@register
class Relufy(ModelMethod):
    """Relufy: ReLU in place of the activation, so that units are really silent."""

    name = "relufy"
    paper = "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts (its preparation of GELU models)"
    arxiv = "2110.01786"
    summary = "ReLU in place of the activation; to be distilled, then split into experts or thinned by top-k"
    needs = "weights"
    repairs = False
    edits = (ReplaceActivation,)
    takes = "nothing"

    def propose(self, view: ModelView) -> Iterator[ReplaceActivation]:
        """One edit an MLP."""
        for site in view.sites:
            yield ReplaceActivation(site=site)
