"""Image processors of transformers: how pictures become the named tensors that a tower takes beside its pixels.

What a tower takes is read from its `forward`, what its processor gives from the processor. Both go by nearly the same
names: a grid is `grid_thw` here and `image_grid_thw` there, and the first argument is the pixels whatever it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from vitrim.inputs import MASKS, REACHES, Inputs
from vitrim.models.origin import in_one_line, plain_json, require
from vitrim.models.takes import needs_beside_images

PIXELS = ("pixel_values", "pixel_values_videos")
# What configs of towers call what their processors have under another name.
SIZES = {
    "patch_size": "patch_size",
    "encoder_patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "max_num_patches": "num_patches",
    "pooling_kernel_size": "pooling_kernel_size",
    "max_image_tiles": "max_num_tiles",
}
NO_TENSORS = {"task_inputs"}  # words, from OneFormer's
SUFFIXES = ("_vision_model", "_vision")  # behind a model's type, of its tower alone


def processing_of(tower: nn.Module, model_type: str, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return how pictures become what a tower takes, as JSON; {} for one that takes images (C, H, W) as they are.

    Args:
        tower: what takes the images.
        model_type: of the whole model's config, by which transformers finds its own processor.
        settings: what the model's folder says of its processor; without it the library's own for such models is taken,
            with the sizes of the tower.

    Returns:
        `processor`, its settings, and `takes`, for each argument of the tower which of the processor's outputs it gets;
        {} also where the processor does not give what the tower needs.
    """
    needed, optional = needs_beside_images(tower), list(inspect.signature(tower.forward).parameters)
    if not needed and "image_sizes" not in optional:
        return {}
    said = dict(_default_settings(tower, model_type) if settings is None else settings)
    processor = _built(said)
    if processor is None:
        return {}
    given = [name for name in processor.model_input_names if name not in NO_TENSORS]
    takes = {optional[0]: next((name for name in PIXELS if name in given), "")}
    for name in optional[1:]:
        kin = (name, f"image_{name}", name.replace("pixel_", "image_"))
        source = next((each for each in kin if each in given), None)
        if source is not None and (name in needed or name in (*REACHES, *MASKS)):
            takes[name] = source
    if not all(takes.get(name) for name in (optional[0], *needed)):
        return {}
    return plain_json({"processor": said, "takes": takes})


class Processor:
    """The way from a picture to named tensors.

    Args:
        known: what `processing_of` returned.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        with in_one_line(str(known["processor"].get("image_processor_type"))):
            self.processor = _built(known["processor"])
        self.takes: Mapping[str, str] = known["takes"]

    def __call__(self, picture: Any) -> Inputs:
        """Return a batch of the one picture (PIL, RGB)."""
        given = self.processor(images=[picture], return_tensors="pt")
        return Inputs([{name: given[source] for name, source in self.takes.items()}])


def _built(settings: Mapping[str, Any]) -> Any:
    """Return an image processor of transformers from its settings; None if it has none of that name."""
    name = str(settings.get("image_processor_type", settings.get("feature_extractor_type", "")))
    kind: Any = getattr(require("transformers", "hf"), name.removesuffix("Fast"), None)
    return kind.from_dict(dict(settings)) if hasattr(kind, "from_dict") else None


def _default_settings(tower: nn.Module, model_type: str) -> dict[str, Any]:
    """Return the settings of the library's own processor for a type of models, at a tower's sizes; {} without one."""
    transformers = require("transformers", "hf")
    known = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    types = [model_type, *(model_type.removesuffix(suffix) for suffix in SUFFIXES)]
    found = next((known[each] for each in types if each in known), None)
    name = found.get("torchvision", found.get("pil")) if isinstance(found, Mapping) else found and found[0]
    if name is None:
        return {}
    config: Any = getattr(tower, "config", None)
    settings = getattr(transformers, name)().to_dict()
    sizes = {key: getattr(config, own, None) for key, own in SIZES.items()}
    settings |= {key: value for key, value in sizes.items() if key in settings and value is not None}
    sides = set(settings.get("size") or ())
    if sides in ({"longest_edge"}, {"height", "width"}) and isinstance(getattr(config, "image_size", None), int):
        settings["size"] = dict.fromkeys(sides, config.image_size)  # its tower has positions for no more
    return settings
