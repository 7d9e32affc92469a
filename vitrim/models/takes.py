"""Which part of a model takes the images, and what it takes beside them."""

from __future__ import annotations

import inspect

from torch import nn

# What libraries call the part of a larger model (a CLIP pair, a VLM) that takes the images.
TOWERS = ("visual", "vision_model", "vision_tower", "vision_encoder", "image_encoder", "vision_backbone")


def encoder_path(model: nn.Module) -> str:
    """Return the path of the outermost image tower in a larger model, or "" if the model itself takes the images."""
    if all(isinstance(getattr(model, name, None), nn.Module) for name in ("encoder", "predictor")):  # V-JEPA 2
        return "encoder"
    modules = dict(model.named_modules())
    named = [name for name in modules if name.rpartition(".")[2] in TOWERS]
    if not named:
        named = [name for name, module in modules.items() if _is_backbone(name, module)]
    outermost = min(named, key=lambda name: name.count("."), default="")
    inner = f"{outermost}.backbone"  # RF-DETR's, with a projector behind it
    return inner if outermost.endswith("backbone") and inner in modules else outermost


def _is_backbone(path: str, module: nn.Module) -> bool:
    """Whether a module is the encoder of a detector: by its name, and by linear layers, which a ResNet has not."""
    *around, name = path.split(".")
    if name != "backbone" or any("embed" in each for each in around):  # a stem in front of a ViT is a part of it
        return False
    return sum(isinstance(each, nn.Linear) for each in module.modules()) > 1


def takes_token_ids(model: nn.Module) -> bool:
    """Whether a model is a text encoder: transformers says it takes token ids, and it holds words and no image tower.

    Image towers that don't say what they take inherit "input_ids" from the base of all models; their `forward` does.
    """
    first = next(iter(inspect.signature(model.forward).parameters), "")
    said = getattr(model, "main_input_name", None) == "input_ids" and first != "pixel_values"
    return said and hasattr(getattr(model, "config", None), "vocab_size") and not encoder_path(model)


def needs_beside_images(model: nn.Module) -> list[str]:
    """Return what a model's `forward` must be given after its first argument: a grid, token ids, boxes."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in kinds and each.default is each.empty]
