"""Runs the tasks of a CLIP-like pair from names and folders: zero-shot classification, retrieval, text tuning.

The image tower may be of one model and the text tower of another: a pruned image tower with the original text tower,
for example. Scores are in percent.

Example:
    >>> import torch, vitrim
    >>> from PIL import Image
    >>> from transformers import CLIPConfig, CLIPModel
    >>> shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    >>> vision = shape | {"image_size": 32, "patch_size": 16}
    >>> text = shape | {"vocab_size": 128, "max_position_embeddings": 8} | {"bos_token_id": 126, "eos_token_id": 127}
    >>> pair = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    >>> def tokenize(texts):
    ...     return torch.tensor([[*map(ord, text.ljust(7)[:7]), 127] for text in texts])
    >>> names = ["red", "blue", "green", "white"]
    >>> photos = [Image.new("RGB", (32, 32), name) for name in names]
    >>> labelled, captioned = list(zip(photos, range(4))), list(zip(photos, names))
    >>> vitrim.zero_shot(pair, labelled, names=names, tokenizer=tokenize, quiet=True)["num_images"]
    4
    >>> vitrim.retrieval(pair, captioned, tokenizer=tokenize, quiet=True)["image_to_text"]["recall@5"]
    100.0
    >>> options = {"steps": 2, "batch_size": 2}
    >>> tuned = vitrim.tune_text(pair, captioned, held_out=captioned, options=options, tokenizer=tokenize, quiet=True)
    >>> tuned.out is None
    True
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vitrim.clip.embedded_pairs import EmbeddedPairs, embed_pairs
from vitrim.clip.text_tower import TextOptions, TextTuning, tune_text_
from vitrim.config.run_context import RunContext
from vitrim.cost.count import num_parameters
from vitrim.data import PairSet, open_pairs, transform_for
from vitrim.data.inputs import open_set, random_inputs
from vitrim.data.match import match_names
from vitrim.distributed.devices import resolve_device
from vitrim.distributed.processes import entered_on_main, join_, on_main
from vitrim.errors import OutputError, RecipeError
from vitrim.metrics.record import Metrics, ModelCost
from vitrim.metrics.retrieval import embed_captioned, image_text_recall
from vitrim.metrics.zero_shot import (
    Template,
    build_classifier,
    check_widths,
    embed_all,
    names_of,
    prompts_for,
    zero_shot_top,
)
from vitrim.models.given import named_tensors
from vitrim.models.live import as_it_is
from vitrim.models.load import load_model
from vitrim.models.origin import Origin
from vitrim.models.remote_code import has_remote_code
from vitrim.models.stock import loads_with
from vitrim.models.towers import Pair, Tokenize, open_pair
from vitrim.output.card import write_card
from vitrim.output.load import Model, is_output, load, open_model, read_about
from vitrim.output.provenance import environment
from vitrim.output.result import Result
from vitrim.output.save import save_checked
from vitrim.output.stage import check_place, staged_output
from vitrim.stopping import stoppable
from vitrim.storage.documents import write_json
from vitrim.surgery import Plan
from vitrim.torch_state import own_torch_state

# A tenth of the pairs, at most this many, is held out to judge on.
MAX_HELD_OUT = 2048
# Texts whose vectors are compared when an output is loaded back.
PROBES = ("a photo of a cat.", "two dogs on a beach", "")


@own_torch_state()
def zero_shot(
    model: Model,
    data: Any,
    *,
    names: str | Path | Sequence[str],
    templates: str | Path | Sequence[Template] = "openai",
    text_from: Model | None = None,
    tokenizer: Tokenize | None = None,
    cache: str | Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, float]:
    """Classify images by the names of their classes, without training.

    Args:
        model: a pair, or an image tower of the same space; a module, a name, or a folder.
        data: labelled images, of any kind that `compress` takes.
        names: `imagenet`, a text file with a name a line, or names, in the order of the labels.
        templates: `openai` (80) or `simple` (7), as open_clip has them, a text file, or strings with `{}` for the name.
        text_from: the pair whose text tower makes the classifier; without, the model itself.
        tokenizer: from strings to token ids (B, N), for a pair that is passed as a module.
        cache: folder that keeps classifiers between runs.
        limit: at most this many images.
        split: which part of a data source that has parts; by default "test", or "val" if there is none.
        batch_size: images a forward pass.
        device: `auto`, or a torch device.
        quiet: show no progress.

    Returns:
        `top1` and `top5` in percent, `num_images` with a label, `num_skipped`.

    Raises:
        ModelError: there is no text tower or no tokenizer, or the towers don't fit each other.
        DataError: the images can't be read, or their labels don't fit the names.
    """
    whole, origin, pair = _open(model, text_from, tokenizer, device)
    classes_CE = build_classifier(pair, prompts_for(names, templates), cache=cache, quiet=quiet)
    images = match_names(open_set(data, origin, split=split, limit=limit, default="test"), names_of(names))
    found = zero_shot_top(whole, pair, classes_CE, images.loader(batch_size=batch_size))
    images.tell()
    return {name: 100 * value if name.startswith("top") else value for name, value in found.items()}


@own_torch_state()
def retrieval(
    model: Model,
    pairs: Any,
    *,
    text_from: Model | None = None,
    tokenizer: Tokenize | None = None,
    ks: Sequence[int] = (1, 5, 10),
    limit: int | None = None,
    split: str | None = None,
    image_folder: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Find captions by images and images by captions.

    Args:
        model: a pair, or an image tower of the same space; a module, a name, or a folder.
        pairs: images with captions, one or several each: whatever `vitrim.data.open_pairs` takes.
        text_from: the pair whose text tower embeds the captions; without, the model itself.
        tokenizer: from strings to token ids (B, N), for a pair that is passed as a module.
        ks: how many results to look at.
        limit: at most this many images, the first ones.
        split: which part of a source that has parts; by default "test", or "val" if there is none.
        image_folder: where the images that a `.json` names are.
        batch_size: images a forward pass.
        num_workers: processes that decode images.
        device: `auto`, or a torch device.
        quiet: show no progress.

    Returns:
        `image_to_text` and `text_to_image` with `recall@k` in percent, `num_images`, `num_captions`, `num_skipped`.

    Raises:
        ModelError: there is no text tower or no tokenizer, or the towers don't fit each other.
        DataError: the pairs can't be read.
    """
    whole, origin, pair = _open(model, text_from, tokenizer, device)
    source = _open_pairs(pairs, origin, split=split, limit=limit, image_folder=image_folder, default="test")
    images_NE, captions, _, num_skipped = embed_captioned(whole, source.batches(batch_size, num_workers=num_workers))
    texts_ME = embed_all(pair, pair.tokenize([text for texts in captions for text in texts]), quiet=quiet)
    check_widths(images_NE, texts_ME)
    image_of_M = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    moved = (tensor.to(pair.device) for tensor in (images_NE, texts_ME, image_of_M))
    found = image_text_recall(*moved, ks=ks)
    counts = {"num_images": len(images_NE), "num_captions": len(texts_ME), "num_skipped": num_skipped}
    return {way: {k: 100 * share for k, share in shares.items()} for way, shares in found.items()} | counts


@own_torch_state()
@stoppable()
def tune_text(
    model: Model,
    pairs: Any,
    *,
    options: TextOptions | Mapping[str, Any] | None = None,
    held_out: Any = None,
    out: str | Path | None = None,
    tokenizer: Tokenize | None = None,
    limit: int | None = None,
    split: str | None = None,
    image_folder: str | Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Result:
    """Tune the text tower of a pair to its image tower, which may have been cut, and write the pair to a new folder.

    Args:
        model: a pair: a folder that vitrim or its library wrote, a name, or a module (left unchanged).
        pairs: images with captions: whatever `vitrim.data.open_pairs` takes.
        options: length, batch, rate and the rest; without, one epoch.
        held_out: pairs that judge which state is best; without, a seeded tenth of the images.
        out: folder to write; it must not exist, unless `overwrite`. Its layout and widths are those of `model`.
        tokenizer: from strings to token ids (B, N), for a pair that is passed as a module.
        limit: at most this many images, the first ones.
        split: which part of a source that has parts; by default "train".
        image_folder: where the images that a `.json` names are.
        batch_size: images a forward pass; `options` say how many captions a step compares.
        num_workers: processes that decode images.
        seed: makes two runs equal.
        device: `auto`, or a torch device.
        resume: continue a run into `out` that was stopped.
        overwrite: replace an output of vitrim at `out`, at the end; without `resume`, delete a stopped run's state.
        quiet: show no progress.

    Returns:
        The tuned pair on the CPU, the curve of held-out losses and what was kept, and the folder.

    Raises:
        VitrimError: the input is wrong; nothing is written.
    """
    started, chosen = time.monotonic(), _options(options)
    context = RunContext(resume=resume, quiet=quiet, device=device, seed=seed)
    join_(device)
    place = None if out is None else Path(out)
    if place is not None:
        on_main(check_place, place, resume=resume, overwrite=overwrite)
    whole, origin, plan = _open_to_write(model, out)
    types = {name: tensor.dtype for name, tensor in named_tensors(whole)}
    whole.to(resolve_device(device)).float()  # bf16 is too coarse to tune
    pair = open_pair(whole, origin, tokenizer=tokenizer)
    open_source = partial(_open_pairs, origin=origin, split=split, image_folder=image_folder, default="train")
    embed = partial(embed_pairs, pair, batch_size=batch_size, num_workers=num_workers)
    stage: Any = nullcontext((None, None))
    if place is not None:
        stage = entered_on_main(staged_output(place, resume=resume, overwrite=overwrite))
    with stage as (folder, work):
        train = embed(open_source(pairs, limit=limit))
        if held_out is None:
            train, judged = train.split(min(MAX_HELD_OUT, max(1, len(train) // 10)), seed)
        else:
            judged = embed(open_source(held_out, limit=None))
        tuned = tune_text_(pair, train, held_out=judged, options=chosen, context=replace(context, work=work))
        whole.cpu()
        for name, tensor in named_tensors(whole):
            tensor.data = tensor.data.to(types[name])
        metrics = _metrics(pair, plan, tuned, chosen, {"train": train, "held_out": judged})
        metrics = replace(metrics, seconds=round(time.monotonic() - started, 1))
        if folder is not None:
            metrics = on_main(_write, folder, pair, plan, metrics, place)
    return Result(model=whole, plan=plan, metrics=metrics, out=place)


def _metrics(
    pair: Pair, plan: Plan, tuned: TextTuning, options: TextOptions, pairs: Mapping[str, EmbeddedPairs]
) -> Metrics:
    """Put together what was measured; tuning changes no size."""
    size = ModelCost(parameters=num_parameters(pair.model))
    counts = {name: len(found) for name, found in pairs.items()}
    return Metrics(
        model=pair.origin.name,
        method=plan.method,
        encoder=pair.origin.encoder,
        before=size,
        after=size,
        images={**counts, "skipped": sum(found.num_skipped for found in pairs.values())},
        text_tuning={**tuned.__dict__, "options": options.model_dump(mode="json")},
        notes=tuple(tuned.notes),
        environment=environment(),
        **plan.describe(),
    )


def _open(
    model: Model, text_from: Model | None, tokenizer: Tokenize | None, device: str
) -> tuple[nn.Module, Origin, Pair]:
    """Open the model that embeds images, its origin, and the pair that embeds texts, on a device."""
    whole, origin = open_model(model)
    pair = open_pair(*(open_model(text_from) if text_from is not None else (whole, origin)), tokenizer=tokenizer)
    for each in (whole, pair.model):
        each.to(resolve_device(device))
    return whole, origin, pair


def _open_pairs(
    source: Any,
    origin: Origin,
    *,
    split: str | None,
    limit: int | None,
    image_folder: str | Path | None,
    default: str,
) -> PairSet:
    """Open images with captions, with a model's own preprocessing."""
    transform = transform_for(origin.preprocessing) if "mean" in origin.preprocessing else None
    return open_pairs(source, transform=transform, split=split, limit=limit, image_folder=image_folder, default=default)


def _open_to_write(model: Model, out: Any) -> tuple[nn.Module, Origin, Plan]:
    """Open a model that may be changed: the model, the origin of its uncut form, and the plan of its cuts."""
    if isinstance(model, str) and is_output(path := model.removeprefix("local-dir:")):
        about = read_about(Path(path))
        return open_model(model)[0], Origin.from_json(about["origin"]).placed_at(path), Plan.from_json(about["plan"])
    whole, origin = open_model(model)
    origin = as_it_is(whole, origin) if isinstance(model, nn.Module) else origin
    if out is not None and origin.library is None:
        why = origin.notes[-1] if origin.notes else "no library can build this module"
        raise RecipeError(f"{origin.name}: {why.rstrip('.')}; pass its name or folder, or drop out.")
    return copy.deepcopy(whole) if whole is model else whole, origin, Plan(edits=(), method="text_tower")


def _options(given: TextOptions | Mapping[str, Any] | None) -> TextOptions:
    """Check options; without any, tune for one epoch."""
    if isinstance(given, TextOptions):
        return given
    try:
        return TextOptions.model_validate({"epochs": 1} if given is None else dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"text tuning: {where}: {first['msg']} (got {first['input']!r:.80})") from None


def _write(folder: Path, pair: Pair, plan: Plan, metrics: Metrics, out: Path) -> Metrics:
    """Write a pair and load it back: the image tower in a fresh process, the text tower with whatever loads the folder.

    Returns:
        The finished metrics, as they stand in metrics.json.

    Raises:
        OutputError: what is loaded differs from what was written.
    """
    origin, whole = pair.origin, pair.model
    with_code = has_remote_code(Path(origin.folder or ""))
    inputs = random_inputs(origin, 4)
    saved = save_checked(folder, whole, origin=origin, plan=plan, inputs=inputs, remote_code=with_code)
    if saved.origin.library is not None:
        again = replace(pair, model=load_model(str(folder))[0] if saved.stock else load(folder))
        ids = pair.tokenize(PROBES)
        difference = float((embed_all(again, ids) - embed_all(pair, ids)).abs().max())
        if not difference <= 1e-5:
            raise OutputError(
                f"{folder}: written, but its text tower does not load back (outputs differ by {difference:.3g})."
            )
    metrics = replace(
        metrics,
        stock=saved.stock,
        remote_code=saved.remote_code,
        loads_with=loads_with(saved.origin, out, stock=saved.stock, remote_code=saved.remote_code),
        reload_difference=saved.difference,
        notes=(*metrics.notes, *saved.notes),
    )
    write_json(folder / "metrics.json", metrics.to_json())
    write_card(folder, saved.origin, None, metrics)
    return metrics
