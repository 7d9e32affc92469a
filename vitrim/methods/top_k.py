"""Top-k, the enforced sparsity of The Lazy Neuron Phenomenon (arXiv 2210.06313): few hidden units active a token.

Parameters stay; what falls is the work of the output projection, and only on kernels that skip zeros. After the fact
a GELU loses what its small activations carried, and distillation (or a ReLU in its place) is what brings it back; so
entries are ranked by magnitude unless asked otherwise. Units that never fire are not cut here.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from vitrim.layers.top_k import Rank
from vitrim.methods.registry import MethodOptions, register
from vitrim.surgery import TopKActivation
from vitrim.types import ModelView


class TopKOptions(MethodOptions):
    """`num_active`: units of each MLP active a token; None takes the budget's share. `by`: what they are ranked by."""

    num_active: int | None = Field(default=None, ge=1)
    by: Rank = "magnitude"


@register(
    "top-k",
    scope="model",
    edits=(TopKActivation,),
    options=TopKOptions,
    needs="weights",
    paper="The Lazy Neuron Phenomenon: On Emergence of Activation Sparsity in Transformers",
    arxiv="2210.06313",
    summary="only the most active hidden units of each token reach the output",
    repairs=False,
)
def propose(view: ModelView, options: TopKOptions) -> Iterator[TopKActivation]:
    """One edit an MLP."""
    for site in view.sites:
        num_active = view.widths[site.path] if options.num_active is None else options.num_active
        yield TopKActivation(site=site, num_active=num_active, by=options.by)
