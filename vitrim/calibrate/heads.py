"""Sums over both models at one attention: of its logits, and of its mixed values with the outputs that it should have.

As for MLPs, the student runs on its own activations, and a target also corrects a share of the error that its residual
stream has gathered. The stream behind an attention is the output of its block with the MLPs silenced.

Shapes: B images, N tokens, G heads, F dimensions of a head, A of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.calibrate.activations import Activations, Call, silenced
from vitrim.calibrate.sums import check_finite
from vitrim.calibrate.walk import JUDGING, Sums, corrected, fed_part, layer_scale, moved
from vitrim.models.features import evaluating
from vitrim.ops.gram_schmidt import working_dtype
from vitrim.ops.head_factors import LogitSums
from vitrim.share import ALONE, Share
from vitrim.surgery import submodule, weight_of
from vitrim.types import AttentionSite, Stats


@dataclass(kw_only=True)
class HeadVisit:
    """One attention, with both models at its block.

    Attributes:
        site: the attention as it is in the teacher.
        teacher: the original's activations at the block.
        student: those of the model that is cut, whose attention has the teacher's shape when it is visited.
        silent: output projections of the block's MLPs.
        feedback: share of the accumulated error of the residual stream that a target corrects, 0..1.
        num_fit: number of batches in the sums.
        metric_DD: metric on the attention's outputs, or None.
        share: of the images; sums are over all of them.
        scale_D: layer scale behind the attention, or None if there is no fixed one.
    """

    site: AttentionSite
    teacher: Activations
    student: Activations
    silent: Sequence[str]
    feedback: float
    num_fit: int
    metric_DD: Tensor | None = None
    share: Share = ALONE

    scale_D: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.scale_D = self.share.on_main(self._scale)

    def _scale(self) -> Tensor | None:
        with silenced(self.student.model, self.silent):
            model, call = self.student.model, self.student.call(0)
            block, output = self.site.block, self.site.output
            return layer_scale(model, block, output, call) if _in_order(model, self.site, call) else None

    def logits(self) -> LogitSums:
        """Return the sums of queries and keys; the student's attention must still be whole."""
        device, site = self.student.device, self.site
        none_GFF = torch.zeros(site.num_heads, site.head_dim, site.head_dim, dtype=working_dtype(device), device=device)
        names = [f"{role}{kind}_GFF" for role in ("query", "key") for kind in ("", "_cross")]
        parts = {name: none_GFF.clone() for name in names}
        for index in self.fitted:
            theirs, ours = (_projected(each, self.site, each.call(index)) for each in (self.teacher, self.student))
            for role in ("query", "key"):
                for name, other in ((f"{role}_GFF", ours), (f"{role}_cross_GFF", theirs)):
                    parts[name] += ours[role].mT @ other[role]
        self.share.sum_(parts.values())
        check_finite(self.site.path, "a sum of queries and keys", *parts.values())
        return LogitSums(**parts)

    def values(self, site: AttentionSite) -> Stats:
        """Return the sums of the mixed values, which the student now has at `site`, and of the wanted outputs."""
        sums = Sums(share=self.share)
        for index in self.fitted:
            theirs = self.teacher.observe(self.site, index, silent=self.silent)
            ours = self.student.observe(site, index, silent=self.silent)
            target_ND = corrected(theirs, ours, self.scale_D, self.feedback)
            sums.add(ours["hidden"], target_ND, fed_part(theirs, target_ND) if self.has_held_out else None)
        return sums.done(self.site.path)

    @property
    def fitted(self) -> list[int]:
        """The numbers of this process's batches that are in the sums."""
        return [index for index in self.student.own if index < self.num_fit]

    @property
    def has_held_out(self) -> bool:
        """Whether there are batches that are not in the sums."""
        return self.num_fit < len(self.student.batches)

    def held_out(self, site: AttentionSite) -> tuple[Tensor, Tensor] | None:
        """Return mixed values, which the student has at `site`, with wanted outputs, of some tokens not in the sums.

        Of processes that share images each gets those of its own batches. None if there are no such tokens.
        """
        if not self.has_held_out:
            return None
        width, inputs = weight_of(self.student.model, site.output).shape
        found = [tuple(torch.empty(0, size, device=self.student.device) for size in (inputs, width))]
        num = len(self.student.batches) - self.num_fit
        for index in [index for index in self.student.own if index >= self.num_fit]:
            theirs = self.teacher.observe(self.site, index, silent=self.silent)
            ours = self.student.observe(site, index, silent=self.silent)
            target_ND = corrected(theirs, ours, self.scale_D, self.feedback)
            step = -(-len(target_ND) * num // JUDGING)
            found.append((ours["hidden"][::step], target_ND[::step]))
        hidden, targets = zip(*found, strict=True)
        return torch.cat(hidden), torch.cat(targets)


def _in_order(model: nn.Module, site: AttentionSite, call: Call) -> bool:
    """Whether the tokens of an attention stand in its block's order: what is added to one moves that one alone.

    Windows (Swin's) have an order of their own, in which the residual stream is not known.
    """

    def ramp(output: Tensor) -> Tensor:
        count = output.shape[:-1].numel()
        return torch.linspace(0, 1, count, dtype=output.dtype, device=output.device).view(*output.shape[:-1], 1)

    size_N = moved(model, site.block, site.output, call, ramp).norm(dim=1)
    return bool((size_N.diff() >= -1e-3 * size_N.max()).all())


def _projected(activations: Activations, site: AttentionSite, call: Call) -> dict[str, Tensor]:
    """Run a block on arguments; return queries and centred keys of one attention by head, (G, B N, F)."""
    seen: dict[str, Tensor] = {}
    handles = []
    for path in dict.fromkeys((site.query, site.key)):

        def see(_: nn.Module, __: Any, output: Tensor, path: str = path) -> None:
            seen[path] = output

        handles.append(submodule(activations.model, path).register_forward_hook(see))
    try:
        with evaluating(activations.model):
            submodule(activations.model, site.block)(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    query, key = (seen[path].to(working_dtype(seen[path].device)) for path in (site.query, site.key))
    if site.fused:
        query, key, _ = query.chunk(3, dim=-1)
    key = key - key.mean(-2, keepdim=True)
    return {"query": _by_head(query, site), "key": _by_head(key, site)}


def _by_head(rows: Tensor, site: AttentionSite) -> Tensor:
    """Reshape (B, N, A) to (G, B N, F)."""
    return rows.flatten(0, -2).unflatten(-1, (site.num_heads, site.head_dim)).transpose(0, 1)
