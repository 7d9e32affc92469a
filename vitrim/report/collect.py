"""Gathers what a report shows from the models, the plan and the metrics of one run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitrim.config.recipe import Recipe
from vitrim.data.skeletons import poses_of_stream
from vitrim.metrics.fidelity import MIN_IMAGES
from vitrim.metrics.record import Metrics, is_steady
from vitrim.models.features import device_of, evaluating, features, logits, num_classes
from vitrim.models.joints import layout_of
from vitrim.models.origin import Origin
from vitrim.models.pose import predict_joints
from vitrim.models.skeleton import PARENTS
from vitrim.ops.gram_schmidt import select_with_curve
from vitrim.report.data import ReportData
from vitrim.report.summary import latency_rows, summarise
from vitrim.surgery import DropBlocks, KeepUnits, Plan, read_weights

NUM_IMAGES = 8
NUM_QUERIES, NUM_NEIGHBOURS = 6, 5
CURVE_POINTS = 64
NUM_SEQUENCES, NUM_FRAMES = 4, 6
CHANNELS = (1, 3)  # of images that can be shown
Seen = Mapping[str, Any]  # the fields of `ReportData` that `look` fills in
# The same fields without images.
NOTHING: Seen = {
    **dict.fromkeys(("images", "teacher_patches", "student_patches", "grid")),
    "neighbours": {},
    "poses": {},
    "frames": {},
    "answers": {},
}


def collect(teacher: nn.Module, origin: Origin, plan: Plan, recipe: Recipe, metrics: Metrics, seen: Seen) -> ReportData:
    """Gather all values for the report page of one run.

    Args:
        teacher: the original encoder.
        origin: how the original was built; its name is shown.
        plan: what was cut, by paths from the encoder.
        recipe: the user's recipe.
        metrics: what was measured.
        seen: the result of `look`.
    """
    cuts = [edit for edit in plan.edits if isinstance(edit, KeepUnits)]
    widths = [
        {"path": e.site.path, "kind": e.site.label, "width_before": e.site.d_hidden, "width_after": e.width}
        for e in cuts
    ]
    costs = {"before": metrics.before, "after": metrics.after}
    steady = [size for size, row in metrics.after.latency.items() if is_steady(row)]
    return ReportData(
        model=origin.name,
        method=metrics.method,
        command=metrics.environment["command"],
        summary=summarise(metrics),
        sites=widths,
        block_errors=_block_errors(metrics),
        edits=[dict(edit) for edit in metrics.edits],
        residual_curves={edit.site.path: _residual(teacher, edit) for edit in _of_the_original(plan)},
        recovery=[] if metrics.recovery is None else metrics.recovery["curve"],
        latency={when: {n: cost.latency[n]["median_ms"] for n in steady} for when, cost in costs.items()},
        relative_latency=latency_rows(metrics.after),
        recipe_yaml=recipe.dump(),
        environment=dict(metrics.environment),
        recovered=metrics.after_recovery is not None,
        notes=list(metrics.notes),
        num_images=0 if metrics.closeness is None else metrics.closeness.num_images,
        judged_on=metrics.judged_on,
        **seen,
    )


def _of_the_original(plan: Plan) -> list[KeepUnits]:
    """Return the cuts of MLPs that were made before any block was taken out: by the paths that the original has."""
    before = itertools.takewhile(lambda edit: not isinstance(edit, DropBlocks), plan.edits)
    return [edit for edit in before if isinstance(edit, KeepUnits)]


def _block_errors(metrics: Metrics) -> list[dict[str, Any]]:
    """Return each block's error after the cut, and after recovery where there was one."""
    cut, end = metrics.after_cut, metrics.after_recovery
    if cut is None:
        return []
    after = {} if end is None else {row["block"]: row["relative_error"] for row in end.blocks}
    return [
        {"block": row["block"], "after_cut": row["relative_error"], "after": after.get(row["block"])}
        for row in cut.blocks
    ]


def _residual(teacher: nn.Module, edit: KeepUnits) -> dict[str, Any]:
    """Return the share of a site's input weights left unexplained after each Gram-Schmidt pick, and the kept width."""
    rows = read_weights(teacher, edit.site).input_rows
    _, curve = select_with_curve(rows, min(rows.shape))
    picks = torch.linspace(0, len(curve) - 1, min(CURVE_POINTS, len(curve))).round().long()
    return {
        "residual": curve[picks].tolist(),
        "picks": picks.tolist(),
        "num_units": edit.site.d_hidden,
        "cut": edit.width,
    }


def look(teacher: nn.Module, student: nn.Module, origin: Origin, batches: Sequence[Any] | None) -> dict[str, Any]:
    """Run both models once on the same images, and return the fields of `ReportData` that need models.

    Args:
        teacher: the original model.
        student: the cut model, on the same device.
        origin: how the original was built, with its preprocessing.
        batches: tuples that start with (images_BCHW, labels_B), such as `Batch`; None if there are no images.
    """
    if not batches:
        return dict(NOTHING)
    images, labels = ([row for batch in batches for row in batch[part]] for part in (0, 1))
    numbers = [int(label) for label in labels]
    has_answers = min(num_classes(teacher), num_classes(student)) > max(numbers) >= 0
    theirs, mine = (_see(model, batches, answer=has_answers) for model in (teacher, student))
    seen = dict(NOTHING)
    if has_answers:
        seen["answers"] = {"labels": numbers, "before": theirs["answers"], "after": mine["answers"]}
    if images[0].ndim != 3:  # text, or named tensors
        return seen
    if "skeleton" in origin.preprocessing:
        return seen | {"frames": _frames(teacher, student, batches[0], origin)}
    seen |= _patches(theirs["patches"], mine["patches"], images, origin)
    if hasattr(teacher, "joint_tokens"):
        seen["poses"] = _poses(teacher, student, batches[0][0], origin)
    if images[0].shape[0] in CHANNELS:
        seen["neighbours"] = _neighbours(theirs["pooled"], mine["pooled"], images, numbers, origin)
    return seen


def nearest(pooled_ND: Tensor, k: int) -> Tensor:
    """Return for each row the k other rows of highest cosine, nearest first, (N, k)."""
    rows_ND = normalize(pooled_ND, dim=1)
    return (rows_ND @ rows_ND.T).fill_diagonal_(-torch.inf).topk(k, dim=1).indices


def _see(model: nn.Module, batches: Sequence[Any], *, answer: bool) -> dict[str, Any]:
    """Return pooled vectors and predicted classes of all images, and patch tokens of the first few, on the CPU."""
    pooled, patches, answers = [], None, []
    with evaluating(model):
        for number, batch in enumerate(batches):
            inputs = batch[0].to(device_of(model))
            found = features(model, inputs)
            pooled.append(found.pooled_BD.float().cpu())
            if number == 0 and found.patches_BND is not None:
                patches = found.patches_BND[:NUM_IMAGES].float().cpu()
            scores = logits(model, inputs) if answer else None
            answers += [] if scores is None else scores.argmax(1).tolist()
    return {"pooled": torch.cat(pooled), "patches": patches, "answers": answers}


def _neighbours(
    theirs_ND: Tensor, mine_ND: Tensor, images: Sequence[Tensor], labels: Sequence[int], origin: Origin
) -> dict[str, Any]:
    """Return queries, from those where the models agree least to most, each with its nearest images in both."""
    num_images = len(images)
    k = min(NUM_NEIGHBOURS, (num_images - 1) // 2)  # of few images nearly all are near, in any model
    if k < 1:
        return {}
    original_NK, smaller_NK = nearest(theirs_ND, k), nearest(mine_ND, k)
    shared_N = (original_NK[:, :, None] == smaller_NK[:, None]).sum((1, 2))
    spaced = torch.linspace(0, num_images - 1, min(NUM_QUERIES, num_images)).round().long()
    queries = [
        {"image": i, "original": original_NK[i].tolist(), "smaller": smaller_NK[i].tolist()}
        for i in shared_N.argsort(stable=True)[spaced].tolist()
    ]
    shown = {i for row in queries for i in (row["image"], *row["original"], *row["smaller"])}
    return {
        "num_images": num_images,
        "overlap": float(shared_N.double().mean()) / k if num_images >= MIN_IMAGES else None,
        "queries": queries,
        "thumbnails": {i: _viewable(images[i], origin) for i in shown},
        "labels": {i: labels[i] for i in shown},
    }


def _patches(theirs: Tensor | None, mine: Tensor | None, images: Sequence[Tensor], origin: Origin) -> dict[str, Any]:
    """Return the first images and both models' patch tokens on them, if these form a square grid."""
    side = 0 if theirs is None else round(theirs.shape[1] ** 0.5)
    height, width = images[0].shape[1:]
    if theirs is None or mine is None or mine.shape != theirs.shape or side**2 != theirs.shape[1] or height != width:
        return {}
    pictures = [_viewable(image, origin) for image in images[: len(theirs)] if image.shape[0] in CHANNELS]
    images_BCHW = torch.stack(pictures) if pictures else None
    return {"images": images_BCHW, "teacher_patches": theirs, "student_patches": mine, "grid": (side, side)}


def _poses(teacher: nn.Module, student: nn.Module, images_BCHW: Tensor, origin: Origin) -> dict[str, Any]:
    """Return the joints that both models see in the images where these are furthest apart, the furthest first."""
    with evaluating(teacher, student):
        theirs, mine = (predict_joints(model, images_BCHW.to(device_of(model))).cpu() for model in (teacher, student))
    apart_B = (theirs - mine)[..., :2].norm(dim=-1).mean(1)
    chosen = apart_B.argsort(descending=True, stable=True)[:NUM_IMAGES].tolist()
    bones = layout_of(theirs.shape[1], origin.name).bones
    shown_BCHW = torch.stack([_viewable(images_BCHW[index], origin) for index in chosen])
    return {"images": shown_BCHW, "before": theirs[chosen], "after": mine[chosen], "bones": bones}


def _frames(teacher: nn.Module, student: nn.Module, batch: Any, origin: Origin) -> dict[str, Any]:
    """Return the sequences in which both models' tokens are furthest apart, and of these the frames where they are."""
    inputs_BCTV, stream = batch[0], origin.preprocessing["skeleton"]
    num_frames, num_joints = inputs_BCTV.shape[2:]
    with evaluating(teacher, student):
        seen = [
            (features(model, there).patches_BND, model(there).argmax(1).tolist())
            for model, there in ((model, inputs_BCTV.to(device_of(model))) for model in (teacher, student))
        ]
    (theirs_BND, before), (mine_BND, after) = seen
    if theirs_BND is None or mine_BND is None or theirs_BND.shape != mine_BND.shape:
        return {}
    apart_BTV = (theirs_BND - mine_BND).float().norm(dim=-1).cpu().unflatten(1, (-1, num_joints))
    if not apart_BTV.any():
        return {}
    step = next(step for step in itertools.count(1) if -(-num_frames // step) <= apart_BTV.shape[1])
    sequences = []
    for index in apart_BTV.mean((1, 2)).argsort(descending=True, stable=True)[:NUM_SEQUENCES].tolist():
        frames_F = apart_BTV[index].mean(1).argsort(descending=True, stable=True)[:NUM_FRAMES].sort().values
        poses_TVC = poses_of_stream(inputs_BCTV[index].cpu(), stream)
        said = {"label": int(batch[1][index]), "before": before[index], "after": after[index]}
        drawn = {"joints": _upright(poses_TVC)[frames_F * step], "apart": apart_BTV[index, frames_F]}
        sequences.append({**said, **drawn, "frames": (frames_F * step).tolist()})
    bones = [(joint, parent) for joint, parent in enumerate(PARENTS) if joint != parent]
    return {"sequences": sequences, "num_frames": num_frames, "bones": bones, "stream": stream}


def _upright(poses_TVC: Tensor) -> Tensor:
    """Return x and y (T, V, 2) in 0..1, from the left and from the top, on one scale for all frames."""
    places_TV2 = poses_TVC[..., :2] * torch.tensor([1.0, -1.0])
    low_2, high_2 = places_TV2.amin((0, 1)), places_TV2.amax((0, 1))
    return (places_TV2 - (low_2 + high_2) / 2) / (high_2 - low_2).max().clamp(min=1e-12) + 0.5


def _viewable(image_CHW: Tensor, origin: Origin) -> Tensor:
    """Return an image as it was before preprocessing, in 0..1 and with three channels."""
    if "mean" in origin.preprocessing:
        mean, std = (torch.tensor(origin.preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
        image_CHW = image_CHW * std + mean
    return image_CHW.clamp(0, 1).expand(3, -1, -1)
