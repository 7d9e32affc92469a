"""Models of vitrim's own, by name (built fresh, with random weights) or from a folder with config.json and weights.

Each is one row of `MODELS`: a class whose arguments are plain JSON values, and the arguments that the name stands for.
An instance has `num_classes` and `preprocessing`, which says its input and how data is turned into it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.models.fit import check_fit, check_floats
from vitrim.models.origin import Origin, Reading, match_buffers_, on_meta, plain_json, same_names, same_tensors
from vitrim.models.pose import CONFIGS, pose_model
from vitrim.models.skeleton import Hyperformer
from vitrim.storage.tensor_files import open_tensors, user_path
from vitrim.surgery import KeepUnits
from vitrim.types import BlockRun

MODELS: Mapping[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]] = {
    "skeleton-hyperformer": (Hyperformer, {}),
    "skeleton-hyperformer-small": (Hyperformer, {"num_heads": 3, "depth": 6, "num_frames": 32}),
    **{name: (pose_model, config.to_json()) for name, config in CONFIGS.items()},
}
# What config.json says: the name of the model, and its arguments.
NAME, ARGS = "vitrim_model", "model_args"
FRESH = "its weights are random: it was built by name, and nothing has trained it."

WEIGHTS = "model.safetensors"
SHARDED = False
COMPANIONS: tuple[str, ...] = ()
RELOAD = ""
READS = ""
LOADS = 'vitrim.load("{folder}")'


def load(source: str, weights: bool, reading: Reading) -> tuple[nn.Module, Origin]:
    """Load `NAME`, whose weights are random but always the same, or `local-dir:PATH`."""
    if not source.startswith("local-dir:"):
        model = _create(source, reading.model_args, weights=weights)
        origin = origin_of(model, source)
        assert origin is not None
        return model, replace(origin, notes=(FRESH,))
    folder = user_path(source.removeprefix("local-dir:"))
    reading.refuse_model_args(source)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    args = said.get(ARGS, {})
    if not isinstance(args, dict):
        raise ModelError(f"{folder / 'config.json'}: {ARGS} is {args!r:.40}; it holds arguments by name.")
    model = _create(str(said[NAME]), args, weights=False)
    origin = origin_of(model, source)
    assert origin is not None
    if weights:
        files = open_tensors(folder, prefer="model")
        check_floats(files.fakes(), model, folder)
        check_fit(files, model, folder, "It is not the one of its config, or damaged; fetch it again.")
        model.load_state_dict(dict(files), assign=True)
        match_buffers_(model)
    return model, replace(origin, folder=str(folder))


def _create(name: str, args: Mapping[str, Any], *, weights: bool) -> nn.Module:
    """Build a model that knows its name and arguments; without weights on the meta device.

    Raises:
        ModelError: there is no such model, or it takes no such argument.
    """
    if name not in MODELS:
        raise ModelError(f"vitrim/{name}: no such model; vitrim has {', '.join(MODELS)}.")
    make, defaults = MODELS[name]
    args = {**defaults, **args}
    try:
        if weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = make(**args)
        else:
            model = on_meta(lambda: make(**args))
    except TypeError as error:
        raise ModelError(f"vitrim/{name}: {str(error).rpartition('() ')[2]}; give arguments that it has.") from None
    model.vitrim_model = {NAME: name, ARGS: plain_json(args)}  # type: ignore[assignment]
    return model


def origin_of(model: nn.Module, name: str) -> Origin | None:
    """Return how a live model was built, or None if it is none of these."""
    said: Any = getattr(model, NAME, None)
    if said is None:
        return None
    known = plain_json(model.preprocessing)
    return Origin(name=name, library="vitrim", architecture=said[NAME], model_args=said[ARGS], preprocessing=known)


def build(origin: Origin) -> nn.Module:
    """Build the uncut architecture."""
    return _create(origin.architecture, origin.model_args, weights=False)


def resized(origin: Origin, edits: Sequence[KeepUnits]) -> Iterator[Origin]:
    """Yield nothing: the arguments know no other widths."""
    return iter(())


def shortened(origin: Origin, run: BlockRun) -> Iterator[Origin]:
    """Yield an origin with another depth."""
    if "depth" in origin.model_args:
        yield replace(origin, model_args={**origin.model_args, "depth": run.total - run.length})


def adjusted(origin: Origin, model: nn.Module, rebuilt: nn.Module) -> tuple[Origin, list[str]]:
    """Return the origin as it is: what differs from it is no matter of arguments."""
    return origin, []


def describe_(student: nn.Module, origin: Origin) -> None:
    """Write the present arguments to where they are looked for."""
    student.vitrim_model = {NAME: origin.architecture, ARGS: dict(origin.model_args)}  # type: ignore[assignment]


def write_config(student: nn.Module, folder: Path, origin: Origin) -> None:
    """Write config.json."""
    said = {NAME: origin.architecture, ARGS: dict(origin.model_args)}
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def says(origin: Origin) -> dict[str, Any]:
    """Return the preprocessing."""
    return {"preprocessing": dict(origin.preprocessing)}


def transform(origin: Origin) -> Callable[[Any], Tensor] | None:
    """Return None: what is compared is tensors."""
    return None


names, stored = same_names, same_tensors
