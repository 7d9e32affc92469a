"""Load a model by name or from a folder, with what is needed to build it again.

Each library has a module of its own. Nothing is downloaded but the named model, and nothing is unpickled or run from a
repository.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.errors import CheckpointError, ModelError
from vitrim.models.origin import ModelBackend, Origin, Reading, in_one_line, on_meta, require
from vitrim.models.takes import encoder_path
from vitrim.storage.tensor_files import find_weights, user_path
from vitrim.surgery import reshape_

# By prefix of a source; the module's name is also the `library` of its origins.
PREFIXES = {
    "timm": "timm",
    "hf": "transformers",
    "open_clip": "open_clip",
    "torchvision": "torchvision",
    "vitrim": "vitrim",
}
SOURCES = (
    "timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME, vitrim/NAME, local-dir:PATH, or a folder that "
    "vitrim wrote"
)
# Files that hold the words of a tokenizer, under the names that transformers gives them.
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")
PLAIN = Reading()
log = logging.getLogger("vitrim")


def backend_of(name: str | None) -> ModelBackend | None:
    """Return the module for a library, by the name that origins use; None for a model that no library can build.

    Raises:
        CheckpointError: this version does not know the library.
    """
    if name is None:
        return None
    if name not in PREFIXES.values():
        raise CheckpointError(f"origin: unknown library {name!r}; this version knows {', '.join(PREFIXES.values())}.")
    return import_module(f"vitrim.models.from_{name}")  # type: ignore[return-value]


def load_model(source: str, *, weights: bool = True, reading: Reading = PLAIN) -> tuple[nn.Module, Origin]:
    """Load a pretrained model in eval mode.

    Args:
        source: `timm/NAME`, `timm/NAME@FILE` (a bare state dict), `hf/ORG/NAME`, `open_clip/NAME/TAG`,
            `torchvision/NAME`, `vitrim/NAME` (a model of vitrim's own, untrained), or `local-dir:PATH` / a path to a
            folder in the layout of one of them.
        weights: whether to load weights; without them only the architecture is built, on the meta device.
        reading: how to read a source whose name leaves that open.

    Returns:
        The model and how it was built.

    Raises:
        ModelError, CheckpointError: no such model or folder, or its weights can't be read or don't fit it.
        MissingExtraError: the library is not installed.
    """
    prefix, rest = split_source(source)
    if prefix:
        found, name = PREFIXES[prefix], str(user_path(rest)) if rest.startswith("~") else rest
    else:
        folder = user_path(source.removeprefix("local-dir:"))
        found = _library_of(folder, source)
        if weights and not find_weights(folder):
            raise ModelError(f"{folder}: has no weights; a model folder holds config.json and model.safetensors.")
        name = str(folder) if found == "transformers" else f"local-dir:{folder}"
    backend = backend_of(found)
    assert backend is not None
    if found not in ("timm", "vitrim"):
        reading.refuse_model_args(source)
    with in_one_line(source):
        model, origin = backend.load(name, weights, reading)
    for note in origin.notes if weights else ():
        log.info(note)
    return model.eval(), replace(origin, name=source)


def split_source(source: str) -> tuple[str, str]:
    """Return the prefix of a source and what follows it; "" and the source for a folder."""
    prefix, _, rest = source.partition("/")
    is_folder = prefix == "vitrim" and user_path(source).is_dir()  # of the package itself, from where it is developed
    return (prefix, rest) if prefix in PREFIXES and rest and not is_folder else ("", source)


def origin_of(model: nn.Module, *, name: str | None = None) -> Origin:
    """Return how a live model was built, as far as its library stores it, and which part of it takes the images."""
    shown = name or type(model).__name__
    for each in PREFIXES.values():
        backend = backend_of(each)
        origin = None if backend is None else backend.origin_of(model, shown)
        if origin is not None:
            return origin
    return Origin(name=shown, encoder=encoder_path(model))


def tokenizer_of(origin: Origin) -> Any:
    """Load the tokenizer of a text encoder from the folder that the model came from.

    Raises:
        ModelError: the folder has no tokenizer; pass token ids instead of text.
    """
    folder = origin.preprocessing.get("tokenizer", origin.folder)
    # Without these files transformers makes a tokenizer to which every word is unknown.
    if folder is None or not any(True for pattern in VOCABULARIES for _ in Path(folder).glob(pattern)):
        raise ModelError(f"{origin.name}: has no tokenizer beside it; pass rows of token ids (N,) instead of text.")
    transformers = require("transformers", "hf")
    with in_one_line(str(folder)):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def build_empty(origin: Origin) -> nn.Module:
    """Build the uncut architecture with parameters on the meta device and real buffers.

    Raises:
        CheckpointError: no library can build this model; only its owner can.
    """
    backend = backend_of(origin.library)
    if backend is None:
        raise CheckpointError(
            f"{origin.name}: no library can build this model; build it and pass it: vitrim.load(path, model=...)."
        )
    with in_one_line(origin.name):
        model = on_meta(lambda: backend.build(origin)).eval()
        reshape_(model, origin.earlier_edits)
    return model


def _library_of(folder: Path, source: str) -> str:
    """Return the name of the library in whose layout a folder is."""
    if not folder.is_dir():
        raise ModelError(f"{source}: no such model; use {SOURCES}.")
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json; a model folder holds one, beside model.safetensors.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'}: is no JSON ({error}); fetch it again.") from None
    if not isinstance(config, dict) or not {"model_type", "architecture", "vitrim_model"} & config.keys():
        raise ModelError(
            f"{folder / 'config.json'}: says neither model_type (transformers) nor architecture (timm); fetch it again."
        )
    if "vitrim_model" in config:
        return "vitrim"
    return "transformers" if "model_type" in config else "timm"
