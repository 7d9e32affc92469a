"""Top-k, the enforced sparsity of The Lazy Neuron Phenomenon (arXiv 2210.06313): few hidden units active a token.

No parameter goes. What falls is the work of the output projection, and only with kernels that skip zeros. In a model
that was not trained for it, the small activations of a GELU carry something too, and top-k loses that: distil
afterwards, or put a ReLU in its place first (`relufy`). For the same reason units are ranked by magnitude here, unless
asked otherwise. Units that never fire are not cut.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from vitrim.layers.top_k import Rank
from vitrim.methods.registry import ModelMethod, register
from vitrim.surgery import TopKActivation
from vitrim.types import ModelView


@register
class TopK(ModelMethod):
    """Let only the most active hidden units of each token reach the output."""

    name = "top-k"
    paper = "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers"
    arxiv = "2210.06313"
    summary = "only the most active hidden units of each token reach the output"
    needs = "weights"
    takes = "share"
    edits = (TopKActivation,)

    num_active: int | None = Field(default=None, ge=1)
    """Units of each MLP that are active for a token; None takes the budget's share of them."""
    by: Rank = "magnitude"
    """What the units of a token are ranked by."""

    def propose(self, view: ModelView) -> Iterator[TopKActivation]:
        """The edits.

        Args:
            view: the model.

        Yields:
            One edit an MLP.
        """
        for site in view.sites:
            num_active = view.widths[site.path] if self.num_active is None else self.num_active
            yield TopKActivation(site=site, num_active=num_active, by=self.by)
