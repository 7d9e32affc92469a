"""How close a cut student is, on images that were held out and on some of those that its repair was fitted on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrim.calibrate import num_held_out
from vitrim.compression.cut import CutReport
from vitrim.compression.dtypes import check_result, is_float32, too_large, typed_copy
from vitrim.compression.job import Job, Models
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import Split
from vitrim.evaluation import own_top1
from vitrim.metrics.fidelity import block_fidelity, compare, fidelity, too_few
from vitrim.metrics.record import Closeness
from vitrim.progress import Progress, progress
from vitrim.repair.learning import Learning, learning_curve
from vitrim.surgery import Plan

# So many calibration images choose between cuts, where they are no more than a quarter.
CHOOSING = 64

# So many fitted images are judged on even where they are more than a tenth.
FEW = 16

# Relative error above which a result is of little use, whatever it is for.
FAR = 0.5


def judge(models: Models, job: Job, plan: Plan, context: RunContext) -> tuple[Closeness | None, str | None]:
    """Measure how close the student, as it is returned, is on held-out images, overall and for each block.

    Returns:
        The closeness, None without images; and why the result has to be in float32, None where the original's types
        can hold it.

    Raises:
        ModelError: a tensor of the student is not finite.
    """
    check_result(job.encoder, models.student)
    why = too_large(job.encoder, models.student)
    with progress("judge", 0, quiet=context.quiet) as bar:
        if why is None:
            found = _closeness(models, typed_copy(job.encoder, models.student), plan, job.recipe, bar)
            if found is None or math.isfinite(found.relative_error) or is_float32(job.encoder):
                return found, None
            why = "features overflow in the original's type, so the result is in float32; load it in that or bfloat16."
        return _closeness(models, models.student, plan, job.recipe, bar), why


def _closeness(models: Models, student: nn.Module, plan: Plan, recipe: Recipe, bar: Progress) -> Closeness | None:
    if models.split is None or not models.split.held_out:
        return None
    fitted, held_out = fitted_images(models.split, recipe), models.split.held_out
    found, outputs, _ = compare(student, models.teacher, bar.track(held_out, "held-out batches"))
    every = {site.block: plan.new_path(site.block) for site in models.sites}
    left = {block: new for block, new in every.items() if new is not None}
    batches = bar.track(held_out, "held-out batches, block by block")
    rows = block_fidelity(student, models.teacher, batches, list(left), new_names=left)
    own = own_top1(student, outputs)
    seen = fidelity(student, models.teacher, bar.track(fitted, "fitted batches")) if fitted else {}
    own_fit = {key: seen[key] for key in ("relative_error", "num_images") if seen}
    return Closeness(fidelity=found, blocks=rows, top1=own, num_labelled=outputs.num_labelled, fitted=own_fit)


def fitted_images(split: Split, recipe: Recipe) -> list[Tensor]:
    """Return some of the images that repair was fitted on, without their views: no more than are held out.

    Of many they are a tenth at most, so that judging on them stays cheap beside fitting; without repair, none.
    """
    if not any(step.repair_options() for step in recipe.steps):
        return []
    batches, num_views = split.calibration, split.counts.get("views", 1)
    fitted = torch.cat([batch[: len(batch) // num_views] for batch in batches[: len(batches) - num_held_out(batches)]])
    most = min(split.counts["held_out"], max(FEW, len(fitted) // 10))
    return list(fitted[:most].split(len(batches[0])))


def with_enough_to_choose(split: Split) -> Split:
    """Return a split in which enough calibration images are in no fit to choose between cuts by them.

    Where there are fewer than `CHOOSING`, batches are made anew, none larger than before; a quarter of the images at
    most stays out of fits.
    """
    num_views, batches = split.counts.get("views", 1), split.calibration
    views = [torch.cat([_view(batch, num_views, number) for batch in batches]) for number in range(num_views)]
    num_images, size = len(views[0]), max(map(len, batches)) // num_views
    wanted = min(CHOOSING, num_images // 4)
    if sum(map(len, choosing_images(split))) >= wanted:
        return split
    num_judging = -(-wanted // size)
    num_fit = max(-(-(num_images - wanted) // size), 9 * num_judging if num_judging > 1 else 1)
    fit, judging = torch.arange(num_images).split([num_images - wanted, wanted])
    parts = (*fit.tensor_split(min(num_fit, len(fit))), *judging.tensor_split(num_judging))
    return replace(split, calibration=[torch.cat([view[part] for view in views]) for part in parts])


def _view(batch: Tensor, num_views: int, number: int) -> Tensor:
    """Return one view of each image of a batch that holds several of them."""
    count = len(batch) // num_views
    return batch[number * count : (number + 1) * count]


def choosing_images(split: Split) -> list[Tensor]:
    """Return the calibration images that are in no fit, without their views."""
    batches, num_views = split.calibration, split.counts.get("views", 1)
    return [batch[: len(batch) // num_views] for batch in batches[-max(1, num_held_out(batches)) :]]


def learn(models: Models, cut: CutReport) -> Learning | None:
    """Return what half of the calibration images gave beside all, None where no MLP was fitted on both."""
    if models.split is None:
        return None
    batches, num_views = models.split.calibration, models.split.counts.get("views", 1)
    return learning_curve(cut.errors, batches, num_held_out=num_held_out(batches), num_views=num_views)


def judging_notes(
    after_cut: Closeness | None, after_recovery: Closeness | None, learning: Learning | None, *, with_labels: bool
) -> tuple[str, ...]:
    """Return what has to be known beside the errors: too few images, what more of them would do, a useless result.

    What was trained with labels is free to be far from the original.
    """
    judged = after_recovery or after_cut
    said = () if judged is None else too_few(judged.num_images)
    if judged is not None and not with_labels:
        said = (*said, *_far(judged, trained=after_recovery is not None))
    return said if learning is None or learning.note is None else (*said, learning.note)


def _far(judged: Closeness, *, trained: bool) -> tuple[str, ...]:
    """Return a warning where a student's features have little to do with the teacher's."""
    error = judged.fidelity["relative_error"]
    if error <= FAR:
        return ()
    then = "train it longer" if trained else "train it (recover, --recover-epochs)"
    return (
        f"far from the original: relative error {error:.2f} on {judged.num_images:,} held-out images, where a constant "
        f"token has 1; keep more, or {then}.",
    )
