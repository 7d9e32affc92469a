"""Cuts attention heads on the way through a model, each attention before the MLP of its block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vitrim.calibrate import HeadVisit, LiveModelView
from vitrim.calibrate.activations import Activations
from vitrim.config.options import RepairOptions
from vitrim.errors import RecipeError
from vitrim.methods import SiteMethod
from vitrim.repair.heads import cut_heads_, pick_heads_
from vitrim.surgery import Edit
from vitrim.types import AttentionSite, MlpSite


@dataclass(frozen=True, kw_only=True)
class HeadsCut:
    """How the attentions of a student are cut: `share` of each head's dimensions or of the heads stays, one at least.

    `sites` are the attentions to cut; `outputs` are, by block, the output projections of its MLPs.
    `metrics` are those on outputs, by path of a projection. `notes` grows as attentions are cut.
    """

    student: nn.Module
    method: SiteMethod
    repair: RepairOptions | None
    share: float
    num_fit: int
    sites: Sequence[AttentionSite]
    outputs: Mapping[str, Sequence[str]]
    metrics: Mapping[str, Tensor]
    notes: list[str]
    keep: Callable[[Edit, Mapping[str, float]], None]

    def enter_(self, block: str, teacher: Activations, student: Activations) -> None:
        """Cut what is in a block that both models have come to."""
        for site in [site for site in self.sites if site.block == block]:
            whole = self.method.whole_heads()
            total = site.num_heads if whole else site.head_dim
            if (num_keep := max(1, round(self.share * total))) == total:
                continue
            visit = HeadVisit(
                site=site,
                teacher=teacher,
                student=student,
                silent=self.outputs[block],
                feedback=0.0 if self.repair is None else self.repair.feedback,
                num_fit=self.num_fit,
                metric_DD=self.metrics.get(site.output),
            )
            ridge = None if self.repair is None else self.repair.ridge
            if visit.scale_D is None and visit.feedback > 0:
                self.notes.append(f"{site.path}: no fixed layer scale behind the attention, so it has no feedback.")
            cut_ = pick_heads_ if whole else cut_heads_
            self.keep(*cut_(self.student, visit, self.method, num_keep, ridge))


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
    blocks = dict.fromkeys(site.block for site in mlps)
    found = [
        replace(site, block=block)
        for site in view.attentions(padded=not whole_heads)
        for block in blocks
        if site.path.startswith(f"{block}.")
    ]
    if not found:
        raise RecipeError("options.parts: this model has no attention that can be cut; use parts='mlp'.")
    return found, view.notes
