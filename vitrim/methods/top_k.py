"""Top-k, the enforced sparsity of The Lazy Neuron Phenomenon (arXiv 2210.06313): few hidden units active per token.

Parameters stay; the work of the output projection falls, and only on kernels that skip zeros. Applied to a trained
model, a GELU loses what its small activations carried; distillation (or replacing it by ReLU) brings that back. So
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
    """Lazy Neurons: lets only the most active hidden units of each token reach the output."""

    name = "top-k"
    paper = "The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers"
    arxiv = "2210.06313"
    summary = "only the most active hidden units of each token reach the output"
    needs = "weights"
    repairs = False
    edits = (TopKActivation,)
    takes = "share"

    num_active: int | None = Field(default=None, ge=1)
    """Number of hidden units of each MLP that are active for a token; None uses the budget's share."""
    by: Rank = "magnitude"
    """Rank the units of a token by absolute size (`magnitude`) or by signed `value`."""

    def goes_by(self) -> BudgetUse:
        """Return which part of the budget the method uses: none if `num_active` is given."""
        return "nothing" if self.num_active is not None else self.takes

    def propose(self, view: ModelView) -> Iterator[TopKActivation]:
        """Yield one edit per MLP."""
        if self.num_active is None and view.keep_ratio >= 1:
            view.note("top-k: the full budget leaves every unit active, so the model stays as it is.")
            return
        for site in view.sites:
            num_active = view.widths[site.path] if self.num_active is None else self.num_active
            yield TopKActivation(site=site, num_active=num_active, by=self.by)
