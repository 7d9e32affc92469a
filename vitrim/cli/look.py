"""Commands that look at models: inspect, evaluate, zero-shot, retrieval, methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vitrim.catalog import COLUMNS, method_rows
from vitrim.cli.app import Json, app, hush
from vitrim.cli.console import number, print_json, print_notes, print_table, say
from vitrim.cli.options import BudgetOptions, SourceOptions
from vitrim.errors import BelowLimitError, RecipeError

NO_BUDGET, AS_NAMED = BudgetOptions(), SourceOptions()


@app.command
def inspect(
    model: str,
    *,
    budget: BudgetOptions = NO_BUDGET,
    reading: SourceOptions = AS_NAMED,
    scope: str | None = None,
    activity: str | None = None,
    limit: int = 256,
    as_json: Json = False,
) -> None:
    """Show a model's MLPs, how small it would get, and what pruning its files would need.

    Example: vitrim inspect timm/vit_small_patch14_dinov2.lvd142m --params-ratio 0.5

    Args:
        model: timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME, vitrim/NAME, timm/NAME@FILE, or a model
            folder.
        scope: dotted path of the part to look at.
        activity: images to run, to show how many hidden units of each MLP are active.
        limit: use at most this many images.
    """
    from vitrim.inspection import HEADER
    from vitrim.inspection import inspect as look

    found = look(model, scope=scope, activity=activity, limit=limit, **reading.given(), **budget.given())
    if as_json:
        return print_json(found.to_json())
    say(found.headline)
    say(found.features)
    rows = _grouped([(site.label, site.d_model, site.d_hidden) for site in found.sites])
    print_table(("MLPs", "kind", "model width", "hidden units"), [(count, *key) for key, count in rows.items()])
    print_table(HEADER, found.rows())
    if found.activity:
        header = ("MLP", "not zero", *(f"> {share:.0%} RMS" for share in found.activity[0].above), "never fire")
        shares = [(row.path, row.nonzero, *row.above.values(), row.silent) for row in found.activity]
        print_table(header, [(path, *(f"{s:.1%}" for s in rates), silent) for path, *rates, silent in shares])
    if found.checkpoint is not None:
        at = found.rows()[0][0] if budget.any_given() else "params_ratio 0.5"  # the default of prune-checkpoint
        print_table((f"prune-checkpoint at {at}", ""), found.checkpoint.rows())
    print_notes(found.notes)


@app.command
def evaluate(
    student: str,
    *more: str,
    against: Annotated[tuple[str, ...], Parameter(negative="")],
    data: str,
    reading: SourceOptions = AS_NAMED,
    index: str | None = None,
    old_index: Path | None = None,
    fail_under: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    limit: int | None = None,
    split: str | None = None,
    device: str = "auto",
    exit: int | None = None,
    confidence: float | None = None,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Compare a model with the one it was made from, or several whose scores are added.

    Example: vitrim evaluate small --against timm/vit_base_patch14_dinov2.lvd142m --data photos/

    Args:
        student: the small model.
        more: further small models, such as those of other streams of skeletons; then top-1 of all together is measured.
        against: the model to compare with; of several, once for each, in the order of the small ones.
        data: images to evaluate on; with labels, kNN, linear probe and top-1 are measured too.
        index: labelled images for kNN and the linear probe to learn from; by default 80% of data.
        old_index: a .npy file of vectors that the original made earlier, a row for each image of data in its order
            (more may follow), in which the small model's queries are searched.
        fail_under: NAME=VALUE, may be given several times: exit with code 1 if the small model is below it. Cosines and
            recalls are 0 to 1; top1, knn, linear_probe, pck@0.2 and oks_ap are the small model's less the original's. A
            number alone is a limit on cosine.
        limit: use at most this many images.
        split: the part to use of a data source that has several, by default test, or val if there is none.
        device: auto, cpu, cuda or mps.
        exit: leave a looped model behind this loop, the first is 1.
        confidence: also measure a looped classifier that each image leaves once its class is this probable.
        quiet: show no progress.
    """
    from vitrim.evaluation import HEADER
    from vitrim.evaluation import evaluate as measure
    from vitrim.metrics.limits import parse_limits
    from vitrim.together import evaluate_together as together

    limits = parse_limits(fail_under)
    common: dict[str, Any] = {"limit": limit, "split": split, "device": device, "quiet": hush(quiet or as_json)}
    of_one = {"index": index, "old_index": old_index, "exit": exit, "confidence": confidence, **reading.given()}
    if more or len(against) != 1:
        refused = next((name for name, value in of_one.items() if value is not None), None)
        if refused is not None:
            raise RecipeError(f"{refused}: goes with one model, not with {1 + len(more)} together; leave it out.")
        found = together((student, *more), against, data, **common)
    else:
        found = measure(student, against[0], data, **of_one, **common)
    below = found.below(limits)
    if as_json:
        print_json({**found.to_json(), "below": below})
    else:
        print_table(HEADER, found.rows())
        say(found.judged_on)
        if limits and not below:
            say(f"Limits kept: {', '.join(f'{name} is not below {limit:g}' for name, limit in limits.items())}.")
    if below:
        raise BelowLimitError("; ".join(below))


@app.command
def zero_shot(
    model: str,
    *,
    data: str,
    names: str = "imagenet",
    templates: str = "openai",
    text_from: str | None = None,
    cache: Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Classify images by the names of their classes, with a CLIP model or its pruned image tower.

    Example: vitrim zero-shot small --text-from open_clip/ViT-B-16/laion2b_s34b_b88k --data imagenet/val

    Args:
        model: an image-text pair such as CLIP, or an image tower made from one.
        data: labelled images.
        names: imagenet, or a text file with one class name per line, in the order of the labels.
        templates: openai, simple, or a text file of templates with {} for the class name.
        text_from: the pair whose text tower makes the classifier; by default the model itself.
        cache: folder in which classifiers are kept between runs.
        limit: use at most this many images.
        split: the part to use of a data source that has several, by default test, or val if there is none.
        device: auto, cpu, cuda or mps.
        quiet: show no progress.
    """
    from vitrim.clip.tasks import zero_shot as classify

    found = classify(
        model,
        data,
        names=names,
        templates=templates,
        text_from=text_from,
        cache=cache,
        limit=limit,
        split=split,
        device=device,
        quiet=hush(quiet or as_json),
    )
    if as_json:
        return print_json(found)
    print_table(("zero-shot", "value"), [(name, number(value)) for name, value in found.items()])


@app.command
def retrieval(
    model: str,
    *,
    pairs: str,
    text_from: str | None = None,
    image_folder: Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Search captions by images and images by captions, with a CLIP model or its pruned image tower.

    Example: vitrim retrieval small --text-from open_clip/ViT-B-16/laion2b_s34b_b88k --pairs flickr30k.parquet

    Args:
        model: an image-text pair such as CLIP, or an image tower made from one.
        pairs: images with captions: tar shards, parquet, or JSON in COCO's format.
        text_from: the pair whose text tower embeds the captions; by default the model itself.
        image_folder: folder with the images that a JSON file names.
        limit: use at most this many images.
        split: the part to use of a source that has several, by default test, or val if there is none.
        device: auto, cpu, cuda or mps.
        quiet: show no progress.
    """
    from vitrim.clip.tasks import retrieval as search

    found = search(
        model,
        pairs,
        text_from=text_from,
        image_folder=image_folder,
        limit=limit,
        split=split,
        device=device,
        quiet=hush(quiet or as_json),
    )
    if as_json:
        return print_json(found)
    ways = [way for way in found if isinstance(found[way], dict)]
    print_table(("%", *ways), [(k, *(number(found[way][k]) for way in ways)) for k in found[ways[0]]])


@app.command
def methods(*, as_json: Json = False) -> None:
    """List the methods with their paper, what each needs and what it does.

    Example: vitrim methods --json
    """
    rows = method_rows()
    if as_json:
        return print_json(rows)
    print_table(COLUMNS[:-1], [[row[name] for name in COLUMNS[:-1]] for row in rows])


def _grouped(keys: Sequence[tuple]) -> dict[tuple, int]:
    """Return how often each key occurs, in order of first occurrence."""
    return {key: list(keys).count(key) for key in dict.fromkeys(keys)}
