"""A modeling file beside the weights, by which transformers alone loads layers of any width.

No config of transformers gives each block a width of its own. But `auto_map` in config.json can name a class in a file
of the same folder, which runs where the user says `trust_remote_code=True`. Ours derives from the class in
transformers and resizes its layers by the numbers under `vitrim_widths`. What stands in the file depends on nothing
but that class. Models of timm are loaded this way through the wrapper that transformers has for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.errors import RecipeError
from vitrim.layers.attention import SlimAttention
from vitrim.layers.padded_heads import PaddedHeads, PickedHeads
from vitrim.models.load import backend_of, build_empty
from vitrim.models.origin import Origin, require
from vitrim.models.stock import settings_of
from vitrim.storage.documents import write_json
from vitrim.surgery import DropBlocks, Edit, KeepHeadDims, KeepHeads, KeepPaddedDims, KeepUnits, reshape_

FILE, KEY = "modeling_vitrim.py", "vitrim_widths"
RELOAD = """
import transformers
model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
model = getattr(model, "timm_model", model)
"""
EDITS = (KeepUnits, DropBlocks, KeepHeads, KeepHeadDims, KeepPaddedDims)
# Layers of ours for which the file has code, with the arguments by which it builds them.
LAYERS: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    SlimAttention: lambda layer: {
        "d_model": layer.q.in_features,
        "num_heads": layer.num_heads,
        "num_qk": layer.q.out_features // layer.num_heads,
        "num_v": layer.v.out_features // layer.num_heads,
        "scale": layer.scale,
        "qkv_bias": layer.q.bias is not None,
        "proj_bias": layer.proj.bias is not None,
        "as_tuple": layer.as_tuple,
    },
    PaddedHeads: lambda layer: {
        "in_features": layer.in_features,
        "num_heads": layer.num_heads,
        "head_dim": layer.head_dim,
        "kept": list(layer.kept),
        "bias": layer.bias is not None,
    },
    PickedHeads: lambda layer: {
        "num_heads": layer.num_heads,
        "kept": layer.kept,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
    },
}
SIDES = {2: ("out_features", "in_features"), 4: ("out_channels", "in_channels")}  # by dimensions of the weight
TIMM = "timm_model"  # where the wrapper has timm's model
Sizes = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RemoteCode:
    """What the modeling file goes by: the original with as many blocks as are left, and sizes by path of a layer.

    Sizes are by torch's names for them, or arguments by the name of a class in the file that takes the layer's place.
    """

    origin: Origin
    sizes: Sizes


def check_remote_code(origin: Origin, kinds: Sequence[type[Edit]]) -> None:
    """Refuse what no modeling file will be able to load, before anything is run.

    Args:
        origin: how the original is built.
        kinds: kinds of edit that may be made.

    Raises:
        RecipeError: it is a model of another library, or an edit puts modules of vitrim's own in the model.
        MissingExtraError: transformers is not installed.
    """
    if origin.library not in ("transformers", "timm"):
        what = f"a model of {origin.library}" if origin.library else "a module that no library builds"
        raise RecipeError(
            f"remote_code: {origin.name} is {what}, and the file is for transformers and timm alone; drop remote_code, "
            "the result loads with vitrim.load(path)."
        )
    require("transformers", "hf")
    others = [kind for kind in (*kinds, *map(type, origin.earlier_edits)) if kind not in EDITS]
    if others:
        allowed = ", ".join(sorted({kind.MAKES for kind in EDITS}))
        raise RecipeError(
            f"remote_code: the file has no code for {others[0].MAKES}, only for {allowed}; drop remote_code, the "
            "result loads with vitrim.load(path)."
        )


def has_remote_code(folder: Path) -> bool:
    """Return whether a folder has our modeling file."""
    return (folder / FILE).is_file()


def remote_code_of(origin: Origin, edits: Sequence[Edit]) -> RemoteCode | None:
    """Return what a modeling file must say so that it builds the edited model; None if it can't.

    Args:
        origin: how the uncut model is built.
        edits: the edits, by paths from the root of the whole model.
    """
    if origin.library not in ("transformers", "timm"):
        return None
    wanted = build_empty(origin)
    reshape_(wanted, edits)
    drops = [edit for edit in (*origin.earlier_edits, *edits) if isinstance(edit, DropBlocks)]
    for candidate in _shorter(replace(origin, earlier=()), drops):
        built = build_empty(candidate)
        sizes = _sizes(wanted, built)
        if sizes is not None:
            resized = tuple(f"{path}." for path in sizes)
            others = settings_of(built, drops).items() ^ settings_of(wanted, drops).items()
            if all(name.startswith(resized) for name, _ in others):
                return RemoteCode(origin=candidate, sizes=sizes)
    return None


def write_remote_code(student: nn.Module, folder: Path, remote: RemoteCode) -> None:
    """Write config.json with the sizes and the names of the class, and the modeling file.

    Args:
        student: gives the type of tensors; it may be on the meta device.
        folder: an existing folder.
        remote: what `remote_code_of` returned.
    """
    transformers, origin = require("transformers", "hf"), remote.origin
    backend = backend_of(origin.library)
    assert backend is not None
    backend.write_config(student, folder, origin)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    stock, prefix = origin.architecture, ""
    if origin.library == "timm":
        stock = "TimmWrapperForImageClassification" if config.get("num_classes") else "TimmWrapperModel"
        prefix = f"{TIMM}."
        config["model_type"] = "timm_wrapper"
        config.get("model_args", {}).pop("num_classes", None)  # the wrapper gives its own
    stock_class = getattr(transformers, stock)
    name = f"{Path(FILE).stem}.Pruned{stock}"
    config |= {
        "architectures": [f"Pruned{stock}"],
        "auto_map": dict.fromkeys(("AutoModel", *_auto_classes(transformers, stock_class)), name),
        KEY: {f"{prefix}{path}": dict(sizes) for path, sizes in remote.sizes.items()},
    }
    write_json(path, config)
    kinds = {kind.__name__ for kind in LAYERS}
    layers = any(kinds & sizes.keys() for sizes in remote.sizes.values())
    (folder / FILE).write_text(_modeling_file(stock, layers), encoding="utf-8")


def _modeling_file(stock: str, layers: bool) -> str:
    """Return the text of the file for a class of transformers, with code for other layers where they are needed."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("vitrim", "models")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("modeling.py.j2").render(stock=stock, key=KEY, layers=layers)


def _auto_classes(transformers: Any, stock_class: Any) -> Iterator[str]:
    """Yield the names of the Auto classes by which transformers finds a class."""
    for name in sorted(each for each in dir(transformers) if each.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) or {}
        found = mapping.get(stock_class.config_class, None)
        if stock_class in (found if isinstance(found, tuple) else (found,)):
            yield name


def _shorter(origin: Origin, drops: Sequence[DropBlocks]) -> Iterator[Origin]:
    """Yield origins that may build a model without the blocks that were taken out."""
    backend, origins = backend_of(origin.library), [origin]
    assert backend is not None
    for drop in drops:
        origins = [shorter for each in origins for shorter in backend.shortened(each, drop.run)]
    yield from origins


def _sizes(wanted: nn.Module, built: nn.Module, path: str = "") -> Sizes | None:
    """Return the sizes of each layer of one model that differ in the other; None if more than these does."""
    if type(wanted) in LAYERS:
        return {path: {type(wanted).__name__: LAYERS[type(wanted)](wanted)}}
    own, other = (dict(module.named_parameters(recurse=False)) for module in (wanted, built))
    children, others = dict(wanted.named_children()), dict(built.named_children())
    if type(wanted) is not type(built) or own.keys() != other.keys() or children.keys() != others.keys():
        return None
    sides = SIDES.get(max((each.ndim for each in own.values()), default=0), ("normalized_shape",))
    sizes = {
        side: after
        for name, parameter in own.items()
        for side, after, before in zip(sides, parameter.shape, other[name].shape, strict=False)
        if after != before
    }
    found = {path: sizes} if sizes else {}
    for name, child in children.items():
        below = _sizes(child, others[name], f"{path}.{name}".strip("."))
        if below is None:
            return None
        found |= below
    return found
