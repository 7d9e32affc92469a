"""LoRAPrune (arXiv 2305.18403): prunes while LoRA trains, by an importance from the factors and their gradients alone.

The model is frozen; only LoRA's factors train. Between the backward pass and the optimizer's step each hidden unit, or
head, gets a score from all the layers that it has rows or columns of; scores are averaged over steps. A cubic schedule
masks the lowest ones, equally many in every block, until the target is reached exactly; a mask never opens again. At
the end the edits carry the merged weights of what is left, so cutting equals masking.

A mask multiplies the input of the output projection. The paper masks what queries, keys, values, gate and value
projections put out. That comes to the same function and the same gradients wherever an activation maps 0 to 0, and
where it does not, only the former equals the cut. Ours are also: one rate that does not depend on the weights' scale,
the loss on features, for which nobody needs labels, and that the target is met (the paper's code stops short of it).
That loss has no gradient before the first mask; until then a random projection of the features is what is scored.

Shapes: G groups (hidden units or heads) of a block's MLP or attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from vitrim.errors import RecipeError
from vitrim.methods.registry import ATTENTION, BudgetUse, FactorTraining, ModelMethod, Parts, TrainingView, register
from vitrim.ops.lora_importance import Factors, cubic_share, group_scores
from vitrim.surgery import Edit, KeepHeads, KeepUnits
from vitrim.types import AttentionSite, MlpSite, ModelView

ENDS = 0.1  # share of the steps before the first mask, and again after the last


@register
class LoraPrune(ModelMethod):
    """LoRAPrune: trains LoRA factors of a frozen model, masks units and heads on the way, and cuts what is masked."""

    name = "lora-prune"
    paper = "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning"
    arxiv = "2305.18403"
    summary = "units and heads masked while LoRA trains, by importance from its factors and their gradients"
    needs = "images"
    repairs = False
    takes = "widths"
    edits = (KeepUnits, KeepHeads)
    trial_options: ClassVar[Mapping[str, Any]] = {"steps": 1}

    parts: Parts = "mlp"
    """Which part of each block is cut: hidden units, whole heads, or both."""
    steps: int = Field(default=1000, ge=1)
    """Training steps."""
    batch_size: int = Field(default=128, ge=1)
    """Images in a step, over all processes."""
    rank: int = Field(default=8, ge=1)
    """Rank of the factors."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the factors: they are multiplied by alpha / rank."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of Adam, for a weight as torch initialises it; it grows with the weight's scale."""
    every: int = Field(default=10, ge=1)
    """Steps between two changes of the masks."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the moving average of the scores."""
    spare: bool = False
    """Cut nothing in the first tenth of the blocks and in the last, as the paper does; the whole model then keeps more
    than the budget."""
    loss: Literal["features", "labels"] = "features"
    """Train on the distance to the original's features, or on the cross-entropy of the images' labels."""

    def goes_by(self) -> BudgetUse:
        """Return what of a budget the method goes by: with attention, widths alone don't say what stays."""
        return self.takes if self.parts == "mlp" else "share"

    def reads_labels(self) -> bool:
        """Return whether labels of the images are read."""
        return self.loss == "labels"

    def check(self, view: ModelView) -> None:
        """Refuse layers that can't have factors of this rank, and a model without heads to drop."""
        if self.parts != "mlp" and not view.has_images:
            return
        known = {layer.path: layer for layer in view.layers()}
        for path in dict.fromkeys(path for place in _places(view, self) for path, _ in place.layers):
            layer = known.get(path)
            if layer is None or layer.kind != "linear":
                raise RecipeError(
                    f"{path}: is no plain linear layer, so it can't have factors; use a method that cuts without "
                    "training."
                )
            if self.rank > (most := min(layer.num_in, layer.num_out)):
                raise RecipeError(
                    f"options.rank={self.rank}: {path} is {layer.num_out} x {layer.num_in}; use 1..{most}."
                )

    def propose(self, view: ModelView) -> Iterator[Edit]:
        """Train, and yield one edit for each MLP and each attention, with the merged weights.

        Raises:
            RecipeError: there is nothing to cut, or a layer can't have factors.
        """
        places = _places(view, self)
        if not any(place.num_dropped for place in places):
            view.note("lora-prune: the full budget keeps everything, so nothing was trained or cut.")
            return
        pruner = _Pruner(places, self)
        trained = cast(TrainingView, view).train_factors(
            FactorTraining(
                layers=tuple(dict.fromkeys(path for place in places for path, _ in place.layers)),
                rank=self.rank,
                alpha=self.alpha,
                steps=self.steps,
                batch_size=self.batch_size,
                lr=self.lr,
                on_labels=self.reads_labels(),
            ),
            pruner,
        )
        view.note(_in_words(places))
        yield from [_edit(place, pruner.kept[place.output], trained) for place in places]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """An MLP or attention that is trained, and how many of its groups go.

    `layers` are its layers by path, with the number of projections in each one's rows; 0 stands for columns.
    """

    site: MlpSite | AttentionSite
    num_groups: int
    num_dropped: int
    layers: tuple[tuple[str, int], ...]

    @property
    def output(self) -> str:
        """Path of the output projection."""
        return self.site.output

    def scores(self, factors: Mapping[str, Factors]) -> Tensor:
        """Return the score (G,) of each group, added over the layers."""
        parts = [
            group_scores(factors[path], self.num_groups, columns=rows == 0, num_parts=max(1, rows))
            for path, rows in self.layers
        ]
        return torch.stack(parts).sum(0)


def _places(view: ModelView, options: LoraPrune) -> list[_Place]:
    """Return what is trained and cut, block after block, attention first."""
    attentions = [] if options.parts == "mlp" else list(view.attentions())
    if options.parts != "mlp" and not attentions:
        raise RecipeError(
            "options.parts: this model has no plain attention whose heads could be dropped (equally many for queries, "
            f"keys and values, which divide their rows; {ATTENTION}); use parts='mlp'."
        )
    blocks = list(dict.fromkeys(site.block for site in view.sites))
    spared = _spared(blocks) if options.spare else set()
    found: list[_Place] = []
    for site in attentions:
        block = next((block for block in blocks if site.path.startswith(f"{block}.")), "")
        num_kept = site.num_heads if block in spared else max(1, round(view.keep_ratio * site.num_heads))
        rows = [(path, 1) for path in (site.query, site.key, site.value)]
        layers = (*([(site.query, 3)] if site.fused else rows), (site.output, 0))
        num_dropped = site.num_heads - num_kept
        found.append(_Place(site=site, num_groups=site.num_heads, num_dropped=num_dropped, layers=layers))
    for site in [] if options.parts == "attention" else view.sites:
        if site.norm is not None:
            raise RecipeError(f"{site.path}: has a norm inside, which masked units would change; use another method.")
        num_dropped = 0 if site.block in spared else site.d_hidden - view.widths[site.path]
        gate = () if site.gate is None else ((site.gate, 1),)
        layers = ((site.value, site.num_groups), *gate, (site.output, 0))
        found.append(_Place(site=site, num_groups=site.d_hidden, num_dropped=num_dropped, layers=layers))
    return found


def _spared(blocks: Sequence[str]) -> set[str]:
    """Return the first tenth of the blocks, rounded up, and the last one."""
    spared = {*blocks[: math.ceil(0.1 * len(blocks))], blocks[-1]}
    if len(spared) == len(blocks):
        raise RecipeError(
            f"options.spare: each of the {len(blocks)} blocks is among the first tenth or the last; leave spare out."
        )
    return spared


class _Pruner:
    """What happens between backward and step: scores, their moving average, and masks that only ever close.

    `masks` are what the inputs of output projections are multiplied by, by path.
    """

    def __init__(self, places: Sequence[_Place], options: LoraPrune) -> None:
        self.places, self.options = places, options
        self.averages = {place.output: torch.zeros(place.num_groups) for place in places}
        self.kept = {place.output: torch.ones(place.num_groups, dtype=torch.bool) for place in places}
        self.masks: dict[str, Tensor] = {}

    def see(self, step: int, factors: Mapping[str, Factors]) -> None:
        """Score all groups, and mask the lowest where it is time to; a score that is no number is left out."""
        share = cubic_share(step, self.options.steps, ends=ENDS)
        for place in self.places:
            new_G, average_G = place.scores(factors).cpu(), self.averages[place.output]
            if bool(new_G.isfinite().all()):
                average_G.lerp_(new_G, 1 - self.options.decay)
            if step % self.options.every == 0 or share >= 1:
                self._mask(place, int(share * place.num_dropped))

    def _mask(self, place: _Place, num_masked: int) -> None:
        """Mask groups of the lowest scores, beside those that are masked already; a tie goes to the first."""
        kept_G = self.kept[place.output]
        order_G = self.averages[place.output].masked_fill(~kept_G, -1).sort(stable=True).indices
        kept_G[order_G[:num_masked]] = False
        self._show(place)

    def _show(self, place: _Place) -> None:
        width = 1 if isinstance(place.site, MlpSite) else place.site.head_dim
        self.masks[place.output] = self.kept[place.output].float().repeat_interleave(width)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return everything from which the pruning goes on exactly."""
        return {"averages": self.averages, "kept": self.kept}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what `state` returned."""
        self.averages = {path: tensor.clone() for path, tensor in state["averages"].items()}
        self.kept = {path: tensor.clone() for path, tensor in state["kept"].items()}
        for place in self.places:
            self._show(place)


def _edit(place: _Place, kept_G: Tensor, trained: Mapping[str, Tensor]) -> Edit:
    """Return the edit that keeps what is not masked, with the trained weights of what stays."""
    keep, site = tuple(kept_G.nonzero().flatten().tolist()), place.site
    edit: Edit = KeepUnits(site=site, keep=keep) if isinstance(site, MlpSite) else KeepHeads(site=site, keep=keep)
    weights = {f"{path}.weight" for path, _ in place.layers}
    tensors = {new: cut for name in sorted(weights) for new, cut in edit.map_tensor(name, trained[name])}
    return replace(edit, tensors=tensors)


def _in_words(places: Sequence[_Place]) -> str:
    """Return what share of units and heads is gone: where something was cut, and of the whole model."""
    said = []
    for kind, word in ((MlpSite, "hidden units"), (AttentionSite, "heads")):
        mine = [place for place in places if isinstance(place.site, kind)]
        cut = sum(place.num_groups for place in mine if place.num_dropped)
        if cut:
            gone, total = sum(place.num_dropped for place in mine), sum(place.num_groups for place in mine)
            said.append(f"{gone / cut:.1%} of the {word} where any were cut, {gone / total:.1%} of all")
    return f"lora-prune: gone are {'; '.join(said)}."
