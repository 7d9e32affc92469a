"""Commands that look at models: inspect, evaluate, zero-shot, retrieval, methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitrim.cli.app import Json, app, console, number, print_json, print_notes, print_table


@app.command
def inspect(
    model: str,
    *,
    scope: str | None = None,
    activity: str | None = None,
    limit: int = 256,
    as_json: Json = False,
) -> None:
    """Show a model's MLPs, how small it would get, and what pruning its files would need.

    Example: vitrim inspect timm/vit_small_patch14_dinov2.lvd142m

    Args:
        model: timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME, timm/NAME@FILE, or a model folder.
        scope: dotted path of the subtree to look at.
        activity: images to run: how many hidden units of each MLP are active.
        limit: at most this many of them.
    """
    from vitrim.inspection import inspect as look

    found = look(model, scope=scope, activity=activity, limit=limit)
    if as_json:
        return print_json(found.to_json())
    total = found.parameters["total"]
    console.print(f"{found.model}: {total:,} parameters, {found.parameters['mlp'] / total:.0%} of them in MLPs")
    rows = _grouped([(site.label, site.d_model, site.d_hidden) for site in found.sites])
    print_table(("MLPs", "kind", "model width", "hidden units"), [(count, *key) for key, count in rows.items()])
    predicted = [(f"{r:g}", f"{n:,}", f"{n / total - 1:+.1%}") for r, n in found.predicted.items()]
    print_table(("MLP ratio", "parameters", "change"), predicted)
    if found.activity:
        header = ("MLP", "not zero", *(f"> {share:.0%} RMS" for share in found.activity[0].above), "never fire")
        shares = [(row.path, row.nonzero, *row.above.values(), row.silent) for row in found.activity]
        print_table(header, [(path, *(f"{s:.1%}" for s in rates), silent) for path, *rates, silent in shares])
    if found.checkpoint is not None:
        print_table(("prune-checkpoint at MLP ratio 1", ""), found.checkpoint.rows())
    print_notes(found.notes)


@app.command
def evaluate(
    student: str,
    *,
    against: str,
    data: str,
    index: str | None = None,
    limit: int | None = None,
    split: str = "test",
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model beside the one it was made from.

    Example: vitrim evaluate small --against timm/vit_base_patch14_dinov2.lvd142m --data photos/

    Args:
        student: the small model.
        against: the model to compare with.
        data: images to judge on; with labels, kNN, linear probe and top-1 are measured, too.
        index: labelled images for kNN and the probe to learn from; without, 80% of data.
        limit: at most this many images.
        split: which part of a data source that has parts.
        device: auto, cpu, cuda, mps.
    """
    from vitrim.evaluation import evaluate as measure

    found = measure(student, against, data, index=index, limit=limit, split=split, device=device)
    if as_json:
        return print_json(found)
    rows = [(name, f"{value:.4g}") for name, value in found["fidelity"].items()]
    print_table(("features against the original", "value"), rows)
    names = [name for name in found["teacher"] if name != "latency"]
    rows = [(n, number(found["teacher"][n]), number(found["student"][n])) for n in names]
    for size in found["teacher"].get("latency", {}):
        times = [found[who]["latency"][size] for who in ("teacher", "student")]
        shown = [f"{t['median_ms']:.2f} ({t['iqr_ms']:.2f})" for t in times]
        rows.append((f"latency batch {size} (ms, IQR)", shown[0], shown[1]))
    print_table(("measure", "original", "small"), rows)


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
    split: str = "test",
    device: str = "auto",
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Classify images by the names of their classes, with a CLIP model or its pruned image tower.

    Example: vitrim zero-shot small --text-from open_clip/ViT-B-16/laion2b_s34b_b88k --data imagenet/val

    Args:
        model: a pair, or an image tower of the same space.
        data: labelled images.
        names: imagenet, or a text file with a name a line, in the order of the labels.
        templates: openai, simple, or a text file of templates with {} for the name.
        text_from: the pair whose text tower makes the classifier; without, the model itself.
        cache: folder that keeps classifiers between runs.
        limit: at most this many images.
        split: which part of a data source that has parts.
        device: auto, cpu, cuda, mps.
        quiet: no progress.
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
        quiet=quiet or as_json,
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
    split: str = "test",
    device: str = "auto",
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Find captions by images and images by captions, with a CLIP model or its pruned image tower.

    Example: vitrim retrieval small --text-from open_clip/ViT-B-16/laion2b_s34b_b88k --pairs flickr30k.parquet

    Args:
        model: a pair, or an image tower of the same space.
        pairs: images with captions: tar shards, parquet, or JSON as COCO has it.
        text_from: the pair whose text tower embeds the captions; without, the model itself.
        image_folder: where the images that a JSON names are.
        limit: at most this many images.
        split: which part of a source that has parts.
        device: auto, cpu, cuda, mps.
        quiet: no progress.
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
        quiet=quiet or as_json,
    )
    if as_json:
        return print_json(found)
    ways = [way for way in found if isinstance(found[way], dict)]
    print_table(("%", *ways), [(k, *(number(found[way][k]) for way in ways)) for k in found[ways[0]]])


@app.command
def methods(*, as_json: Json = False) -> None:
    """List the methods: paper, what each needs, what it does.

    Example: vitrim methods --json
    """
    from vitrim.methods import METHODS

    fields = ("name", "arxiv", "needs", "edit", "summary", "paper")
    rows = [(m.name, m.arxiv, m.needs, m.edits_in_words(), m.summary, m.paper) for m in METHODS.values()]
    if as_json:
        return print_json([dict(zip(fields, row, strict=True)) for row in rows])
    print_table(fields[:-1], [row[:-1] for row in rows])


def _grouped(keys: Sequence[tuple]) -> dict[tuple, int]:
    """How often each key occurs, in order of first sight."""
    return {key: list(keys).count(key) for key in dict.fromkeys(keys)}
