"""Compares a student with its teacher: how close the features are, how good they are, and what both cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any

from torch import Tensor, nn

from vitrim.cost.count import count_macs, num_parameters, peak_memory_mib
from vitrim.cost.latency import BATCH_SIZES, measure_latency
from vitrim.cost.sure import judge_sure
from vitrim.data import Batch, ImageSet, split_indices
from vitrim.data.inputs import check_inputs, check_repeatable, open_set, random_inputs, scaled_notes
from vitrim.data.labels import Classes
from vitrim.data.match import check_numbers, match_labels
from vitrim.data.poses import PoseSet, poses_of
from vitrim.distributed.devices import resolve_device
from vitrim.errors import DataError
from vitrim.metrics.classify import extract, knn_top1, linear_probe_top1, top1
from vitrim.metrics.fidelity import compare, too_few
from vitrim.metrics.limits import below_limits
from vitrim.metrics.old_index import OldIndex, read_old_index
from vitrim.metrics.outputs import Outputs
from vitrim.metrics.pose import pose_scores
from vitrim.metrics.record import ModelCost, relative_latency
from vitrim.models.exits import leaving_at
from vitrim.models.features import evaluating, features, inputs_for, num_classes
from vitrim.models.origin import Origin, Reading
from vitrim.output.load import Model, open_encoder
from vitrim.output.result import aligned, html_table
from vitrim.progress import Progress, progress
from vitrim.report.summary import latency_name, row_name
from vitrim.storage.training_files import Which
from vitrim.torch_state import own_torch_state

HEADER = ("measure", "original", "small", "images")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of one model: its cost, and in percent, with labels, `knn`, `linear_probe` and `top1`; with joints PCK.

    `num_images` says of each score how many labelled images it is on.
    """

    cost: ModelCost
    scores: Mapping[str, float] = field(default_factory=dict)
    num_images: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return costs and scores in one mapping, without those that were not measured."""
        costs = {name: value for name, value in asdict(self.cost).items() if value not in (None, {})}
        return {**costs, **self.scores, **({"num_images": dict(self.num_images)} if self.scores else {})}


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        fidelity: how close the student's features are, and recall of its queries in the teacher's index.
        student: the small model.
        teacher: the model that it was compared with.
        num_images: number of images used.
        num_skipped: number of images that could not be read.
        data: what these images are of, in words, with the part that was read.
        learned_from: the images from which kNN and the linear probe learned, in words.
        notes: what else has to be known to read the numbers.
        exit: the loop behind which the student was left; None for the last.
        sure: what becomes of a student that each image leaves once its class is sure: the `confidence`, the mean number
            of `blocks`, `relative_error`, `top1`, shares of images by exit, and `latency` for one image.
    """

    fidelity: Mapping[str, float]
    student: Scored
    teacher: Scored
    num_images: int
    num_skipped: int
    data: str = ""
    learned_from: str = ""
    notes: tuple[str, ...] = ()
    exit: int | None = None
    sure: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "fidelity": dict(self.fidelity),
            "student": self.student.to_json(),
            "teacher": self.teacher.to_json(),
            "num_images": self.num_images,
            "num_skipped": self.num_skipped,
            "data": self.data,
            "notes": list(self.notes),
            **({} if self.exit is None else {"exit": self.exit}),
            **({"sure": dict(self.sure)} if self.sure else {}),
        }

    def below(self, limits: Mapping[str, float]) -> list[str]:
        """Return a line for each limit that the small model does not keep: none, if it keeps them all.

        Args:
            limits: smallest values by name: of cosines, agreement and recalls (0..1), and of `top1`, `knn` and
                `linear_probe`, which are the small model's less the original's in points of percent.

        Raises:
            DataError: something limited was not measured.
        """
        return below_limits(limits, self.fidelity, self.student.scores, self.teacher.scores)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return rows of measure, original, small and number of images as text; fidelity is that of the small model."""
        close = {name: value for name, value in self.fidelity.items() if name != "num_images"}
        rows = [(row_name(key), "", f"{value:.4g}", f"{self.num_images:,}") for key, value in close.items()]
        theirs, mine = self.teacher.to_json(), self.student.to_json()
        counts = theirs.pop("num_images", {})
        for name in theirs:
            if name == "latency":
                rows += [(latency_name(size), "1", relative_latency(row), "") for size, row in mine[name].items()]
            else:
                images = f"{counts[name]:,}" if name in counts else ""
                rows.append((row_name(name), _number(theirs[name]), _number(mine.get(name)), images))
        for name, value in self.sure.items():
            if name == "latency":
                rows.append((f"left once sure: {latency_name(1)}", "1", relative_latency(value), ""))
            else:
                rows.append((f"left once sure: {row_name(name)}", "", f"{value:.4g}", f"{self.num_images:,}"))
        return rows

    @property
    def judged_on(self) -> str:
        """What the images were, in a sentence."""
        learned = f" kNN and the probe learned from {self.learned_from}." if "knn" in self.teacher.scores else ""
        warned = "".join(f" Note: {note}" for note in too_few(self.num_images))
        left = "" if self.exit is None else f" The small model was left behind loop {self.exit}."
        of = f" of {self.data}" if self.data else ""
        return f"{self.num_images:,} images{of}, as they were given; none was held out.{left}{learned}{warned}"

    def summary(self) -> str:
        """Return the table as text."""
        return aligned(HEADER, self.rows()) + f"\n{self.judged_on}"

    def __repr__(self) -> str:
        before, after = self.teacher.cost.parameters, self.student.cost.parameters
        close = "".join(f", {row_name(name)} {value:.4g}" for name, value in [*self.fidelity.items()][:-1][:1])
        return f"Evaluation({before:,} -> {after:,} parameters{close} on {self.num_images} images)"

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return html_table(HEADER, self.rows()) + f"<p>{escape(self.judged_on)}</p>"


def _number(value: float | None) -> str:
    """Return a number as text for a table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


@own_torch_state()
def evaluate(
    student: Model,
    teacher: Model,
    data: Any,
    *,
    index: Any = None,
    old_index: Any = None,
    limit: int | None = None,
    batch_size: int = 64,
    latency: bool = True,
    device: str = "auto",
    split: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: Which = "auto",
    exit: int | None = None,
    confidence: float | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Compare two models on images.

    Args:
        student: the small model: a module, a name, or a folder that vitrim wrote.
        teacher: the model to compare with.
        data: images to evaluate on, of any kind that `compress` takes; labels are used if there are any, and of a pose
            model the joints.
        index: labelled images for kNN and the linear probe to learn from; by default a seeded 80% of `data`.
        old_index: vectors of an index that the original built earlier, in which the student's pooled features are
            searched: a .npy file or an array, row i that of image i of `data`; rows of other images may follow. Not
            with `limit`, which takes other images than the first ones.
        limit: use at most this many images of each; required for a stream.
        batch_size: images per forward pass.
        latency: also time both models.
        device: `auto`, or a torch device.
        split: the part to use of a data source that has several; by default "test", or "val" if there is none.
        model_args: arguments of the teacher's architecture, if it is a `timm/NAME@FILE`, as for `compress`.
        weights: which weights of training checkpoints, as for `compress`.
        exit: leave a looped student behind this loop, the first is 1; see the method `recursive`.
        confidence: also measure a looped classifier that each image leaves at the first loop whose largest class
            probability is this or more.
        quiet: show no progress.

    Returns:
        Fidelity of the student's features, what each model costs, and with labels kNN, linear probe and top-1; of pose
        models PCK, and OKS AP for COCO's persons.

    Raises:
        ModelError, DataError: a model, the images or an index can't be read, or they don't fit each other.
        RecipeError: there is no such exit, or the confidence is no probability.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> found = vitrim.evaluate(digits, digits, "digits", limit=20, latency=False)
        >>> found.fidelity["relative_error"], found.num_images
        (0.0, 20)
    """
    if old_index is not None and limit is not None:
        raise DataError("old_index: its rows are those of all images; leave out limit.")
    student_model, its_origin = open_encoder(student, Reading(weights=weights))
    teacher_model, origin = open_encoder(teacher, Reading(model_args=model_args or {}, weights=weights))
    both = ((student_model, its_origin), (teacher_model, origin))
    its_origin.check_stream("the small model", origin, origin.name)
    for model, built in both:
        check_repeatable(model.to(resolve_device(device)), built, random_inputs(built, 2))
    old = None if old_index is None else read_old_index(old_index, width=_pooled_width(teacher_model, origin))
    leaving, sure = leaving_at(student_model, exit, confidence)
    images, fits, note = match_labels(open_set(data, origin, split=split, limit=limit, default="test"), teacher_model)
    people = poses_of(teacher_model, images)
    with progress("evaluate", 0, quiet=quiet) as bar:
        batches, num_skipped = _read(images, batch_size, bar, judged_by=teacher_model)
        if old is not None:
            old.check(sum(len(batch.labels_B) for batch in batches), num_skipped)
        for model, built in both:
            check_inputs(model, built, batches)
        learn = None if index is None else _learn(index, images, origin, limit, batch_size, bar)
        with leaving:
            found, *outputs = compare(student_model, teacher_model, bar.track(batches, "batches compared"))
            costs = costs_of(teacher_model, student_model, batches[0].images_BCHW, latency=latency, bar=bar)
            bar.say("what the features are good for")
            parts = zip(reversed(costs), (student_model, teacher_model), outputs, strict=True)
            mine, theirs = (quality_of(*part, learn, people, top1=fits) for part in parts)
        searched, its_note = ({}, None) if old is None else _search(old, *outputs)
        left = {} if sure is None else judge_sure(sure, teacher_model, batches, top1=fits, latency=latency)
    images.tell(*(notes := tuple(filter(None, (*scaled_notes(images.kinds(), origin), note, its_note)))))
    return Evaluation(
        fidelity={**found, **searched},
        student=mine,
        teacher=theirs,
        num_images=len(outputs[0]),
        num_skipped=num_skipped,
        data=images.about,
        learned_from=_learned_from(learn),
        notes=notes,
        exit=exit,
        sure=left,
    )


def _read(
    images: ImageSet, batch_size: int, bar: Progress, *, judged_by: nn.Module | None = None
) -> tuple[list[Batch], int]:
    """Return all images in batches, with labels that the head of a model may judge, and how many could not be read."""
    bar.say(f"images of {images.about}")
    batches = list(bar.track(images.loader(batch_size=batch_size), "batches read"))
    if judged_by is not None:
        check_numbers(images, batches, judged_by)
    return batches, sum(batch.num_skipped for batch in batches)


def _learned_from(learn: Sequence[Batch] | None) -> str:
    """Return in words which images kNN and the probe learn from."""
    return "four fifths of them" if learn is None else f"{sum(len(b.labels_B) for b in learn):,} images of index"


def _learn(
    index: Any, images: ImageSet, origin: Origin, limit: int | None, batch_size: int, bar: Progress
) -> list[Batch]:
    """Return the labelled images to learn from, with the classes that the others have."""
    return _read(_like(images, open_set(index, origin, limit=limit)), batch_size, bar)[0]


def _pooled_width(model: nn.Module, origin: Origin) -> int | None:
    """Return how many numbers a model's pooled features have, if it is known what goes in."""
    sample = random_inputs(origin, 1)
    if sample is None:
        return None
    with evaluating(model):
        return features(model, inputs_for(model, sample)).pooled_BD.shape[1]


def _search(old: OldIndex, student: Outputs, teacher: Outputs) -> tuple[dict[str, float], str]:
    """Return recall of the student in an old index, and a note on how the teacher does there."""
    found, theirs = old.recall(student.pooled_ND), old.recall(teacher.pooled_ND)
    own = ", ".join(f"{share:.4g} for {name.rpartition('_')[2]}" for name, share in theirs.items())
    return found, (
        f"old_index: of its own images the original finds {own} in {len(old.vectors_MD):,} rows; where that is low, "
        "rows are in another order than the images, or not of its pooled features."
    )


def _like(images: ImageSet, index: ImageSet) -> ImageSet:
    """Call the classes of an index as those of images: by name, with new numbers for those that only the index has."""
    mine, theirs = images.classes, index.classes
    if mine is None or theirs is None or not mine.names or not theirs.names:
        return index
    names = tuple(dict.fromkeys((*mine.names, *theirs.names)))
    return index.relabelled([names.index(name) for name in theirs.names], Classes(count=len(names), names=names))


def costs_of(
    original: nn.Module, small: nn.Module, images_BCHW: Tensor, *, latency: bool, bar: Progress
) -> tuple[ModelCost, ModelCost]:
    """Measure parameters, MACs per image, peak memory on up to 8 images, and latency of both by turns."""
    both, times = (original, small), ({}, {})
    if latency:
        bar.say("latency")
        times = measure_latency(both, images_BCHW[:1], batch_sizes=bar.track(BATCH_SIZES, "batch sizes timed"))
    bar.say("multiply-accumulates and memory")
    before, after = (
        ModelCost(
            parameters=num_parameters(model),
            macs=count_macs(model, images_BCHW[:1]),
            peak_memory_mib=peak_memory_mib(model, images_BCHW[:8]),
            latency=found,
        )
        for model, found in zip(both, times, strict=True)
    )
    return before, after


def quality_of(
    cost: ModelCost,
    model: nn.Module,
    outputs: Outputs,
    learn: Sequence[Batch] | None,
    people: PoseSet | None = None,
    *,
    top1: bool = True,
) -> Scored:
    """Measure in percent kNN, linear probe and, if the labels are those of the model's head, top-1; or of poses PCK."""
    pooled, labels = outputs.pooled_ND, outputs.labels_N
    if people is not None:
        scores = pose_scores(model, people.batches())
        return Scored(cost=cost, scores=scores, num_images=dict.fromkeys(scores, len(people)))
    if outputs.num_labelled < 2:
        return Scored(cost=cost)
    if learn is None:
        rest, held = split_indices(len(pooled), num_held_out=max(1, len(pooled) // 5), seed=0)
        train, test = (pooled[rest], labels[rest]), (pooled[held], labels[held])
    else:
        train, test = extract(model, learn), (pooled, labels)
    num_known, num_judged = (int((part >= 0).sum()) for part in (train[1], test[1]))
    can_vote = learn is not None or (num_known and num_judged)  # an index without labels is refused there
    scores = {"knn": 100 * knn_top1(*train, *test, k=min(20, num_known))} if can_vote else {}
    if num_judged and len(train[1][train[1] >= 0].unique()) > 1:
        scores["linear_probe"] = 100 * linear_probe_top1(*train, *test)
    num_images = dict.fromkeys(scores, num_judged)
    own = own_top1(model, outputs) if top1 else None
    if own is not None:
        scores["top1"], num_images["top1"] = own, outputs.num_labelled
    return Scored(cost=cost, scores=scores, num_images=num_images)


def measure(
    original: nn.Module,
    small: nn.Module,
    origin: Origin,
    sample: Tensor | None,
    batches: Sequence[Batch] | None,
    *,
    quiet: bool = False,
) -> tuple[ModelCost, ModelCost]:
    """Measure what both models cost, and their top-1 if the images have labels and they have a head."""
    sample = random_inputs(origin) if sample is None else sample
    if sample is None:
        return ModelCost(parameters=num_parameters(original)), ModelCost(parameters=num_parameters(small))
    with progress("costs", 0, quiet=quiet) as bar:
        before, after = costs_of(original, small, sample, latency=True, bar=bar)
        if not batches:
            return before, after
        bar.say("top-1")
        return replace(before, top1=top1_of(original, batches)), replace(after, top1=top1_of(small, batches))


def top1_of(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    """Return top-1 in percent, or None if the images have no labels that the model's head knows."""
    return 100 * top1(model, batches) if _has_head_for(model, [b.labels_B for b in batches]) else None


def own_top1(model: nn.Module, outputs: Outputs) -> float | None:
    """Return top-1 as `top1_of` does, from outputs that were collected before."""
    return 100 * outputs.top1() if _has_head_for(model, [outputs.labels_N]) else None


def _has_head_for(model: nn.Module, labels: Sequence[Tensor]) -> bool:
    return num_classes(model) > max(int(part.max()) for part in labels) >= 0
