"""Measures a student beside its teacher: how close the features are, what they are good for, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitrim.cost.count import count_macs, measure_latency, num_parameters, peak_memory_mib
from vitrim.data import Batch, split_indices
from vitrim.data.inputs import check_inputs, open_set, random_inputs
from vitrim.distributed.devices import resolve_device
from vitrim.metrics.classify import extract, knn_top1, linear_probe_top1, top1
from vitrim.metrics.fidelity import fidelity, retrieval_recall
from vitrim.metrics.outputs import Outputs
from vitrim.models.features import num_classes
from vitrim.models.origin import Origin
from vitrim.output.load import Model, open_encoder


def evaluate(
    student: Model,
    teacher: Model,
    data: Any,
    *,
    index: Any = None,
    limit: int | None = None,
    batch_size: int = 64,
    latency: bool = True,
    device: str = "auto",
    split: str = "test",
) -> dict[str, Any]:
    """Compare two models on images.

    Args:
        student: the small model: a module, a name, or a folder that vitrim wrote.
        teacher: the model to compare with.
        data: images to judge on, of any kind that `compress` takes; labels are used where there are any.
        index: labelled images for kNN and the linear probe to learn from; without, a seeded 80% of `data`.
        limit: at most this many images of each; of a stream it takes one.
        batch_size: images a forward pass.
        latency: time both models, too.
        device: `auto`, or a torch device.
        split: which part of a data source that has parts.

    Returns:
        `fidelity` of the student's features (with recall of its queries in the teacher's index), and for `student` and
        `teacher` each: parameters, MACs, memory, latency, and with labels kNN, linear probe and top-1 in percent.

    Raises:
        ModelError, DataError: a model or the images can't be read, or don't fit each other.
    """
    (student_model, its_origin), (teacher_model, origin) = open_encoder(student), open_encoder(teacher)
    for model in (student_model, teacher_model):
        model.to(resolve_device(device))
    images = open_set(data, origin, split=split, limit=limit)
    batches = list(images.loader(batch_size=batch_size))
    check_inputs(student_model, its_origin, batches)
    check_inputs(teacher_model, origin, batches)
    learn = None if index is None else list(open_set(index, origin, limit=limit).loader(batch_size=batch_size))
    pair = {"student": student_model, "teacher": teacher_model}
    found, *outputs = compare(student_model, teacher_model, batches)
    result: dict[str, Any] = {"fidelity": found}
    for (name, model), own in zip(pair.items(), outputs, strict=True):
        result[name] = cost_of(model, batches[0].images_BCHW, latency=latency) | quality_of(model, own, learn)
    result["num_skipped"] = sum(batch.num_skipped for batch in batches)
    return result


def compare(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Batch]
) -> tuple[dict[str, float], Outputs, Outputs]:
    """Fidelity and retrieval (the student's queries in the teacher's index of the same images), and both outputs."""
    mine, theirs = Outputs(), Outputs()
    found = fidelity(student, teacher, batches, outputs=(mine, theirs))
    recall = retrieval_recall(mine.pooled_ND, theirs.pooled_ND, tuple(k for k in (1, 5, 10) if k <= len(mine)))
    return {**found, **recall}, mine, theirs


def cost_of(model: nn.Module, images_BCHW: Tensor, *, latency: bool) -> dict[str, Any]:
    """Parameters, MACs for one image, peak memory at the batch given, and latency at batch 1, 8 and 32."""
    costs: dict[str, Any] = {
        "parameters": num_parameters(model),
        "macs": count_macs(model, images_BCHW[:1]),
        "peak_memory_mib": peak_memory_mib(model, images_BCHW[:8]),
    }
    if latency:
        costs["latency"] = measure_latency(model, images_BCHW[:1])
    return costs


def quality_of(model: nn.Module, outputs: Outputs, learn: Sequence[Batch] | None) -> dict[str, float]:
    """kNN, linear probe and top-1 in percent, as far as labels and the model allow."""
    pooled, labels = outputs.pooled_ND, outputs.labels_N
    if int((labels >= 0).sum()) < 2:
        return {}
    if learn is None:
        rest, held = split_indices(len(pooled), num_held_out=max(1, len(pooled) // 5), seed=0)
        train, test = (pooled[rest], labels[rest]), (pooled[held], labels[held])
    else:
        train, test = extract(model, learn), (pooled, labels)
    scores = {"knn": 100 * knn_top1(*train, *test, k=min(20, len(train[0])))}
    if len(train[1][train[1] >= 0].unique()) > 1:
        scores["linear_probe"] = 100 * linear_probe_top1(*train, *test)
    return scores | own_top1(model, outputs)


def measure(model: nn.Module, origin: Origin, sample: Tensor | None, batches: Sequence[Batch] | None) -> dict[str, Any]:
    """Cost of a model, and its top-1 where the images have labels and it has a head."""
    sample = random_inputs(origin) if sample is None else sample
    if sample is None:
        return {"parameters": num_parameters(model)}
    found = cost_of(model, sample, latency=True)
    return found | (top1_of(model, batches) if batches else {})


def top1_of(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Top-1 in percent, where the images have labels that the model has a head for; else nothing."""
    return {"top1": 100 * top1(model, batches)} if _has_head_for(model, [b.labels_B for b in batches]) else {}


def own_top1(model: nn.Module, outputs: Outputs) -> dict[str, float]:
    """As `top1_of`, of what the model has put out already."""
    return {"top1": 100 * outputs.top1()} if _has_head_for(model, [outputs.labels_N]) else {}


def _has_head_for(model: nn.Module, labels: Sequence[Tensor]) -> bool:
    return num_classes(model) > max(int(part.max()) for part in labels) >= 0
