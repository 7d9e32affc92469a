"""Models of torchvision, by name. It has no folder format, so what is cut is always saved in vitrim's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.models.origin import Origin, Reading, crop_pct, in_one_line, on_meta, same_names, same_tensors
from vitrim.surgery import KeepUnits
from vitrim.types import BlockRun

WEIGHTS = "model.safetensors"
SHARDED = False
COMPANIONS: tuple[str, ...] = ()
RELOAD = ""
READS = ""
LOADS = ""


def load(source: str, weights: bool, reading: Reading) -> tuple[nn.Module, Origin]:
    """Load a torchvision model by name, with its default weights."""
    from torchvision import models

    if source not in models.list_models(module=models):  # without those for detection, video and so on
        raise ModelError(f"torchvision/{source}: no such model; torchvision.models.list_models() lists them.")
    preset = models.get_model_weights(source).DEFAULT.transforms()  # type: ignore[attr-defined]
    crop, scaled = preset.crop_size[0], preset.resize_size[0]
    known = {
        "input_size": [3, crop, crop],
        "crop_pct": crop_pct(crop, scaled),
        "crop_mode": "center",
        "mean": list(preset.mean),
        "std": list(preset.std),
        "interpolation": preset.interpolation.value,
    }
    with in_one_line(f"torchvision/{source}"):
        model = models.get_model(source, weights="DEFAULT") if weights else on_meta(lambda: models.get_model(source))
    return model, Origin(name=source, library="torchvision", architecture=source, preprocessing=known)


def origin_of(model: nn.Module, name: str) -> Origin | None:
    """Return None: a live torchvision model does not store how it was built."""
    return None


def build(origin: Origin) -> nn.Module:
    """Build the uncut architecture."""
    from torchvision import models

    return models.get_model(origin.architecture, **origin.model_args)


def resized(origin: Origin, edits: Sequence[KeepUnits]) -> Iterator[Origin]:
    """Yield nothing: torchvision reads no config."""
    return iter(())


def shortened(origin: Origin, run: BlockRun) -> Iterator[Origin]:
    """Yield nothing: torchvision reads no config."""
    return iter(())


def adjusted(origin: Origin, model: nn.Module, rebuilt: nn.Module) -> tuple[Origin, list[str]]:
    """Return the origin as it is: a live model of this library does not store its arguments."""
    return origin, []


def describe_(student: nn.Module, origin: Origin) -> None:
    """Do nothing: a torchvision model does not store its config."""


def write_config(student: nn.Module, folder: Path, origin: Origin) -> None:
    """Write nothing: torchvision reads no config."""
    raise NotImplementedError


def says(origin: Origin) -> dict[str, Any]:
    """Return the preprocessing."""
    return {"preprocessing": dict(origin.preprocessing)}


def transform(origin: Origin) -> Callable[[Any], Tensor] | None:
    """Return None: what torchvision offers belongs to its own weights, by name."""
    return None


names, stored = same_names, same_tensors
