"""Classifies without training: class names in prompts, embedded by the text tower, are the classifier.

The standard names and templates of ImageNet-1K are read from open_clip, never kept here. Image tower and text tower may
be of different models, as long as their vectors are in one space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.errors import CheckpointError, DataError, ModelError, RecipeError
from vitrim.models.features import evaluating
from vitrim.models.from_open_clip import imagenet
from vitrim.models.towers import Pair, embed_images, unit
from vitrim.progress import progress
from vitrim.storage.hashes import tensor_sha256
from vitrim.storage.sealed import read_tensors, write_tensors

Template = str | Callable[[str], str]
TEXTS_PER_BATCH = 256


def zero_shot_top(
    model: nn.Module, pair: Pair, classes_CE: Tensor, batches: Iterable[Any], *, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Measure the share of images whose class is among the k most similar, 0..1.

    Scores that tie count as in a random order of the tie.

    Args:
        model: embeds the images: a pair, or an image tower of the same space.
        pair: its scale and bias turn similarities into scores.
        classes_CE: unit vectors of the classes, from `build_classifier`.
        batches: tuples that start with (images_BCHW, labels_B), such as `Batch`; labels of -1 are left out.
        ks: how many classes to look at; those above the number of classes are left out.

    Returns:
        `top1`, `top5` and so on, `num_images` with a label, `num_skipped` that could not be read.

    Raises:
        DataError: no image has a label, or a label is larger than the number of classes allows.
        ModelError: the vectors of the two towers have different widths.
    """
    ks = [k for k in ks if k <= len(classes_CE)]
    hits, num_images, num_skipped = dict.fromkeys(ks, 0.0), 0, 0
    with evaluating(model, pair.model):
        for images, labels, *rest in batches:
            num_skipped += rest[0] if rest else 0
            known = labels >= 0
            if not known.any():
                continue
            if int(labels.max()) >= len(classes_CE):
                raise DataError(
                    f"zero-shot: label {int(labels.max())} with {len(classes_CE)} names; give one for each."
                )
            found_BE = unit(embed_images(model, images[known])).to(pair.device)
            check_widths(found_BE, classes_CE)
            scores_BC = pair.logits(found_BE, classes_CE.to(pair.device)).cpu()
            for k, share_B in _shares(scores_BC, labels[known].cpu(), ks).items():
                hits[k] += float(share_B.sum())
            num_images += int(known.sum())
    if not num_images:
        raise DataError("zero-shot: no image has a label; pass a labelled source.")
    shares = {f"top{k}": hits[k] / num_images for k in ks}
    return {**shares, "num_images": num_images, "num_skipped": num_skipped}


def build_classifier(
    pair: Pair, prompts: Sequence[Sequence[str]], *, cache: str | Path | None = None, quiet: bool = True
) -> Tensor:
    """Compute a unit vector for each class: the mean of its prompts' unit vectors, normalised.

    Args:
        pair: its text tower and tokenizer are used.
        prompts: the texts of each class, as many for one as for another; see `prompts_for`.
        cache: folder that keeps classifiers by a hash of token ids and the text tower's weights; None keeps none.
        quiet: show no progress.

    Returns:
        Vectors (C, E), float32 on the CPU.

    Raises:
        CheckpointError: a file of the cache is damaged.
    """
    num_prompts = len(prompts[0])
    ids_TN = pair.tokenize([text for texts in prompts for text in texts])
    kept = None if cache is None else Path(cache) / f"{_hash(pair, ids_TN, num_prompts)}.safetensors"
    if kept is not None and kept.exists():
        return _read(kept)
    vectors_TE = embed_all(pair, ids_TN, quiet=quiet)
    classes_CE = unit(unit(vectors_TE).unflatten(0, (len(prompts), num_prompts)).mean(1))
    if kept is not None:
        _write(kept, classes_CE)
    return classes_CE


def prompts_for(names: str | Path | Sequence[str], templates: str | Path | Sequence[Template]) -> list[list[str]]:
    """Put the name of each class into each template.

    Args:
        names: `imagenet`, a text file with a name a line, or names in the order of the labels.
        templates: `openai` (80) or `simple` (7), as open_clip has them; a text file with one a line; or strings
            with `{}` where the name goes, or functions from a name to a text.

    Raises:
        RecipeError: there is no name or no template, a file can't be read, or a template has no place for the name.
        MissingExtraError: open_clip, which has the standard ones, is not installed.
    """
    names = names_of(names)
    if isinstance(templates, str) and templates in ("openai", "simple"):
        templates = imagenet()[1][templates]
    found = _lines(templates, "templates")
    for template in found:
        if isinstance(template, str) and "{}" not in template:
            raise RecipeError(f"templates: {template!r} has no {{}} for the name; write 'a photo of a {{}}.'.")
    return [[t.replace("{}", name) if isinstance(t, str) else t(name) for t in found] for name in names]


def names_of(names: str | Path | Sequence[str]) -> Sequence[str]:
    """Return the names of classes: ImageNet's, the lines of a text file, or those that are given.

    Raises:
        RecipeError: there is no name, or the file can't be read.
    """
    return imagenet()[0] if isinstance(names, str) and names == "imagenet" else _lines(names, "names")


def embed_all(pair: Pair, ids_TN: Tensor, *, quiet: bool = True) -> Tensor:
    """Compute the text tower's vectors (T, E) of rows of token ids, batch by batch, on the CPU; not normalised."""
    found = []
    with evaluating(pair.model), progress("texts", len(ids_TN), quiet=quiet) as bar:
        for ids_BN in ids_TN.split(TEXTS_PER_BATCH):
            found.append(pair.embed_texts(ids_BN.long()).cpu())
            bar.advance(len(ids_BN))
    return torch.cat(found)


def check_widths(images_BE: Tensor, texts_TE: Tensor) -> None:
    """Refuse image and text vectors of different spaces.

    Raises:
        ModelError: their widths differ.
    """
    if images_BE.shape[-1] != texts_TE.shape[-1]:
        got = f"images in {images_BE.shape[-1]} dimensions, texts in {texts_TE.shape[-1]}"
        raise ModelError(f"the two towers don't fit: {got}; take the text tower that the image tower was trained with.")


def _shares(scores_BC: Tensor, labels_B: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """Compute for each k the chance that the right class is among the k best, when ties are in random order."""
    own_B1 = scores_BC.gather(1, labels_B[:, None])
    num_better_B = (scores_BC > own_B1).sum(1)
    num_tied_B = (scores_BC == own_B1).sum(1)  # itself included
    return {k: ((k - num_better_B) / num_tied_B).clamp(0, 1) for k in ks}


def _lines(source: Any, what: str) -> list[Any]:
    """Return the items of a list, or the lines of a text file."""
    if isinstance(source, str | Path):
        try:
            source = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{what}: {source} can't be read ({error}); pass a text file, one a line.") from None
        source = [line.strip() for line in source if line.strip()]
    if not len(source):
        raise RecipeError(f"{what}: none given; pass at least one.")
    return list(source)


def _hash(pair: Pair, ids_TN: Tensor, num_prompts: int) -> str:
    """Hash everything that a classifier depends on."""
    weights = {name: tensor_sha256(p) for name, p in sorted(pair.text_parameters().items())}
    what = [type(pair.model).__name__, num_prompts, tensor_sha256(ids_TN), weights]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _read(path: Path) -> Tensor:
    try:
        return read_tensors(path)[0]["classes_CE"]
    except CheckpointError as error:
        raise CheckpointError(f"{error} Delete it, and it is made again.") from None


def _write(path: Path, classes_CE: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"classes_CE": classes_CE})
