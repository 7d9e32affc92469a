"""Measures how close a student's features are to its teacher's: relative error, cosine, agreement, retrieval.

No labels are needed. Sums are streamed in float64 with running means, so any number of images fits in memory
and a large common offset of the features costs no digits. Nothing here trains or changes a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from vitrim.errors import DataError, ModelError
from vitrim.metrics.outputs import Outputs, images_and_labels
from vitrim.models.features import (
    evaluating,
    features,
    inputs_for,
    kept_positions,
    logits,
    num_classes,
    same_patches,
)
from vitrim.tokens import Features
from vitrim.types import FeaturesAt

# Of fewer images, shares such as recall and agreement say nothing, so they are not given.
MIN_IMAGES = 50

# Similarities held at a time, in numbers: 64 million take 256 MB in float32.
CHUNK_NUMBERS = 64_000_000


class TokenComparison:
    """Running relative error and mean cosine of a student's tokens S against a teacher's tokens T.

    Relative error is ||S - T||^2 / ||T - mean(T)||^2: 0 is identical, 1 is predicting the mean. The spread
    around the mean is merged from batch to batch (Chan's update), not taken as a difference of large sums.
    Tokens of several widths (CLIP's projected pooled vector and its patches) each have their own mean, and so have
    those of several layers.
    """

    def __init__(self):
        self.num_tokens = 0
        self._error = 0.0
        self._spread = 0.0
        self._cosine = 0.0
        self._means: dict[tuple[int, int], tuple[int, Tensor]] = {}  # by layer and width: how many tokens, their mean

    def update(self, student: Tensor, teacher: Tensor, *, layer: int = 0) -> None:
        """Add tokens; both tensors have the same shape, with the feature width last."""
        teacher_ND = _float64(teacher.flatten(0, -2))
        student_ND = _float64(student.flatten(0, -2)).to(teacher_ND.device)
        count, mean_D = len(teacher_ND), teacher_ND.mean(0)
        kind = (layer, teacher_ND.shape[-1])
        before, old_mean_D = self._means.get(kind, (0, torch.zeros_like(mean_D)))
        shift_D, total = mean_D - old_mean_D, before + count
        self._error += float((student_ND - teacher_ND).square().sum())
        self._cosine += float(cosine_similarity(student_ND, teacher_ND, dim=-1).sum())
        self._spread += float((teacher_ND - mean_D).square().sum())
        self._spread += float(shift_D.square().sum()) * before * count / total
        self._means[kind] = (total, mean_D - shift_D * (before / total))
        self.num_tokens += count

    @property
    def relative_error(self) -> float:
        """Relative error so far; infinite if the teacher is constant and the student differs from it."""
        if self._spread == 0:
            return 0.0 if self._error == 0 else float("inf")
        return self._error / self._spread

    @property
    def cosine(self) -> float:
        """Mean cosine so far."""
        return self._cosine / self.num_tokens


def fidelity(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    at: FeaturesAt = "final",
    outputs: tuple[Outputs, Outputs] | None = None,
) -> dict[str, float]:
    """Compare the features of two models on the same images.

    Args:
        student: the model to judge.
        teacher: the reference, with the same feature width.
        batches: tensors (B, C, H, W), or tuples that start with one (such as `Batch`).
        at: features behind ("final") or in front of ("pre_norm") the final norm.
        outputs: get the outputs of the student and of the teacher, for further measures.

    Returns:
        `relative_error` and `cosine` of all tokens together (patches, and the pooled vector where it is a
        token of its own), `pooled_relative_error`, `pooled_cosine`; with patch tokens
        `patches_relative_error`, `patches_cosine`, and of further layers `maps_relative_error`, `maps_cosine`, which
        count in `relative_error`, too; `top1_agreement` (0..1) if both have a head with as many
        classes; `num_images`.

    Raises:
        DataError: there was no image.
        ModelError: the features of the two have different shapes.
    """
    compared: dict[str, TokenComparison] = {}
    num_images, num_agreed = 0, 0
    has_heads = 0 < num_classes(teacher) == num_classes(student)
    with evaluating(student, teacher):
        for images, labels in images_and_labels(batches):
            pairs = [(model, inputs_for(model, images)) for model in (student, teacher)]
            found = [features(model, moved, at=at) for model, moved in pairs]
            found[1] = same_patches(found[1], found[0])
            mine, theirs = map(kinds, found)
            _check_shapes(*({kind: [t for _, t in own] for kind, own in side.items()} for side in (mine, theirs)))
            for kind in theirs:
                for (layer, one), (_, other) in zip(mine[kind], theirs[kind], strict=True):
                    compared.setdefault(kind, TokenComparison()).update(one, other, layer=layer)
            num_images += len(images)
            scores = [logits(*pair) if has_heads or outputs else None for pair in pairs]
            num_agreed += _count_agreed(*scores) if has_heads else 0
            for gathered, own, scored in zip(outputs or (), found, scores, strict=False):
                gathered.add(own.pooled_BD, scored, labels)
    if not num_images:
        raise DataError("fidelity: no images to compare on; pass at least one batch.")
    result = {f"{kind}relative_error": tokens.relative_error for kind, tokens in compared.items()}
    result |= {f"{kind}cosine": tokens.cosine for kind, tokens in compared.items()}
    result |= {"top1_agreement": num_agreed / num_images} if has_heads else {}
    return {**result, "num_images": num_images}


def compare(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Any]
) -> tuple[dict[str, float], Outputs, Outputs]:
    """Return fidelity and retrieval (the student's queries in the teacher's index), and both models' outputs.

    Of fewer than MIN_IMAGES images there is no recall and no agreement.
    """
    mine, theirs = Outputs(), Outputs()
    found = fidelity(student, teacher, batches, outputs=(mine, theirs))
    if len(mine) >= MIN_IMAGES:
        return {**found, **retrieval_recall(mine.pooled_ND, theirs.pooled_ND)}, mine, theirs
    return {name: value for name, value in found.items() if name != "top1_agreement"}, mine, theirs


def too_few(num_images: int) -> tuple[str, ...]:
    """Return a warning where so few images judged a model that there is no recall and no agreement."""
    if num_images >= MIN_IMAGES:
        return ()
    said = f"judged on {num_images} images: too few for recall and agreement, which are not given, and for more than a "
    return (
        said + f"hint of the error. {MIN_IMAGES} are needed; compress holds out a tenth, so give it {10 * MIN_IMAGES}.",
    )


def block_fidelity(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    block_names: Sequence[str],
    *,
    new_names: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Compare each block's output, to see where along the depth the two models part.

    The outputs of all named blocks are held for one batch, from both models: keep batches small.

    Args:
        student: the model to judge.
        teacher: the reference.
        batches: tensors (B, C, H, W), or tuples that start with one (such as `Batch`).
        block_names: dotted paths of modules that return a tensor, or a tuple that starts with one; the
            feature width is the last dimension. Of a module that runs several times, the last run counts.
        new_names: the student's names of blocks that it calls otherwise than the teacher does.

    Returns:
        One dict for each name, in the given order: `block`, `relative_error`, `cosine`.

    Raises:
        DataError: there was no image.
        ModelError: a block is missing, did not run, or its outputs differ in shape.
    """
    compared, new_names = {name: TokenComparison() for name in block_names}, new_names or {}
    own_names = {new_names.get(name, name): name for name in block_names}
    kept = _kept_tokens(student, teacher, own_names)
    with evaluating(student, teacher), ExitStack() as hooks:
        caught, theirs = _catch_outputs(student, list(own_names), hooks), _catch_outputs(teacher, block_names, hooks)
        for images, _ in images_and_labels(batches):
            for model in (student, teacher):
                features(model, inputs_for(model, images))
            mine = {own_names[name]: caught.pop(name) for name in list(caught)}
            for name, index in kept.items():
                if name in theirs:
                    mine[name], theirs[name] = mine[name][:, : len(index)], theirs[name][:, index]  # merged ones follow
            _check_shapes(*({name: [tensor] for name, tensor in side.items()} for side in (mine, theirs)))
            for name in block_names:
                if name not in mine:
                    raise ModelError(f"{name}: did not run in the forward pass; name a block that does.")
                compared[name].update(mine.pop(name), theirs.pop(name))
    if not all(tokens.num_tokens for tokens in compared.values()):
        raise DataError("block_fidelity: no images to compare on; pass at least one batch.")
    return [
        {"block": name, "relative_error": tokens.relative_error, "cosine": tokens.cosine}
        for name, tokens in compared.items()
    ]


def retrieval_recall(
    student_BD: Tensor, teacher_BD: Tensor, ks: Sequence[int] = (1, 5, 10), *, chunk_size: int = 1024
) -> dict[str, float]:
    """Search an index built by the teacher with the student's queries; row i should find row i, by cosine.

    An index may have more rows than there are queries: they are of other images.

    Rows that tie count as in a random order of the tie, so features that collapsed to one point get the
    recall of guessing.

    Args:
        student_BD: one query per image.
        teacher_BD: one entry per image, in the same order, and any number of others behind them.
        ks: how many results to look at.
        chunk_size: queries compared at a time, fewer where the index is large.

    Returns:
        `recall@k` in 0..1 for each k.

    Raises:
        DataError: the widths differ, there is no row, or fewer than there are queries.
    """
    if student_BD.shape[1:] != teacher_BD.shape[1:] or not 0 < len(student_BD) <= len(teacher_BD):
        shapes = f"{tuple(student_BD.shape)} and {tuple(teacher_BD.shape)}"
        raise DataError(f"retrieval: got features of shapes {shapes}; pass the same images to both models.")
    index_BD = normalize(teacher_BD.float(), dim=1)
    chunk_size = max(1, min(chunk_size, CHUNK_NUMBERS // len(index_BD)))
    hits = dict.fromkeys(ks, 0.0)
    for start in range(0, len(student_BD), chunk_size):
        queries_QD = normalize(student_BD[start : start + chunk_size].float().to(index_BD.device), dim=1)
        similar_QB = queries_QD @ index_BD.T
        own_Q1 = similar_QB.diagonal(start)[:, None]
        num_better_Q = (similar_QB > own_Q1).sum(1)
        num_tied_Q = (similar_QB == own_Q1).sum(1)  # itself included
        for k in ks:
            hits[k] += float(((k - num_better_Q) / num_tied_Q).clamp(0, 1).sum())
    return {f"recall@{k}": hits[k] / len(student_BD) for k in ks}


def kinds(found: Features, *, pooled: bool | None = None) -> dict[str, list[tuple[int, Tensor]]]:
    """Return tokens (B, tokens, D), each with the number of its layer, by the prefix of their results.

    Args:
        found: the features.
        pooled: whether the pooled vector is one of all tokens; None if it is the model's own, and no mean of others.
    """
    pooled = bool(found.num_prefix) or found.patches_BND is None if pooled is None else pooled
    parts = {"pooled_": [(0, found.pooled_BD[:, None])]}
    if found.patches_BND is not None:
        parts["patches_"] = [(0, found.patches_BND)]
    if found.maps:
        parts["maps_"] = list(enumerate(found.maps, 1))
    every = [part for kind, own in parts.items() if pooled or kind != "pooled_" for part in own]
    return {"": every, **parts}


def _kept_tokens(student: nn.Module, teacher: nn.Module, names: Mapping[str, str]) -> dict[str, list[int]]:
    """Return by the teacher's name of a block which of its tokens the student's block has, where these are not all."""
    mine, theirs = kept_positions(student), kept_positions(teacher)
    found, latest = {}, None
    for own, name in names.items():
        latest = mine.get(own, latest)
        if latest is not None and latest != theirs.get(name):
            found[name] = list(latest)
    return found


def _check_shapes(mine: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]) -> None:
    got, want = ({name: [tuple(t.shape) for t in found] for name, found in side.items()} for side in (mine, theirs))
    if got != want:
        raise ModelError(f"the student gives {got}, the teacher {want}; compare models of one width and size.")


def _count_agreed(student_BC: Tensor | None, teacher_BC: Tensor | None) -> int:
    if student_BC is None or teacher_BC is None:
        raise ModelError("a model counts classes and returns no scores; set num_classes to 0 to skip them.")
    return int((student_BC.argmax(1).to(teacher_BC.device) == teacher_BC.argmax(1)).sum())


def _catch_outputs(model: nn.Module, block_names: Sequence[str], hooks: ExitStack) -> dict[str, Tensor]:
    """Return a dict that each forward pass fills with the blocks' outputs, for as long as `hooks` is open."""
    caught: dict[str, Tensor] = {}

    def hook_for(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            caught[name] = output[0] if isinstance(output, tuple | list) else output

        return hook

    for name in block_names:
        try:
            block = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"{type(model).__name__}: no block {name!r}; see model.named_modules().") from None
        hooks.callback(block.register_forward_hook(hook_for(name)).remove)
    return caught


def _float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none (Apple's MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
