"""GRAIL (arXiv 2602.23795): gives back the hidden units that are gone from those that are left, by second moments.

Whatever made an MLP narrower, its K units are a linear merging R of the H that there were: a choice of some, or, when
units are folded, the mean of each group. With G the second moments of the H units, B = G R' (R G R' + r I)^-1 is the
ridge regression of the old units on the new, and the output projection becomes W B. Its bias stays.

Folding: k-means groups the rows of the input projection (gate and value together) and the mean row of a group takes
the place of its units. Behind an activation that is not quite the mean of their activations, which the regression takes
it for. The ridge is relative to the mean energy of a merged unit, as in the authors' code.

Shapes: H hidden units, K kept, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vitrim.methods.registry import METHODS, ModelMethod, SiteMethod, make_method, optional_tensor, register
from vitrim.ops import folding
from vitrim.ops.gram_schmidt import working_dtype
from vitrim.surgery import KeepUnits
from vitrim.types import MlpSite, MlpWeights, ModelView, SiteView


@register
class Grail(ModelMethod):
    """GRAIL: folds similar units into one, and reconstructs the old units from the new in the output projection."""

    name = "grail"
    paper = "GRAIL: Post-hoc Compensation by Linear Reconstruction for Compressed Networks"
    arxiv = "2602.23795"
    summary = "similar units folded into one, and all old units reconstructed from the new ones"
    needs = "images"
    repairs = False
    takes = "widths"
    folds = True

    units: str = "folding"
    """What stays: `folding` merges groups of similar units; the name of another method takes the units that it does."""
    ridge: float = Field(default=1e-3, gt=0)
    """Strength of the regularization, relative to the mean energy of a merged unit."""

    @field_validator("units")
    @classmethod
    def _known(cls, given: str) -> str:
        names = [name for name, kind in METHODS.items() if issubclass(kind, SiteMethod)]
        if given != "folding" and given not in names:
            raise ValueError(f"no way to choose units is called {given!r}; use folding, {', '.join(names)}")
        return given

    def propose(self, view: ModelView) -> Iterator[KeepUnits]:
        """Yield one cut per MLP, each seen with the MLPs before it already cut."""
        for site in view.track(view.sites, "MLPs"):
            yield self._cut(view, site, view.widths[site.path])

    def _cut(self, view: ModelView, site: MlpSite, num_keep: int) -> KeepUnits:
        """Return the cut of one MLP; without tensors if our repair will fit them."""
        if num_keep == site.d_hidden:
            return KeepUnits.first(site, num_keep)
        weights = view.weights(site)
        if self.units != "folding":
            keep_K = self._chosen(view, site, weights, num_keep)
            merge_KH, tensors = folding.choosing(keep_K, site.d_hidden), {}
        else:
            rows_HD = weights.input_rows.to(working_dtype(weights.input_rows.device))
            labels_H = folding.kmeans(rows_HD, num_keep, view.generator)
            keep_K = folding.nearest_to_means(rows_HD, labels_H, num_keep)
            merge_KH = folding.averaging(labels_H, num_keep)
            tensors = _merged(view, site, weights, merge_KH)
        edit = KeepUnits(site=site, keep=tuple(keep_K.tolist()))
        if view.repaired:
            return edit
        gram_HH = view.stats(site).hidden_HH
        back_HK = folding.reconstruction(gram_HH, merge_KH, ridge=self.ridge, where=site.path)
        output_DK = weights.output_DH.to(back_HK) @ back_HK
        return KeepUnits(site=site, keep=edit.keep, tensors={**tensors, f"{site.output}.weight": output_DK})

    def _chosen(self, view: ModelView, site: MlpSite, weights: MlpWeights, num_keep: int) -> Tensor:
        """Return the units that another method keeps."""
        method = make_method(self.units)
        assert isinstance(method, SiteMethod)
        stats = view.stats(site) if method.needs == "images" else None
        own = SiteView(site=site, weights=weights, num_keep=num_keep, generator=view.generator, stats=stats)
        return method.select(own)


def _merged(view: ModelView, site: MlpSite, weights: MlpWeights, merge_KH: Tensor) -> dict[str, Tensor]:
    """Return the input projections, and the norm over the units if there is one, with groups merged to their means."""
    gate, value = [weights.gate_HD, weights.gate_bias_H], [weights.value_HD, weights.value_bias_H]
    parts: dict[str, list[list[Tensor | None]]] = {site.value: [value]}
    if site.kind == "packed_gated":
        parts = {site.value: [gate, value]}
    elif site.gate is not None:
        parts = {site.gate: [gate], site.value: [value]}
    if site.norm is not None:
        parts[site.norm] = [[optional_tensor(view, f"{site.norm}.{name}") for name in ("weight", "bias")]]
    found = {}
    for path, groups in parts.items():
        for name, tensors in zip(("weight", "bias"), zip(*groups, strict=True), strict=True):
            present = [tensor.to(merge_KH) for tensor in tensors if tensor is not None]
            # A response norm's tensors have units last, behind dimensions of 1; all others have them first.
            merged = [tensor @ merge_KH.T if path == site.norm else merge_KH @ tensor for tensor in present]
            found |= {f"{path}.{name}": torch.cat(merged)} if merged else {}
    return found
