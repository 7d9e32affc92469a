"""Preprocessing and augmentation of PIL images, as a timm `pretrained_cfg` describes them.

Preprocessing for evaluation is timm's own. The augmentations are label-free and torchvision's, so all their randomness
comes from torch's generator, which `ImageSet.augmented` seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from PIL import Image
from torch import nn

from vitrim.config.options import Augmentation
from vitrim.data.images import Transform
from vitrim.data.skeletons import SkeletonTransform
from vitrim.errors import DataError, RecipeError
from vitrim.models.load import origin_of
from vitrim.models.processors import Processor

# Smallest part of an image's area that a crop keeps.
SMALLEST_CROP = {"strong": 0.3, "clip": 0.2, "dinov2": 0.05}
SMALLEST_LIGHT = 0.75  # of a crop that a processor scales


def is_known(preprocessing: Mapping[str, Any]) -> bool:
    """Return whether preprocessing says enough for `transform_for` and `augment_for`."""
    return not {"mean", "skeleton", "processor"}.isdisjoint(preprocessing)


def transform_for(model_or_cfg: nn.Module | Mapping[str, Any]) -> Transform:
    """Return a model's preprocessing for evaluation: resize, centre crop, normalise; or that of sequences of skeletons.

    Args:
        model_or_cfg: a timm model, or a timm `pretrained_cfg` with at least `input_size`; timm's defaults
            (ImageNet statistics, bicubic, crop_pct 0.875) fill in what is missing.

    Raises:
        DataError: nothing is known about the model's preprocessing.
    """
    from timm.data.transforms_factory import create_transform

    if (other := _of_others(model_or_cfg)) is not None:
        return other
    transform: Any = create_transform(**_data_config(model_or_cfg), is_training=False)
    for step in transform.transforms:
        if hasattr(step, "fill"):  # timm pads with the mean colour, open_clip with one that it names
            step.fill = _said(model_or_cfg).get("fill_color", step.fill)
    return transform


def augment_for(model_or_cfg: nn.Module | Mapping[str, Any], strength: Augmentation, *, flip: bool = True) -> Transform:
    """Return a label-free training augmentation from PIL images to normalised tensors of the model's input size.

    Args:
        model_or_cfg: a timm model or `pretrained_cfg`, as for `transform_for`.
        strength: "none" is the preprocessing for evaluation; "light" resizes as evaluation does, pads by 1/8 with
            a reflection and crops at random; "strong" crops 30% to 100% of the area and jitters colour mildly; "clip"
            crops 20% to 100%; "dinov2" crops 5% to 100%, and changes colour, blurs and solarizes some of the images. A
            sequence of skeletons is turned at random, and its frames are drawn, at any strength but "none".
        flip: mirror half of the images (all but "none"); off for digits, text or anything with a handedness.

    Raises:
        DataError: nothing is known about the model's preprocessing.
        RecipeError: the strength is none of these.
    """
    from torchvision import transforms as tv

    if strength not in get_args(Augmentation):
        known = ", ".join(map(repr, get_args(Augmentation)))
        raise RecipeError(f"augment: unknown strength {strength!r}; use one of {known}.")
    if strength == "none":
        return transform_for(model_or_cfg)
    if (other := _of_others(model_or_cfg, strength, flip=flip)) is not None:
        return other
    config = _data_config(model_or_cfg)
    height, width = config["input_size"][-2:]
    mode = tv.InterpolationMode(config["interpolation"])
    if strength in SMALLEST_CROP:
        scale = (SMALLEST_CROP[strength], 1.0)
        steps: list[Any] = [tv.RandomResizedCrop((height, width), scale=scale, interpolation=mode)]
    else:
        keep_ratio = height == width and config["crop_mode"] != "squash"
        scaled = [int(side / config["crop_pct"]) for side in (height, width)]
        steps = [tv.Resize(scaled[0] if keep_ratio else scaled, interpolation=mode)]
        padding = (width // 8, height // 8)
        steps.append(tv.RandomCrop((height, width), padding=padding, padding_mode="reflect"))
    steps += _coloured(strength, flip=flip)
    return tv.Compose([*steps, tv.ToTensor(), tv.Normalize(config["mean"], config["std"])])


def _coloured(strength: Augmentation, *, flip: bool) -> list[Any]:
    """Return the steps behind a crop: mirrored at random, and other colours."""
    from torchvision import transforms as tv

    steps: list[Any] = [tv.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)] if strength == "strong" else []
    steps += [tv.RandomHorizontalFlip()] if flip else []
    if strength == "dinov2":
        steps.append(tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8))
        steps.append(tv.RandomGrayscale(p=0.2))
        steps.append(tv.RandomApply([tv.GaussianBlur(9, sigma=(0.1, 2.0))], p=0.1))
        steps.append(tv.RandomSolarize(threshold=128, p=0.2))
    return steps


def _of_others(
    model_or_cfg: nn.Module | Mapping[str, Any], strength: Augmentation = "none", *, flip: bool = False
) -> Transform | None:
    """Return the transform for a model that takes recordings of skeletons, or named tensors; None for others."""
    said = _said(model_or_cfg)
    if "processor" in said:
        return _Processed(said, strength, flip=flip)
    if "skeleton" not in said:
        return None
    return SkeletonTransform(said["input_size"][1], said["skeleton"], augment=strength != "none", flip=flip)


class _Processed:
    """From a picture to the named tensors that the model's own processor makes of it, augmented before that.

    The processor scales, so that a crop keeps its own size and shape.
    """

    def __init__(self, said: Mapping[str, Any], strength: Augmentation, *, flip: bool) -> None:
        from torchvision import transforms as tv

        self.process = Processor(said)
        steps = [] if strength == "none" else [_Crop(SMALLEST_CROP.get(strength, SMALLEST_LIGHT))]
        steps += [] if strength == "none" else _coloured(strength, flip=flip)
        self.augment: Any = tv.Compose(steps)

    def __call__(self, picture: Any) -> Any:
        """Return the tensors of a picture."""
        return self.process(self.augment(picture))


class _Crop:
    """A random crop of at least a part of a picture's area, not scaled."""

    def __init__(self, smallest: float) -> None:
        self.smallest = smallest

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the crop."""
        from torchvision import transforms as tv

        drawn: Any = tv.RandomResizedCrop.get_params  # of pictures as well
        top, left, height, width = drawn(picture, [self.smallest, 1.0], [3 / 4, 4 / 3])
        return picture.crop((left, top, left + width, top + height))


def _data_config(model_or_cfg: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """Return input size, statistics and crop as timm's data config."""
    from timm.data.config import resolve_data_config

    return resolve_data_config(pretrained_cfg=dict(_said(model_or_cfg)))


def _said(model_or_cfg: nn.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the description of preprocessing in a model or a config."""
    cfg = origin_of(model_or_cfg).preprocessing if isinstance(model_or_cfg, nn.Module) else model_or_cfg
    if not isinstance(cfg, Mapping) or not ("input_size" in cfg or "processor" in cfg):
        got = type(model_or_cfg).__name__
        raise DataError(f"{got}: no input_size to preprocess for; pass a dict with input_size, mean and std.")
    return cfg
