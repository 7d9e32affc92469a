"""Relufy: a ReLU in place of each MLP's smooth activation, so that many hidden units put out exactly zero.

MoEfication (arXiv 2110.01786) takes this step for models that were trained with a GELU; its authors found a few hundred
training steps enough for a BERT. It makes nothing smaller by itself and changes the features, so distil afterwards. It
is a preparation: `moefication` and `top-k` leave out units, which costs nothing where these are zero anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import ReplaceActivation
from vitrim.types import ModelView


@register
class Relufy(ModelMethod):
    """Put a ReLU in the place of the activation of every MLP."""

    name = "relufy"
    paper = "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts (its preparation of GELU models)"
    arxiv = "2110.01786"
    summary = "ReLU in place of the activation; to be distilled, then split into experts or thinned by top-k"
    needs = "weights"
    takes = "nothing"
    edits = (ReplaceActivation,)

    def propose(self, view: ModelView) -> Iterator[ReplaceActivation]:
        """The edits.

        Args:
            view: the model.

        Yields:
            One edit an MLP.
        """
        for site in view.sites:
            yield ReplaceActivation(site=site)
