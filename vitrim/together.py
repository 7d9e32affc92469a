"""Compares several classifiers together with those that they were made from: the scores of each side are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.cost.count import count_macs, num_parameters
from vitrim.data import Batch, ImageSet
from vitrim.data.inputs import open_set
from vitrim.data.match import match_labels
from vitrim.distributed.devices import resolve_device
from vitrim.errors import DataError, ModelError
from vitrim.evaluation import Evaluation, Scored
from vitrim.metrics.fidelity import MIN_IMAGES
from vitrim.metrics.outputs import Outputs
from vitrim.metrics.record import ModelCost
from vitrim.models.features import evaluating, inputs_for, logits, num_classes
from vitrim.models.origin import Origin
from vitrim.output.load import Model, open_encoder
from vitrim.progress import progress
from vitrim.torch_state import own_torch_state


class Named(NamedTuple):
    """A model, how it was built, and what the user calls it."""

    name: str
    model: nn.Module
    origin: Origin


@own_torch_state()
def evaluate_together(
    students: Sequence[Model],
    teachers: Sequence[Model],
    data: Any,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    split: str | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Compare classifiers together with those that they were made from: the class scores of each side are added.

    Models may take different things made of the same data, such as the streams of a recording of skeletons.

    Args:
        students: two or more small models.
        teachers: for each the model to compare with, in the same order.
        data: labelled data to evaluate on, of any kind that `evaluate` takes.
        limit: use at most this many images.
        batch_size: images per forward pass.
        device: `auto`, or a torch device.
        split: the part to use of a data source that has several; by default "test", or "val" if there is none.
        quiet: show no progress.

    Returns:
        What all models of a side cost, their `top1` together, and that of each under `top1 of NAME`.

    Raises:
        ModelError: a model can't be read, is no classifier of as many classes, or takes something else than its pair.
        DataError: the data can't be read, or has no labels that are those of the heads.
    """
    if len(students) != len(teachers):
        raise ModelError(f"{len(students)} small models, and {len(teachers)} to compare with; give one for each.")
    both = [
        [_open(f"{kind} {n}", model) for n, model in enumerate(side, start=1)]
        for kind, side in (("model", students), ("original", teachers))
    ]
    _check(*both)
    sources = [
        _labelled(open_set(data, it.origin, split=split, limit=limit, default="test"), it.model) for it in both[1]
    ]
    sides = [_Side([it.model.to(resolve_device(device)) for it in side]) for side in both]
    num_agreed = num_skipped = 0
    with progress("evaluate", 0, quiet=quiet) as bar, evaluating(*sides[0].models, *sides[1].models):
        bar.say(f"images of {sources[0].about}")
        loaders = [images.loader(batch_size=batch_size) for images in sources]
        for batches in bar.track(list(zip(*loaders, strict=True)), "batches compared"):
            mine, theirs = (side.add(batches) for side in sides)
            num_agreed += int((mine == theirs).sum())
            num_skipped += batches[0].num_skipped
    sources[0].tell()
    count = len(sides[0].together)
    agreement = {"top1_agreement": num_agreed / count} if count >= MIN_IMAGES else {}
    student, teacher = (side.scored([it.name for it in both[0]], batches) for side in sides)
    return Evaluation(
        fidelity={**agreement, "num_images": count},
        student=student,
        teacher=teacher,
        num_images=count,
        num_skipped=num_skipped,
        data=f"{sources[0].about}, with the scores of {len(students)} models added",
    )


def _open(name: str, model: Model) -> Named:
    """Open a model; one that is given as a module is called by this name."""
    return Named(model if isinstance(model, str) else name, *open_encoder(model))


class _Side:
    """Models whose scores are added, with what each says and what all of them say."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models, self.each, self.together = models, [Outputs() for _ in models], Outputs()

    def add(self, batches: Sequence[Batch]) -> Tensor:
        """Run each model on its batch of the same images; return the classes that all of them say."""
        labels_B, total_BC = batches[0].labels_B, torch.zeros(())
        for model, batch, outputs in zip(self.models, batches, self.each, strict=True):
            scores_BC = logits(model, inputs_for(model, batch.images_BCHW))
            assert scores_BC is not None
            outputs.add(None, scores_BC, labels_B)
            total_BC = total_BC + scores_BC.float().cpu()
        self.together.add(None, total_BC, labels_B)
        return total_BC.argmax(1)

    def scored(self, names: Sequence[str], batches: Sequence[Batch]) -> Scored:
        """Return the sums of costs, and top-1 in percent of all together and of each."""
        macs = [count_macs(model, batch.images_BCHW[:1]) for model, batch in zip(self.models, batches, strict=True)]
        whole = {"top1": self.together, **{f"top1 of {name}": it for name, it in zip(names, self.each, strict=True)}}
        return Scored(
            cost=ModelCost(parameters=sum(map(num_parameters, self.models)), macs=sum(macs)),
            scores={name: 100 * outputs.top1() for name, outputs in whole.items()},
            num_images=dict.fromkeys(whole, self.together.num_labelled),
        )


def _check(students: Sequence[Named], teachers: Sequence[Named]) -> None:
    """Refuse models without a head, of other classes than the first, or that take something else than their pair."""
    first = num_classes(teachers[0].model)
    for name, model, _ in (*students, *teachers):
        count = num_classes(model)
        if not count or count != first:
            raise ModelError(
                f"{name}: has {count or 'no'} classes, and {teachers[0].name} has {first or 'none'}; add the scores of "
                "classifiers of the same classes."
            )
    for mine, theirs in zip(students, teachers, strict=True):
        mine.origin.check_stream(mine.name, theirs.origin, theirs.name)


def _labelled(images: ImageSet, model: nn.Module) -> ImageSet:
    """Return images whose labels are those of a model's head."""
    images, fits, note = match_labels(images, model)
    if not fits:
        raise DataError(f"{note} Scores that are added are judged by labels; pass labelled data of those classes.")
    return images
