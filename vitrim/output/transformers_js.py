"""The folder that Transformers.js loads a model from: its config and preprocessing, and ONNX files in `onnx/`.

Each precision is a file with a name of its own, by which Transformers.js asks for it: `dtype: "fp32"`, `"fp16"` or
`"q8"`. Inputs and outputs have transformers' own names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from vitrim.errors import ModelError, OutputError
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin, copy_companions
from vitrim.models.stock import stock_origin
from vitrim.output.stage import beside, move_into, refuse_existing
from vitrim.storage.documents import write_json
from vitrim.storage.hashes import tensor_sha256
from vitrim.types import Precision

FOLDER, CONFIG, INPUT_NAME = "onnx", "config.json", "pixel_values"
WEIGHTS = "vitrim_weights_sha256"  # in the config, so that precisions of two models never meet in a folder
FILES: Mapping[Precision, str] = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
DTYPES: Mapping[Precision, str] = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}


def file_in(out: Path, precision: Precision) -> Path:
    """The place of a precision's file in a folder for Transformers.js."""
    return out / FOLDER / FILES[precision]


@contextmanager
def folder_for_js(out: Path, precision: Precision, model: nn.Module, origin: Origin) -> Iterator[Path]:
    """Yield where to write a precision's ONNX file; at the end it stands in its folder beside the config.

    Nothing is written to the folder if anything fails.

    Args:
        out: the folder; it may hold other precisions of the same model.
        precision: of the file.
        model: as it is opened, on any device.
        origin: how it was built.

    Raises:
        ModelError: Transformers.js does not load such a model from one file.
        OutputError: the file exists, or the folder is of another model.
    """
    _check_kind(origin)
    refuse_existing(file_in(out, precision), kind="folder or precision")
    with beside(out) as scratch:
        folder = scratch / out.name
        (folder / FOLDER).mkdir(parents=True)
        _describe(folder, model, origin)
        _check_same(out, folder)
        yield file_in(folder, precision)
        if not out.exists():
            folder.rename(out)
            return
        move_into(out / FOLDER, folder / FOLDER, last=FILES[precision])


def _check_kind(origin: Origin) -> None:
    """Refuse what Transformers.js has no class for, or loads from several files."""
    if origin.library != "transformers":
        where = f"is of {origin.library}" if origin.library else "has no library that it is loaded with"
        raise ModelError(f"{origin.name}: {where}, and Transformers.js loads models of transformers; leave layout out.")
    if origin.encoder or "tokenizer" in origin.preprocessing:
        kind = f"a whole with {origin.encoder} in it" if origin.encoder else "a text encoder"
        raise ModelError(
            f"{origin.name}: is {kind}; the folder for Transformers.js is written for a model of images alone. Leave "
            "layout out, or save the tower by itself."
        )


def _describe(folder: Path, model: nn.Module, origin: Origin) -> None:
    """Write config and processor as transformers does. Sizes that no config can say are the ONNX file's alone."""
    backend = backend_of(origin.library)
    assert backend is not None
    stock = stock_origin(replace(origin, earlier=()), origin.earlier_edits) or origin
    backend.write_config(model, folder, stock)
    copy_companions(origin, folder, backend.COMPANIONS)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    weights = {name: tensor_sha256(tensor) for name, tensor in sorted(model.state_dict().items())}
    write_json(folder / CONFIG, config | {WEIGHTS: hashlib.sha256(json.dumps(weights).encode()).hexdigest()})


def _check_same(out: Path, folder: Path) -> None:
    """Refuse a folder that is of another model, or of something else."""
    if not out.exists() and not out.is_symlink():
        return
    known, mine = out / CONFIG, (folder / CONFIG).read_bytes()
    if not (out / FOLDER).is_dir() or not known.is_file() or known.read_bytes() != mine:
        raise OutputError(f"{out}: exists already and is not this model's folder for Transformers.js; choose another.")
