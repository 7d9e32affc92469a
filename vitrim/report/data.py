"""Plain values that a report shows; they need no model and no file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Values that a report shows; the page leaves out those that are empty or None.

    Attributes:
        model: name of the model.
        method: name of the method.
        command: the command line that made the smaller model.
        summary: row name to {"before", "after_cut", "after"}; a value may be None. The headline and the size
            bars read the rows "parameters", "MACs per image", "relative error" and "cosine CLS".
        sites: one {"path", "kind", "width_before", "width_after"} for each cut MLP.
        edits: one {"edit", "where", "what"} for each edit of another kind.
        block_errors: one {"block", "after_cut", "after"} for each block, relative squared errors.
        residual_curves: site path to {"residual", "num_units", "cut"}; an optional "picks" says after how
            many picks each fraction of "residual" holds (without it they are even from 0 to num_units).
        recovery: {"step", "relative_error"} and {"step", "loss"} points.
        latency: "before" and "after", each from batch size to milliseconds; without sizes whose times were noisy.
        relative_latency: name of the row to the small model's latency as a share of the original's, "noisy" or not.
        images: pictures in 0..1, (B, 3, H, W), up to 8.
        teacher_patches: patch tokens of the original for these images, (B, N, D).
        student_patches: patch tokens of the smaller model, (B, N, D).
        grid: rows and columns of patches.
        neighbours: empty, or "num_images" that were searched, "overlap" (0..1, the share of nearest images that both
            models have in common, over all of them; None of too few images), "queries" (one {"image", "original",
            "smaller"}: an image's number, and the numbers of those nearest to it), and by number "thumbnails" (3, H, W)
            and "labels".
        poses: empty, or of a pose model "images" (B, 3, H, W) in 0..1, their joints (B, K, 3) "before" and "after" in
            pixels, and the "bones" that join them.
        frames: empty, or of a model of skeletons the "bones", the number of frames ("num_frames"), the "stream", and
            "sequences": of each its "label" (-1 if unknown), both models' answers "before" and "after", and of some of
            its "frames" (numbers) the places of "joints" (F, V, 2) in 0..1 and how far their features are "apart"
            (F, V).
        answers: empty, or class numbers of held-out images: their "labels", and each model's answers "before" and
            "after".
        recipe_yaml: the recipe as text.
        environment: library and machine names to versions.
        recovered: whether there was training after the cut.
        notes: sentences for the reader.
        num_images: how many images the quality is on; 0 where it was not measured.
        judged_on: the same with what the images were, in a sentence.
    """

    model: str
    method: str
    command: str
    summary: dict[str, dict[str, float | None]]
    sites: list[dict[str, Any]]
    edits: list[dict[str, str]]
    block_errors: list[dict[str, Any]]
    residual_curves: dict[str, dict[str, Any]]
    recovery: list[dict[str, float]]
    latency: dict[str, dict[int, float]]
    relative_latency: dict[str, str]
    images: Tensor | None
    teacher_patches: Tensor | None
    student_patches: Tensor | None
    grid: tuple[int, int] | None
    neighbours: dict[str, Any]
    answers: dict[str, list[int]]
    recipe_yaml: str
    environment: dict[str, str]
    recovered: bool
    notes: list[str]
    num_images: int
    judged_on: str
    poses: dict[str, Any] = field(default_factory=dict)
    frames: dict[str, Any] = field(default_factory=dict)
