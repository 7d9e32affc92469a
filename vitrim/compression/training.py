"""Training behind the cut: block by block, all blocks at once, end to end, and the images that all of them see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from vitrim.compression.job import Job, Models
from vitrim.config.options import AtOnceOptions, RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import ImageSet, ImageStream, Split, augment_for
from vitrim.data.poses import poses_of
from vitrim.data.transforms import is_known
from vitrim.distributed.processes import num_processes, rank
from vitrim.recover.at_once import train_at_once_
from vitrim.recover.distill import OnValidation, recover_
from vitrim.recover.elastic import Slice, Widths
from vitrim.recover.elastic_fit import Fitting, serving
from vitrim.recover.exits import train_exits_
from vitrim.recover.factors import TrainingSource
from vitrim.recover.labels import train_labels_
from vitrim.recover.losses import heatmap_loss
from vitrim.recover.result import Recovery
from vitrim.repair.blockwise import Blockwise, follow_cut_


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Results of training after the cut, in order, and the other widths of an elastic run."""

    blocks: Blockwise | None = None
    at_once: Recovery | None = None
    recovery: Recovery | None = None
    exits: Recovery | None = None
    slices: Mapping[float, Slice] = field(default_factory=dict)

    @property
    def anything(self) -> bool:
        """Whether anything was trained."""
        return any(step is not None for step in (self.blocks, self.at_once, self.recovery, self.exits))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user."""
        steps = (self.blocks, self.at_once, self.recovery, self.exits)
        return tuple(note for step in steps if step is not None for note in step.notes)

    def describe(self) -> dict[str, Any]:
        """Return the fields of `Metrics` about training."""
        return {
            "blockwise": None if self.blocks is None else dict(self.blocks.__dict__),
            "at_once": None if self.at_once is None else dict(self.at_once.__dict__),
            "recovery": None if self.recovery is None else dict(self.recovery.__dict__),
            "exits": None if self.exits is None else dict(self.exits.__dict__),
            "elastic": {f"{ratio:g}": dict(found.errors) for ratio, found in self.slices.items()} or None,
        }


def train_(
    models: Models, job: Job, widths: Widths | None, context: RunContext, on_validation: OnValidation | None
) -> Trained:
    """Train the student by block, all blocks at once, end to end and at exits, as far as the recipe asks for it."""
    recipe, split = job.recipe, models.split
    blocks = follow_cut_(models.student, models.teacher, models.sites, recipe, split, context=context)
    at_once = _trained_(train_at_once_, recipe.at_once, models, job, context)
    recovery, slices = None, {}
    if split is not None and recipe.recover is not None:
        fitting = Fitting(
            teacher=models.teacher,
            batches=split.calibration,
            held_out=[batch.images_BCHW for batch in split.held_out],
            options=recipe.steps[0].repair_options(),
            at=recipe.recover.features_at,
        )
        distil_ = partial(recover_, widths=widths, space=job.space, on_validation=on_validation)
        if recipe.recover.loss == "labels":
            distil_ = partial(_with_labels_, split=split, on_validation=on_validation)
        with serving(models.student, widths, fitting) as slices:
            recovery = _trained_(distil_, recipe.recover, models, job, context)
    exits = _trained_(train_exits_, recipe.exits, models, job, context)
    return Trained(blocks=blocks, at_once=at_once, recovery=recovery, exits=exits, slices=slices)


def _with_labels_(
    student: nn.Module, _: nn.Module, images: Any, *, held_out: Any, split: Split, context: RunContext, **given: Any
) -> Recovery:
    """Train a student with labels, a pose model with joints, and no teacher."""
    judged, given["context"] = split.held_out, context
    if split.judged is not None and (people := poses_of(student, split.judged)) is not None:
        seed = None if given["options"].augment == "none" else context.seed
        images, judged = poses_of(student, split.train, seed=seed), people.batches()  # type: ignore[arg-type]
        given["loss"] = heatmap_loss
    return train_labels_(student, images, held_out=judged, **given)


def _trained_(
    train_: Callable[..., Recovery],
    options: AtOnceOptions | RecoverOptions | None,
    models: Models,
    job: Job,
    context: RunContext,
) -> Recovery | None:
    """Train the student in one way on the training images, augmented, if the recipe has options for it."""
    split = models.split
    if options is None or split is None:
        return None
    return train_(
        models.student,
        models.teacher,
        _augmented(job, split, options, context),
        held_out=[batch.images_BCHW for batch in split.held_out],
        options=options,
        context=context,
    )


def training_source(models: Models, job: Job, context: RunContext) -> TrainingSource | None:
    """Return the images that a method which trains sees, augmented as for recovery; None if there are none."""
    if models.split is None:
        return None
    options = job.recipe.recover or RecoverOptions(steps=1)
    images = _augmented(job, models.split, options, context)
    ranks = {"rank": rank(), "num_processes": num_processes()}
    return TrainingSource(images=images, context=context, made=job.recipe.dump(), **ranks)


def _augmented(
    job: Job, split: Split, options: AtOnceOptions | RecoverOptions, context: RunContext
) -> ImageSet | ImageStream:
    """Return the training images, augmented where the model's preprocessing is known."""
    known = job.origin.preprocessing
    augment = augment_for(known, options.augment, flip=options.flip) if is_known(known) else None
    return split.train.augmented(augment, context.seed)
