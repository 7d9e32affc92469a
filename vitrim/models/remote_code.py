"""A modeling file beside the weights, by which transformers alone loads layers of any width.

No config of transformers gives each block a width of its own. But `auto_map` in config.json can name a class in a file
of the same folder, which runs where the user says `trust_remote_code=True`. Ours derives from the class in
transformers and resizes its layers by the numbers under `vitrim_widths`. What stands in the file depends on nothing
but that class. Models of timm are loaded this way through the wrapper that transformers has for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.errors import RecipeError
from vitrim.models.load import backend_of, build_empty
from vitrim.models.origin import Origin, require
from vitrim.models.stock import settings_of
from vitrim.storage.documents import write_json
from vitrim.surgery import DropBlocks, Edit, KeepUnits, reshape_

FILE, KEY = "modeling_vitrim.py", "vitrim_widths"
RELOAD = """
import transformers
model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
model = getattr(model, "timm_model", model)
"""
EDITS = (KeepUnits, DropBlocks)
TIMM = "timm_model"  # where the wrapper has timm's model
Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class RemoteCode:
    """What the modeling file goes by: the original with as many blocks as are left, and sizes by path of a layer."""

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
        allowed = " and ".join(kind.MAKES for kind in EDITS)
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
            resized = {f"{path}.{side}" for path, sides in sizes.items() for side in sides}
            others = settings_of(built, drops).items() ^ settings_of(wanted, drops).items()
            if {name for name, _ in others} <= resized:
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
    (folder / FILE).write_text(_modeling_file(stock), encoding="utf-8")


def _modeling_file(stock: str) -> str:
    """Return the text of the file for a class of transformers."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("vitrim", "models")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("modeling.py.j2").render(stock=stock, key=KEY)


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


def _sizes(wanted: nn.Module, built: nn.Module) -> Sizes | None:
    """Return the sizes of each layer of one model that differ in the other; None if more than sizes does."""
    modules, found = dict(built.named_modules()), {}
    if modules.keys() != dict(wanted.named_modules()).keys():
        return None
    for path, module in wanted.named_modules():
        own, other = (dict(each.named_parameters(recurse=False)) for each in (module, modules[path]))
        if type(module) is not type(modules[path]) or own.keys() != other.keys():
            return None
        sides = (
            ("out_features", "in_features") if any(each.ndim == 2 for each in own.values()) else ("normalized_shape",)
        )
        sizes = {
            side: after
            for name, parameter in own.items()
            for side, after, before in zip(sides, parameter.shape, other[name].shape, strict=False)
            if after != before
        }
        if sizes:
            found[path] = sizes
    return found
