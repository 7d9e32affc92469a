"""Top-k, the enforced sparsity of The Lazy Neuron Phenomenon (arXiv 2210.06313): few hidden units active a token.

Parameters stay; what falls is the work of the output projection, and only on kernels that skip zeros. After the fact
a GELU loses what its small activations carried, and distillation (or a ReLU in its place) is what brings it back; so
entries are ranked by magnitude unless asked otherwise. Units that never fire are not cut here.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from vitrim.layers.top_k import Rank
from vitrim.methods.registry import BudgetUse, ModelMethod, register
from vitrim.surgery import TopKActivation
from vitrim.types import ModelView


@register
class TopK(ModelMethod):
    """Lazy Neurons: only the most active hidden units of each token reach the output."""

    name = "top-k"
    paper = "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers"
    arxiv = "2210.06313"
    summary = "only the most active hidden units of each token reach the output"
    needs = "weights"
    repairs = False
    edits = (TopKActivation,)
    takes = "share"

    num_active: int | None = Field(default=None, ge=1)
    """Units of each MLP that are active for a token; None takes the budget's share."""
    by: Rank = "magnitude"
    """Rank the units of a token by absolute size (`magnitude`) or by signed `value`."""

    def goes_by(self) -> BudgetUse:
        """Return what of a budget the method goes by: `num_active` says it all."""
        return "nothing" if self.num_active is not None else self.takes

    def propose(self, view: ModelView) -> Iterator[TopKActivation]:
        """One edit an MLP."""
        for site in view.sites:
            num_active = view.widths[site.path] if self.num_active is None else self.num_active
            yield TopKActivation(site=site, num_active=num_active, by=self.by)
