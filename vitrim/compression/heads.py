"""Cuts attention heads on the way through a model, each attention before the MLP of its block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vitrim.calibrate import HeadVisit, LiveModelView, num_held_out
from vitrim.calibrate.activations import Activations
from vitrim.config.options import RepairOptions
from vitrim.config.steps import Step
from vitrim.errors import RecipeError
from vitrim.methods import SiteMethod
from vitrim.methods.registry import ATTENTION
from vitrim.repair.heads import cut_heads_, pick_heads_
from vitrim.share import ALONE, Share
from vitrim.surgery import Edit, KeepHeadDims, KeepHeads, KeepPaddedDims
from vitrim.types import AttentionSite, MlpSite


@dataclass(frozen=True, kw_only=True)
class HeadsCut:
    """How the attentions of a student are cut, and what is needed to do so.

    `sites` are the attentions to cut; `outputs` are, by block, the output projections of its MLPs.
    `metrics` are those on outputs, by path of a projection. `notes` grows as attentions are cut. `share` is that of the
    images.
    """

    student: nn.Module
    method: SiteMethod
    repair: RepairOptions | None
    feedback: float
    num_fit: int
    sites: Sequence[AttentionSite]
    outputs: Mapping[str, Sequence[str]]
    metrics: Mapping[str, Tensor]
    notes: list[str]
    share: Share = ALONE

    @classmethod
    def of(
        cls,
        student: nn.Module,
        mlps: Sequence[MlpSite],
        batches: Sequence[Tensor] | None,
        method: SiteMethod,
        repair: RepairOptions | None,
        metrics: Mapping[str, Tensor],
        share: Share = ALONE,
    ) -> HeadsCut:
        """Find the attentions in the blocks of these MLPs.

        Raises:
            RecipeError: there are no images, or there is no attention to cut.
        """
        sites, notes = heads_in_blocks(student, mlps, batches, whole_heads=method.whole_heads())
        outputs = {block: [s.output for s in mlps if s.block == block] for block in {s.block for s in sites}}
        num_fit = len(batches or ()) - num_held_out(batches or ())
        feedback = 0.0 if repair is None else repair.feedback
        given = {"student": student, "method": method, "repair": repair, "metrics": metrics, "notes": notes}
        return cls(**given, share=share, feedback=feedback, num_fit=num_fit, sites=sites, outputs=outputs)

    def size_of(self, site: AttentionSite) -> int:
        """Return how much an uncut attention has of what is cut: heads, or dimensions of each."""
        return site.num_heads if self.method.whole_heads() else site.head_dim

    def sizes_at(self, share: float) -> dict[str, int]:
        """Return the size of each attention, by path, at a share of its whole size."""
        return {site.path: max(1, round(share * self.size_of(site))) for site in self.sites}

    def first(self, site: AttentionSite, size: int) -> KeepHeads | KeepHeadDims | KeepPaddedDims:
        """Return an edit to a size with no values of its own, for its shapes."""
        if self.method.whole_heads():
            return KeepHeads(site=site, keep=tuple(range(size)))
        if site.mixes:
            return KeepPaddedDims(site=site, num_qk=site.head_dim if site.mixes == "values" else size, num_v=size)
        kept = (tuple(range(size)),) * site.num_heads
        return KeepHeadDims(site=site, keep_qk=kept, keep_v=kept)

    def visit(self, site: AttentionSite, teacher: Activations, student: Activations) -> HeadVisit:
        """Return an attention with both models at its block."""
        return HeadVisit(
            site=site,
            teacher=teacher,
            student=student,
            silent=self.outputs[site.block],
            feedback=self.feedback,
            num_fit=self.num_fit,
            metric_DD=self.metrics.get(site.output),
            share=self.share,
        )

    def cut_(self, visit: HeadVisit, size: int) -> tuple[Edit, dict[str, float]]:
        """Cut an attention of the student to a size; return the edit and its errors per token."""
        ridge = None if self.repair is None else self.repair.ridge
        cut_ = pick_heads_ if self.method.whole_heads() else cut_heads_
        return cut_(self.student, visit, self.method, size, ridge)

    def enter_(
        self,
        block: str,
        teacher: Activations,
        student: Activations,
        *,
        sizes: Mapping[str, int],
        keep: Callable[[Edit, Mapping[str, float]], None],
    ) -> None:
        """Cut what is in a block that both models have come to, to `sizes` by path, and hand each edit to `keep`."""
        for site in [site for site in self.sites if site.block == block]:
            if sizes[site.path] == self.size_of(site):
                continue
            visit = self.visit(site, teacher, student)
            if visit.scale_D is None and visit.feedback > 0:
                self.notes.append(f"{site.path}: no fixed layer scale behind the attention, so it has no feedback.")
            keep(*self.cut_(visit, sizes[site.path]))


def equal_share(step: Step, widths: Mapping[str, int], mlps: Sequence[MlpSite]) -> float:
    """Return the share of each attention that stays at equal sizes: what was asked for, or what the MLPs keep."""
    kept = sum(widths[site.path] for site in mlps) / sum(site.d_hidden for site in mlps)
    return step.keep_ratio or kept  # widths are rounded


def heads_in_blocks(
    model: nn.Module, mlps: Sequence[MlpSite], batches: Sequence[Tensor] | None, *, whole_heads: bool
) -> tuple[list[AttentionSite], list[str]]:
    """Return the attentions inside the blocks of these MLPs, and notes on those that can't be cut.

    Raises:
        RecipeError: there are no images, or there is no attention to cut.
    """
    if batches is None:
        raise RecipeError("options.parts: attention is cut by what it does; pass data, or use parts='mlp'.")
    view = LiveModelView(model, mlps, {}, batches, seed=0)
    every = view.attentions(padded=not whole_heads)
    blocks = dict.fromkeys(site.block for site in mlps)
    found = [replace(site, block=block) for site in every for block in blocks if site.path.startswith(f"{block}.")]
    if not found:
        why = view.notes[0].removesuffix(", so it was left alone.") if view.notes else ATTENTION
        why = f"{every[0].path} is in no block, a module that runs it and an MLP" if every else why
        raise RecipeError(f"options.parts: this model has no attention that can be cut ({why}); use parts='mlp'.")
    return found, view.notes
