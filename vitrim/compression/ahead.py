"""Says, before anything is cut, what a run will take: each stage's work in epochs of distillation, from counts alone.

A pass is the original's forward pass of one image, and a backward pass counts as two. An epoch of distillation is one
pass of the teacher and three of the student over the calibration images; students count as if nothing were cut. No
clock is read: what a machine does in a second differs between products, passes and short steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitrim.compression.job import Models
from vitrim.config.options import AtOnceOptions, BlockwiseOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.config.steps import Step
from vitrim.cost.count import count_macs, site_macs
from vitrim.methods import SiteMethod
from vitrim.models.attention import find_attentions
from vitrim.models.features import device_of
from vitrim.recover.range_test import SHARE
from vitrim.repair.refit import BATCH_TOKENS
from vitrim.surgery import channels_last, submodule
from vitrim.types import AttentionSite, MlpSite

LOG = logging.getLogger("vitrim")

# Passes over the images of a walk: the teacher's, the student's in front of each cut, and its again behind it.
WALK = 3
# More of them for a look at each attention: both models run its block, once for values and once for queries and keys.
RUNS = 2
# Passes of an image in a step of distillation: teacher, student, and back.
DISTIL, TRAIN = 4, 3


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run: what it does, in words, and its work in passes."""

    words: str
    passes: float


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """Counts from which the work of a run follows.

    Attributes:
        sites: MLPs to cut, and `widths` that stay of them by path.
        attentions: those in the same blocks, which a method may cut as well.
        tokens: tokens of an image at each MLP and attention, by path.
        macs: multiply-accumulates of a pass.
        num_images: calibration images, each with `num_views` views.
        num_train: training images; None for a stream.
        num_cuts: cuts at most, where widths are chosen by trying several.
    """

    sites: Sequence[MlpSite]
    widths: Mapping[str, int]
    tokens: Mapping[str, float]
    macs: int
    num_images: int
    num_views: int
    num_train: int | None
    num_cuts: int = 1
    attentions: Sequence[AttentionSite] = ()

    def stages(self, recipe: Recipe) -> Iterator[Stage]:
        """Yield the stages of a recipe in order; the work of a selection itself is not counted."""
        for step in recipe.steps:
            for stage in self._cut(step):
                times = "" if self.num_cuts == 1 else f", up to {self.num_cuts} times"
                yield Stage(words=stage.words + times, passes=self.num_cuts * stage.passes)
        if recipe.blockwise is not None:
            yield self._blockwise(recipe.blockwise)
        if recipe.at_once is not None:
            yield self._steps("training of all blocks at once", recipe.at_once)
        if recipe.recover is not None:
            yield from self._distillation(recipe.recover)
        if recipe.exits is not None:
            yield self._steps("training of early exits", recipe.exits)

    def _steps(self, name: str, options: AtOnceOptions) -> Stage:
        """Return a stage of a given number of steps, with those of its range test."""
        passes = DISTIL * options.steps * options.batch_size * (1 if options.lr else 1 + SHARE)
        return Stage(words=f"{name} ({options.steps:,} steps of {options.batch_size:,} images)", passes=passes)

    def _cut(self, step: Step) -> Iterator[Stage]:
        """Yield the walk with its sums, and the refit."""
        repair, num_seen, method = step.repair_options(), self.num_images * self.num_views, step.make_method()
        if repair is None:
            return
        parts = method.cuts() if isinstance(method, SiteMethod) else "mlp"
        mlps, heads = (self.sites if parts != "attention" else ()), (self.attentions if parts != "mlp" else ())
        runs = 0 if not heads else RUNS if isinstance(method, SiteMethod) and method.whole_heads() else 2 * RUNS
        fed = 2 if repair.feedback > 0 else 1  # sums with targets, and with what of them is feedback
        sums = sum(self.tokens[s.path] * s.d_hidden * (s.d_hidden / 2 + fed * s.d_model) for s in mlps)
        for site in heads:
            width, logits = site.num_heads * site.head_dim, 0 if runs == RUNS else 4 * site.head_dim
            sums += self.tokens[site.path] * width * (width / 2 + fed * site.d_model + logits)
        what = " and ".join(f"{len(one)} {name}" for one, name in ((mlps, "MLPs"), (heads, "attentions")) if one)
        views = "" if self.num_views == 1 else f" in {self.num_views} views"
        passes = (
            f"{WALK + runs} passes over {self.num_images:,} images{views}, and sums worth {sums / self.macs:.1f} more"
        )
        words = f"closed-form repair of {what} ({passes})"
        yield Stage(words=words, passes=num_seen * (WALK + runs + sums / self.macs))
        if repair.refit and mlps:
            macs = sum(site_macs(s, self.widths.get(s.path, s.d_hidden)) for s in mlps)
            passes = TRAIN * repair.refit_steps * min(BATCH_TOKENS, repair.max_tokens) * macs / self.macs
            words = f"refit of {len(mlps)} MLPs ({repair.refit_steps:,} steps of {BATCH_TOKENS:,} tokens for each)"
            yield Stage(words=words, passes=passes)

    def _blockwise(self, options: BlockwiseOptions) -> Stage:
        """Return the walk over the images, and each block's steps."""
        num_images = min(options.num_images, self.num_train or options.num_images)
        mlps = sum(self.tokens[s.path] * site_macs(s, self.widths.get(s.path, s.d_hidden)) for s in self.sites)
        part = 1.0 if options.train == "block" else mlps / self.macs
        passes = WALK * num_images + TRAIN * options.steps * options.batch_size * part
        words = f"training block by block ({options.steps:,} steps of {options.batch_size:,} images for each)"
        return Stage(words=words, passes=passes)

    def _distillation(self, options: RecoverOptions) -> Iterator[Stage]:
        """Yield distillation of the whole model; nothing where its length is not known yet."""
        size = options.batch_size * options.gradient_accumulation_steps
        epoch = self.num_train or options.epoch_images
        if options.steps is None and (epoch is None or options.epochs is None):
            return
        num_steps = options.steps or max(1, round((options.epochs or 0) * math.ceil((epoch or 0) / size)))
        finds = 1 if options.peak_lr(size) else 1 + SHARE
        yield Stage(
            words=f"distillation ({num_steps:,} steps of {size:,} images)", passes=DISTIL * num_steps * size * finds
        )

    def line(self, recipe: Recipe) -> str:
        """Return the stages in a line, each by its work in epochs on the calibration images; "" without any."""
        epoch, stages = DISTIL * self.num_images, list(self.stages(recipe))
        if not stages:
            return ""
        said = "; ".join(f"{stage.passes / epoch:.1f} for the {stage.words}" for stage in stages)
        total = sum(stage.passes for stage in stages) / epoch
        return (
            f"ahead: as much work as {total:.1f} epochs of distillation, each of which would run the original on the "
            f"{self.num_images:,} calibration images once and train the small model on them once. Of these {said}"
        )


def say_ahead(
    models: Models, widths: Mapping[str, int], recipe: Recipe, context: RunContext, *, num_cuts: int = 1
) -> None:
    """Log what a run will take, where there are images and progress is shown; `num_cuts` as in `Ahead`."""
    if models.split is None or context.quiet:
        return
    counts = models.split.counts
    blocks = tuple(f"{site.block}." for site in models.sites if site.block)
    attentions = [site for site in find_attentions(models.teacher) if site.path.startswith(blocks)]
    image_1CHW = models.split.sample[:1].to(device_of(models.teacher))
    tokens, macs = _tokens_and_macs(models.teacher, [*models.sites, *attentions], image_1CHW)
    ahead = Ahead(
        sites=models.sites,
        attentions=attentions,
        widths=widths,
        tokens=tokens,
        macs=macs,
        num_images=counts["calibration"],
        num_views=counts.get("views", 1),
        num_train=counts["train"],
        num_cuts=num_cuts,
    )
    if line := ahead.line(recipe):
        LOG.info("%s.", line)


def _tokens_and_macs(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite], images_BCHW: Tensor
) -> tuple[dict[str, float], int]:
    """Return the tokens of an image at each place, and the multiply-accumulates of a pass, by one pass."""
    seen: dict[str, float] = {site.path: 0.0 for site in sites}

    def see(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(layer: nn.Module, _: Any, output: Tensor) -> None:
            seen[path] += output.numel() / channels_last(layer, output).shape[-1] / len(images_BCHW)

        return add

    handles = [submodule(model, site.output).register_forward_hook(see(site.path)) for site in sites]
    try:
        return seen, count_macs(model, images_BCHW)
    finally:
        for handle in handles:
            handle.remove()
