"""Finds the arguments with which timm builds the architecture that a state dict belongs to.

What the shape of a tensor fixes is read from it. The rest comes from the user, from the arguments that a training loop
saved beside the weights, and last from the architecture's own defaults.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from vitrim.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]

# Heads in bare state dicts, and the dimension that counts their classes: timm's, EVA-CLIP's, OpenAI CLIP's.
HEADS = {
    "head.weight": 0,
    "head.fc.weight": 0,
    "visual.head.weight": 0,
    "visual.trunk.head.weight": 0,
    "visual.proj": 1,
}
PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
# Registers as timm calls them, and as the codes of DINOv2 and DINOv3 do.
REGISTERS, OTHER_REGISTERS = "reg_token", ("register_tokens", "storage_tokens")
# Tables of relative positions: BEiT's with three rows for the class token, Swin's.
BEIT_TABLE = "blocks.0.attn.relative_position_bias_table"
SWIN_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
# What training loops call arguments that tensors don't always fix.
SAVED_AS = {"global_pool": ("global_pool", "gp"), "img_size": ("img_size", "input_size"), "num_heads": ("num_heads",)}
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
MEANS = ("avg", "avgmax", "max")
OF_A_RUN = {"self", "device", "dtype", "weight_init", "fix_init", "args", "kwargs"}


def allowed_args(model: nn.Module) -> list[str]:
    """Return the names of the arguments that the class of a timm model takes, without those of a run."""
    found: list[str] = []
    for kind in type(model).__mro__:
        parameters = inspect.signature(kind.__init__).parameters.values()
        found += [each.name for each in parameters if each.name not in (*OF_A_RUN, *found)]
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):  # else it hands the rest to its base
            break
    return found


def check_args(given: Mapping[str, Any], model: nn.Module, source: str) -> None:
    """Check that a model's class takes arguments of these names.

    Raises:
        ModelError: it does not; the nearest name, or all of them, are named.
    """
    allowed = allowed_args(model)
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(allowed)}."
            raise ModelError(f"{source}: model_args: {type(model).__name__} takes no {name!r}; {hint}")


def find_args(
    shapes: Shapes, model: nn.Module, said: Mapping[str, Any], given: Mapping[str, Any], source: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Find the arguments of the architecture that a state dict belongs to.

    Args:
        shapes: the shapes of its tensors, by names without what training put in front.
        model: the architecture as timm builds it by default.
        said: what the file itself says of its training.
        given: arguments that the user gives, which win over all others.
        source: name of the source, for error messages.

    Returns:
        The arguments that differ from the defaults, with those given, and notes that say where each was read.

    Raises:
        ModelError: the tensors are those of another size, and nothing says an argument that follows from it.
    """
    saved = _saved(said, model)
    known = {**saved, **given}
    fixed = {name: value for name, value in _fixed(shapes, model, known).items() if name not in given}
    for cause, needed in (("embed_dim", "num_heads"), ("window_size", "img_size"), ("img_size", "img_size")):
        if cause in fixed and {**known, **fixed}.get(needed) is None:
            raise ModelError(
                f"{source}: its tensors don't say {needed}, and they are not of the default size; add "
                f"--model-arg {needed}=VALUE (model_args in Python)."
            )
    defaults = _defaults(model)
    rest = {
        name: value
        for name, value in saved.items()
        if name not in {**fixed, **given} and _same(value) != _same(defaults.get(name))
    }
    both = (("its tensors", fixed), ("the arguments saved in it", rest))
    notes = tuple(f"{source}: {in_words(values)}, read from {where}." for where, values in both if values)
    return {**rest, **fixed, **given}, notes


def in_words(values: Mapping[str, Any]) -> str:
    """Return arguments as text."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def saved_preprocessing(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing that timm's training script saved, where it was asked for."""
    return {key: said[key] for key in PREPROCESSING if _plain(said.get(key)) and said[key] not in ("", "random")}


def _saved(said: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the saved arguments that the architecture takes, under its names."""
    found: dict[str, Any] = {
        name: said[key] for name, keys in SAVED_AS.items() for key in reversed(keys) if said.get(key) is not None
    }
    extra = said.get("model_kwargs")  # of timm's training script
    found |= extra if isinstance(extra, Mapping) else {}
    size, pool = found.get("img_size"), found.get("global_pool")
    if isinstance(size, list | tuple) and len(size) == 3:  # timm's --input-size 3 384 384
        found["img_size"] = list(size[1:])
    if isinstance(pool, bool):  # MAE's --global_pool and --cls_token
        found["global_pool"] = "avg" if pool else "token"
    allowed = allowed_args(model)
    return {name: value for name, value in found.items() if name in allowed and _plain(value)}


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that timm built a model with, as far as it says them."""
    from timm.models import get_model_args

    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return {"img_size": size, "global_pool": getattr(model, "global_pool", None), **get_model_args(model)}


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | list | tuple)


def _same(value: Any) -> Any:
    """Return a size in one form, so that 384, (384, 384) and [384, 384] are equal."""
    if isinstance(value, list | tuple):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def _fixed(shapes: Shapes, model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the tensors fix and that differ from the defaults; None where they are not enough."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    heads = [shapes[name][dim] for name, dim in HEADS.items() if len(shapes.get(name, ())) > dim]
    classes = next(iter(heads), 0)
    found: dict[str, Any] = {} if classes == getattr(model, "num_classes", None) else {"num_classes": classes}
    if len(shapes.get(PATCHES, ())) == len(own.get(PATCHES, ())) == 4:  # else the names are those of other code
        found |= _of_layers(shapes, own)
        found |= _of_tokens(shapes, own)
        found |= _of_pool(shapes, own, model, known)
        found |= _of_positions(shapes, own, model, known)
    allowed = allowed_args(model)
    return {name: value for name, value in found.items() if name in allowed}


def _of_layers(shapes: Shapes, own: Shapes) -> dict[str, Any]:
    """Return width, depth, channels, patches and what the blocks hold, where they differ."""
    (width, channels, *patch), (own_width, own_channels, *own_patch) = shapes[PATCHES], own[PATCHES]
    found: dict[str, tuple[Any, Any]] = {
        "embed_dim": (width, own_width),
        "in_chans": (channels, own_channels),
        "patch_size": (_same(patch), _same(own_patch)),
        "depth": (_depth(shapes), _depth(own)),
        "mlp_ratio": (_mlp_ratio(shapes, width), _mlp_ratio(own, own_width)),
        "pre_norm": ("norm_pre.weight" in shapes, "norm_pre.weight" in own),
    }
    if "blocks.0.attn.qkv.weight" in shapes and "blocks.0.attn.qkv.weight" in own:
        for argument, name in (("qkv_bias", "qkv.bias"), ("qk_norm", "q_norm.weight")):
            found[argument] = (f"blocks.0.attn.{name}" in shapes, f"blocks.0.attn.{name}" in own)
    if "blocks.0.ls1.gamma" in shapes and "blocks.0.ls1.gamma" not in own:
        found["init_values"] = (1e-5, None)
    return {name: mine for name, (mine, default) in found.items() if mine != default and mine is not None}


def _depth(shapes: Shapes) -> int | None:
    """Return the number of blocks, None for a model that is built of stages."""
    return len({found[1] for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}) or None


def _mlp_ratio(shapes: Shapes, width: int) -> float | None:
    """Return the `mlp_ratio` that gives the first block its hidden units, None if it has no MLP of timm's names."""
    hidden = next((shapes[name][0] for fc in ("fc1", "fc1_g") if (name := f"blocks.0.mlp.{fc}.weight") in shapes), None)
    if hidden is None:
        return None
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _of_tokens(shapes: Shapes, own: Shapes) -> dict[str, Any]:
    """Return whether there is a class token, and the number of registers, where they differ."""
    found: dict[str, Any] = {}
    if ("cls_token" in shapes) != ("cls_token" in own):
        found["class_token"] = "cls_token" in shapes
    registers = _registers(shapes)
    if registers != _registers(own):
        found |= {"reg_tokens": registers, "num_reg_tokens": registers}
    return found


def _registers(shapes: Shapes) -> int:
    return next((shapes[name][-2] for name in (REGISTERS, *OTHER_REGISTERS) if len(shapes.get(name, ())) > 1), 0)


def _of_pool(shapes: Shapes, own: Shapes, model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the head reads and which norm stands before it, where they differ.

    A norm behind the pool (`fc_norm`) goes with a mean; which kind of mean no tensor says.
    """
    default = getattr(model, "global_pool", None)
    pool, has_class, has_norm = known.get("global_pool", default), "cls_token" in shapes, "fc_norm.weight" in shapes
    had_norm = "fc_norm.weight" in own
    if not isinstance(default, str) or not {"norm.weight", "fc_norm.weight"} & set(own):
        return {}
    if "global_pool" not in known:
        attends = any(name.startswith("attn_pool.") for name in shapes)
        if attends != any(name.startswith("attn_pool.") for name in own):
            pool = "map" if attends else "token" if has_class else "avg"
        if pool == "token" and (has_norm or not has_class):
            pool = "avg"
        elif pool in MEANS and had_norm and not has_norm and has_class:
            pool = "token"
    found: dict[str, Any] = {} if pool in (default, known.get("global_pool")) else {"global_pool": pool}
    if has_norm != (had_norm if pool == default else pool in MEANS):
        found |= {"fc_norm": has_norm, "use_fc_norm": has_norm}
    return found


def _of_positions(shapes: Shapes, own: Shapes, model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image size, or the size of the windows, where they differ; None for images that are not square."""
    patch = shapes[PATCHES][-1]
    if POSITIONS in shapes and POSITIONS in own and len(shapes[POSITIONS]) == 3:
        return _of_embedding(shapes, own, model, known)
    for table, extra, argument, scale in ((BEIT_TABLE, 3, "img_size", patch), (SWIN_TABLE, 0, "window_size", 1)):
        if table in shapes and table in own and shapes[table][0] != own[table][0]:
            side = math.isqrt(max(0, shapes[table][0] - extra))
            return {argument: (side + 1) // 2 * scale}
    return {}


def _of_embedding(shapes: Shapes, own: Shapes, model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image size from the number of positions, and whether tokens before the patches have one."""
    tokens, patch = shapes[POSITIONS][1], shapes[PATCHES][-2:]
    of_other_code = REGISTERS not in shapes and _registers(shapes) > 0  # where the library converts positions, too
    before = ("cls_token" in shapes) + (0 if of_other_code else _registers(shapes))
    without = bool(getattr(model, "no_embed_class", False))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    had = 0 if without else ("cls_token" in own) + _registers(own)
    if own[POSITIONS][1] - had != _patches_of(size, own[PATCHES][-2:]):  # positions of something else, as in Hiera
        return {}
    for each in (without, not without):
        patches = tokens - (0 if each else before)
        side = math.isqrt(max(0, patches))
        found = {} if each == without or of_other_code or not before else {"no_embed_class": each}
        if patches in (_patches_of(known.get("img_size"), patch), _patches_of(size, patch)):
            return found
        # Positions of patches alone are guessed from a square only where registers make them likely.
        if side * side == patches and side and (each == without or _registers(shapes)):
            return {**found, "img_size": _same([side * patch[0], side * patch[1]])}
    return {"img_size": None} if "img_size" not in known else {}


def _patches_of(size: Any, patch: tuple[int, ...]) -> int | None:
    """Return the number of patches of an image size, None for what is no size."""
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return (sides[0] // patch[0]) * (sides[1] // patch[1])
