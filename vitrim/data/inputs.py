"""Open images or text with a model's own preprocessing, and check that the model can run on it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vitrim.data.decode import UNREADABLE
from vitrim.data.images import Batch, ImageSet, open_images
from vitrim.data.parts import Part
from vitrim.data.skeletons import open_skeletons
from vitrim.data.streams import ImageStream, open_stream
from vitrim.data.texts import is_text, open_texts
from vitrim.data.transforms import is_known, transform_for
from vitrim.errors import DataError, ModelError, reason_of
from vitrim.inputs import Inputs, run_on
from vitrim.models.features import evaluating, features, inputs_for
from vitrim.models.load import tokenizer_of
from vitrim.models.origin import Origin
from vitrim.models.takes import needs_beside_images, takes_token_ids
from vitrim.tokens import Features


def open_inputs(
    data: Any, origin: Origin, *, split: str | None = None, limit: int | None = None, default: str = "train"
) -> ImageSet | ImageStream:
    """Open images with a model's own preprocessing, text as rows of its tokenizer's ids, or recordings of skeletons.

    A model without known preprocessing takes tensors, or images of the right size.

    Args:
        data: a source that `open_images`, `open_stream` or `open_texts` can open.
        origin: how the model was built; holds its preprocessing.
        split: part to read of a source that has parts.
        limit: read only this many images; has no effect on a stream.
        default: part to read of a source that has parts where no split is given.

    Returns:
        A set, or a stream if the source can only be read in order.

    Raises:
        DataError: the source can't be read, or is text and the model takes none.
    """
    known = origin.preprocessing
    transform = transform_for(known) if is_known(known) else None
    if "skeleton" in known and not is_preprocessed(data):
        joints = known["input_size"][2]
        return open_skeletons(data, num_joints=joints, transform=transform, split=split, limit=limit, default=default)
    stream = open_stream(data, transform=transform, split=split, default=default)
    if stream is not None:
        return stream
    if is_text(data) and "num_tokens" in known:
        Part(asked=split).without("texts")
        return open_texts(data, tokenizer=tokenizer_of(origin), num_tokens=known["num_tokens"], limit=limit)
    is_folder = isinstance(data, str | Path) and Path(data).is_dir()  # of images, with a text file among them
    if is_text(data) and not is_folder:
        what = "takes images" if "input_size" in known or "processor" in known else "has no tokenizer that vitrim knows"
        raise DataError(f"{origin.name}: {what}, not text; pass images or tensors that are preprocessed already.")
    return open_images(data, transform=transform, split=split, limit=limit, default=default)


def is_preprocessed(data: Any) -> bool:
    """Return whether a source is a set that was opened before, or a list of tensors (3, T, V) or pairs with them."""
    first = data[0] if isinstance(data, list | tuple) and data else None
    first = first[0] if isinstance(first, list | tuple) and first else first
    return isinstance(data, ImageSet) or (isinstance(first, Tensor) and first.ndim == 3 and len(first) == 3)


def open_set(
    data: Any, origin: Origin, *, split: str | None = None, limit: int | None, default: str = "train"
) -> ImageSet:
    """Open images or text to judge on, as `open_inputs` does; of a stream the first `limit` images.

    Raises:
        DataError: the source can't be read, or is a stream and there is no limit.
    """
    images = open_inputs(data, origin, split=split, limit=limit, default=default)
    if isinstance(images, ImageSet):
        return images
    if limit is None:
        raise DataError(f"{images.name}: a stream, which may not end; give limit, the number of images to take of it.")
    return images.take(limit, seed=0)[0]


def scaled_notes(kinds: Mapping[str, int], origin: Origin) -> tuple[str, ...]:
    """Return a note where pictures went into a model of which it is not known how it wants them.

    Args:
        kinds: how many images of each kind were read, as `ImageSet.kinds` has it; preprocessed ones are none.
        origin: how the model was built.
    """
    if is_known(origin.preprocessing) or not kinds.keys() - {UNREADABLE}:
        return ()
    return (
        f"{origin.name}: how it wants images is not known, so they went in at their own size, scaled to 0..1; if that "
        "is not as it was trained, pass float tensors (C, H, W) that are preprocessed already.",
    )


def check_inputs(model: nn.Module, origin: Origin, batches: Sequence[Batch | Tensor]) -> None:
    """Run a model on one input, so that unsuitable data is reported in one line before anything is cut.

    Raises:
        DataError: the model can't run on inputs of this kind or size.
        ModelError: it is random, or mixes the inputs of a batch.
    """
    for batch in batches[:1]:
        images = batch.images_BCHW if isinstance(batch, Batch) else batch
        first = images[:1]
        try:
            with evaluating(model):
                run_on(model, inputs_for(model, first))
        except Exception as error:  # foreign code says in its own ways what it does not take
            needs = "images (C, H, W) of the size that it takes"
            if takes_token_ids(model):
                needs = "text (a .txt file or strings) or rows of token ids (N,), since it is a text encoder"
            if needs_beside_images(model):
                more = ", ".join(needs_beside_images(model))
                needs = f"no data, to cut it by its weights alone (magnitude, dgmr-paper): it also wants {more}"
                if "processor" in origin.preprocessing:
                    needs = f"pictures, from which its processor makes all that it takes ({more} as well), or {needs}"
            if "video" in (name := next(iter(inspect.signature(model.forward).parameters))):
                needs = f'clips, as vitrim.Inputs([{{"{name}": ...}}]) of its video processor\'s tensor (1, T, C, H, W)'
            reason = reason_of(error)
            got = "named tensors" if isinstance(first, Inputs) else _kind(first)
            where = f"{origin.name} {origin.encoder}".strip()
            raise DataError(f"{where}: can't run on {got} ({reason}); pass {needs}.") from error
        if random_inputs(origin, 1) is None:  # else it was asked on noise, before the first image
            check_repeatable(model, origin, images)


def can_run(model: nn.Module, inputs: Tensor) -> bool:
    """Return whether a model can run on inputs."""
    try:
        with evaluating(model):
            run_on(model, inputs_for(model, inputs))
    except Exception:  # foreign code says in its own ways what it does not take
        return False
    return True


def _kind(inputs: Tensor) -> str:
    return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape[1:])}"


def check_repeatable(model: nn.Module, origin: Origin, inputs: Tensor | None) -> None:
    """Run a model on two inputs together and on one of them alone, and check that its features there are the same.

    Whether the model can run at all is the matter of `check_inputs`; nothing is checked where it can't, and on the meta
    device. In float32 the two may differ by a hundredth, in short types by the rounding of a sum.

    Args:
        model: an encoder on its device.
        origin: how it was built; for the error.
        inputs: images or token ids, of which two are used; None checks nothing.

    Raises:
        ModelError: the model is random, or what it gives for an input depends on the others in the batch.
    """
    if inputs is None or all(parameter.is_meta for parameter in model.parameters()):
        return
    few = inputs_for(model, inputs[:2])
    try:
        with evaluating(model):
            alone, together = features(model, few[:1]), features(model, few)
            mates = _distance(alone, together)
            if mates <= _tolerance(alone.pooled_BD.dtype):
                return
            again = _distance(alone, features(model, few[:1]))
    except Exception:  # foreign code, on inputs that may not suit it
        return
    where = f"{origin.name} {origin.encoder}".strip()
    if again > _tolerance(alone.pooled_BD.dtype):
        hint = ""
        if hasattr(getattr(model, "config", None), "mask_ratio"):
            hint = " (a masked autoencoder of transformers masks and shuffles whenever it runs: load it as ViTModel)"
        raise ModelError(
            f"{where}: is random: two runs on one input differ by {again:.0%} of its features{hint}; pass a model "
            "whose forward is the same each time."
        )
    weights_alone = "pass no data, to cut it by its weights alone (magnitude, dgmr-paper)"
    if len(together.pooled_BD) != len(few):
        raise ModelError(f"{where}: puts all images of a batch into one row, where none can be told; {weights_alone}.")
    raise ModelError(
        f"{where}: the features of an input depend on the others in its batch (they differ by {mates:.0%}); pass a "
        f"model that treats each input by itself, or {weights_alone}."
    )


def _distance(first: Features, second: Features) -> float:
    """Return how far the features of the first input differ, relative to their size; 0 where they are not finite."""
    one, other = (
        torch.cat([part[0].flatten().double() for part in each.parts[:2] if part is not None])
        for each in (first, second)
    )
    other = other[: len(one)]  # in one row of all images the tokens of others follow
    if one.shape != other.shape:
        return 1.0
    distance = float((one - other).norm() / one.norm().clamp(min=1e-30))
    return distance if math.isfinite(distance) else 0.0


def _tolerance(dtype: torch.dtype) -> float:
    """Return the relative distance that rounding explains, between batches of different sizes."""
    return max(1e-2, torch.finfo(dtype).eps ** 0.5)


def random_inputs(origin: Origin, count: int = 8) -> Tensor | None:
    """Return noise of the model's input size, or random token ids; None if neither is known.

    For a model with named inputs they are what its processor makes of pictures of two shapes.
    """
    known, generator = origin.preprocessing, torch.Generator().manual_seed(0)
    if "processor" in known:
        process = transform_for(known)
        sides = [(96, 64) if number % 2 else (64, 96) for number in range(count)]
        noise = (torch.randint(256, (*side, 3), generator=generator, dtype=torch.uint8).numpy() for side in sides)
        return torch.cat([process(Image.fromarray(picture)) for picture in noise])
    if "input_size" in known:
        return torch.randn(count, *known["input_size"], generator=generator)
    if "vocab_size" in known:
        return torch.randint(known["vocab_size"], (count, known["num_tokens"]), generator=generator)
    return None
