"""Models of timm: by name, by hub id, from a local folder in timm's layout, or a bare state dict with a name."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.models.origin import Origin, in_one_line, match_buffers_, on_meta, plain_json
from vitrim.storage.tensor_files import TensorFiles, open_tensors
from vitrim.surgery import KeepUnits

WEIGHTS = "model.safetensors"
SHARDED = False
COMPANIONS: tuple[str, ...] = ()
RELOAD = """
import timm
model = timm.create_model("local-dir:" + folder, pretrained=True)
"""
LOADS = 'timm.create_model("local-dir:{folder}", pretrained=True)'

# Heads in bare state dicts, and the dimension that counts their classes: timm's, EVA-CLIP's, OpenAI CLIP's.
HEADS = {
    "head.weight": 0,
    "head.fc.weight": 0,
    "visual.head.weight": 0,
    "visual.trunk.head.weight": 0,
    "visual.proj": 1,
}


def load(source: str, weights: bool) -> tuple[nn.Module, Origin]:
    """Load a timm model: `NAME`, `NAME@FILE` (a state dict), `hf-hub:ID` or `local-dir:PATH`."""
    import timm

    name, _, file = source.partition("@") if ":" not in source else (source, "", "")
    if ":" not in source:
        _check_name(name)
    with in_one_line(f"timm/{source}"):
        if weights and not file:
            model = timm.create_model(name, pretrained=True)
        else:
            model = on_meta(lambda: timm.create_model(name, **_head_of(file)))
        if file and weights:
            _fill_(model, Path(file))
    origin = origin_of(model, source)
    if origin is None:
        raise ModelError(f"timm/{source}: timm does not say how it built this model; pass the module itself.")
    return model, origin


def origin_of(model: nn.Module, name: str) -> Origin | None:
    """Return how timm built a live model, or None if it is not timm's."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        return None
    from timm.models import get_model_args

    try:
        model_args = plain_json(get_model_args(model))
    except TypeError:  # built with a class or a function as an argument: no file can say that
        return Origin(name=name, preprocessing=preprocessing(model))
    return Origin(
        name=name,
        library="timm",
        architecture=architecture,
        model_args=model_args,
        preprocessing=preprocessing(model),
    )


def build(origin: Origin) -> nn.Module:
    """Build the uncut architecture."""
    import timm

    _check_name(origin.architecture)
    foreign = inspect.signature(timm.create_model).parameters.keys() & origin.model_args.keys()
    if foreign:  # such as checkpoint_path: files of whoever wrote the plan would be opened
        raise ModelError(f"timm/{origin.architecture}: {min(foreign)} is no argument of a model; compress it again.")
    return timm.create_model(origin.architecture, pretrained=False, **origin.model_args)


def resized(origin: Origin, edits: Sequence[KeepUnits]) -> Iterator[Origin]:
    """Yield an origin for every `mlp_ratio` that may give these widths."""
    for ratio in mlp_ratios(edits):
        yield replace(origin, model_args={**origin.model_args, "mlp_ratio": ratio})


def describe_(student: nn.Module, origin: Origin) -> None:
    """Do nothing: timm does not store a model's arguments in the model."""


def write_config(student: nn.Module, folder: Path, origin: Origin) -> None:
    """Write config.json, by timm's own function."""
    from timm.models._hub import save_config_for_hf

    save_config_for_hf(student, str(folder / "config.json"), model_args=dict(origin.model_args))


def names(model: nn.Module, fakes: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Map names in a file to names in the model, for tensors that timm's own filter passes through unchanged."""
    after = in_timm_names(dict(fakes), model)
    new_name = {id(tensor): name for name, tensor in after.items()}
    return {name: new_name[id(tensor)] for name, tensor in fakes.items() if id(tensor) in new_name}


def in_timm_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a state dict to timm's names, by timm's own filter for checkpoints of the original code."""
    from timm.models import clean_state_dict  # type: ignore[attr-defined]

    cleaned: dict[str, Tensor] = clean_state_dict(dict(tensors))
    original_names = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return cleaned if original_names is None else original_names(cleaned, model)


def mlp_ratios(edits: Sequence[KeepUnits]) -> Iterator[float]:
    """Yield ratios that may give these widths: exact, nudged over truncation, and doubled for packed gates."""
    edit = edits[0]
    for count in (edit.width, 2 * edit.width):
        yield count / edit.site.d_model
        yield (count + 0.5) / edit.site.d_model


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """Return the preprocessing of a timm model: input size, crop, interpolation, mean and std."""
    from timm.data.config import resolve_data_config

    config = resolve_data_config({}, model=model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None:  # timm leaves the config's size alone when a model is created with another img_size
        config["input_size"] = (config["input_size"][0], *built_for)
    return plain_json(config)


def _check_name(name: str) -> None:
    """Check that timm knows an architecture; the error suggests the nearest name."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean 'timm/{close[0]}'?" if close else "timm.list_models() lists them."
        raise ModelError(f"timm/{name}: timm has no model of that name; {hint}")


def _head_of(file: str) -> dict[str, Any]:
    """Return the number of classes in a bare state dict as model arguments, if its head shows it."""
    if not file:
        return {}
    infos = {name.removeprefix("module."): info for name, info in _open(Path(file)).infos.items()}
    return {"num_classes": next((infos[name].shape[dim] for name, dim in HEADS.items() if name in infos), 0)}


def _open(path: Path) -> TensorFiles:
    """Open a bare state dict without reading its tensors.

    Raises:
        ModelError: there is no such file.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; use NAME@FILE with a .safetensors, .pth or .bin file.")
    return open_tensors(path)


def _fill_(model: nn.Module, path: Path) -> None:
    """Load a file into a model on meta, in timm's names or, through timm's own filter, in the original's."""
    tensors = in_timm_names(dict(_open(path)), model)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    match_buffers_(model)
    if missing or unexpected:
        raise ModelError(
            f"{path}: does not fit the architecture ({len(missing)} tensors missing, such as {(missing or ['-'])[0]}; "
            f"{len(unexpected)} not known, such as {(unexpected or ['-'])[0]})."
        )
