"""Gets a model from a name or a folder, with what is needed to build it again.

timm and local folders in timm's layout are read here; other libraries get their own branch in `load_model`. Nothing is
downloaded but the weights asked for, and nothing is unpickled: timm reads safetensors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.errors import CheckpointError, ModelError


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How the uncut model is built, without its weights; `library` is None for a module only its owner can build."""

    name: str
    library: str | None = None
    architecture: str = ""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description."""
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in self.__dict__.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: a field is missing or unknown.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise CheckpointError(f"origin: damaged or incomplete ({error}).") from None


def load_model(source: str, *, weights: bool = True) -> tuple[nn.Module, Origin]:
    """Load a pretrained model in eval mode.

    Args:
        source: `timm/NAME` (downloads the weights), or `local-dir:PATH` / a path to a folder with timm's
            `config.json` and `model.safetensors`.
        weights: without, only the architecture is built, with parameters on the meta device; nothing is downloaded.

    Returns:
        The model and how it was built.

    Raises:
        ModelError: no such model or folder, or its weights can't be read.
    """
    if source.startswith("timm/"):
        name = source.removeprefix("timm/")
        _check_timm_name(name)
        model = _create(name, source, weights)
    else:
        folder = Path(source.removeprefix("local-dir:"))
        _check_folder(folder, source)
        model = _create(f"local-dir:{folder}", source, weights)
    return model.eval(), origin_of(model, name=source)


def origin_of(model: nn.Module, *, name: str | None = None) -> Origin:
    """How a live model was built, where its library remembers that (timm does)."""
    shown = name or type(model).__name__
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        return Origin(name=shown)
    from timm.models import get_model_args

    try:
        model_args = json.loads(json.dumps(get_model_args(model)))
    except TypeError:  # built with a class or a function as an argument: no file can say that
        return Origin(name=shown, preprocessing=preprocessing(model))
    return Origin(
        name=shown,
        library="timm",
        architecture=architecture,
        model_args=model_args,
        preprocessing=preprocessing(model),
    )


def preprocessing(model: nn.Module) -> dict[str, Any]:
    """The preprocessing that comes with a timm model: size, crop, interpolation, mean and std."""
    if not getattr(model, "pretrained_cfg", None):
        return {}
    from timm.data.config import resolve_data_config

    config = resolve_data_config({}, model=model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None:  # timm leaves the config's size alone when a model is created with another img_size
        config["input_size"] = (config["input_size"][0], *built_for)
    return json.loads(json.dumps(config))


def build_empty(origin: Origin) -> nn.Module:
    """Build the uncut architecture with parameters on the meta device and real buffers.

    Raises:
        CheckpointError: only the owner of the model can build it.
    """
    if origin.library != "timm":
        raise CheckpointError(
            f"{origin.name}: no library can build this model; build it and pass it: vitrim.load(path, model=...)."
        )
    import timm

    return _on_meta(lambda: timm.create_model(origin.architecture, pretrained=False, **origin.model_args)).eval()


def _create(name: str, source: str, weights: bool) -> nn.Module:
    """Timm's factory, with its failures in one line."""
    import timm

    try:
        return timm.create_model(name, pretrained=True) if weights else _on_meta(lambda: timm.create_model(name))
    except Exception as error:  # timm, the hub client and safetensors each raise their own kinds
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ModelError(
            f"{source}: could not load the model ({reason}); check the name, the files or the network, "
            "or pass local-dir:PATH."
        ) from error


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build with parameters on the meta device and real buffers, or for real where the constructor needs values."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            return build()
    except (NotImplementedError, RuntimeError):  # timm's Swin v2 reads its parameters while it is built
        return build()


def _check_timm_name(name: str) -> None:
    """Refuse a name that timm does not know, with the nearest that it does."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean 'timm/{close[0]}'?" if close else "timm.list_models() lists them."
        raise ModelError(f"timm/{name}: timm has no model of that name; {hint}")


def _check_folder(folder: Path, source: str) -> None:
    """Refuse a path that is no folder in timm's layout."""
    if not folder.is_dir():
        raise ModelError(f"{source}: no such model; use timm/NAME, local-dir:PATH, or a folder that vitrim wrote.")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: has no {name}; a model folder holds config.json and model.safetensors.")
