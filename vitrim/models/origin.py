"""How a model was built: everything a checkpoint must store so that the uncut architecture can be built again.

Each library has one module (`from_timm`, `from_transformers` and so on) that implements `ModelBackend`. Nothing here
imports a model library.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from vitrim.errors import CheckpointError, MissingExtraError, ModelError, VitrimError, reason_of
from vitrim.storage.training_files import Which
from vitrim.surgery import Edit, KeepUnits
from vitrim.types import BlockRun

MAX_MODULES = 100_000  # models have some thousands; a damaged config asks for any number, and would be built for ever


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read a source, where its name leaves that open.

    `model_args` are arguments of the architecture of `timm/NAME@FILE` or `vitrim/NAME`, `weights` which ones to take of
    a training checkpoint: "auto" takes averaged weights (EMA) where there are any, "raw" those that were trained.
    """

    model_args: Mapping[str, Any] = field(default_factory=dict)
    weights: Which = "auto"

    def refuse_model_args(self, source: str) -> None:
        """Refuse arguments for a source that says itself how it is built.

        Raises:
            ModelError: there are some.
        """
        if self.model_args:
            raise ModelError(
                f"{source}: takes no model_args ({', '.join(self.model_args)}); they are for timm/NAME@FILE and "
                "vitrim/NAME alone."
            )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How to build the uncut model, without its weights.

    `library` is None for a module that only its owner can build. `encoder` is the path of the part that takes the
    images, "" for the whole model. `folder` is where the files beside the weights (tokenizer, processor) come from.
    `config` is what else the library's own config file says (preprocessing, labels, tag, licence), in its own words;
    every writer writes it back. `earlier` holds, without tensors, the edits of a model that was already cut when it
    was opened. `notes` is what was chosen when it was opened, for the user.
    """

    name: str
    library: str | None = None
    architecture: str = ""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    encoder: str = ""
    folder: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    earlier: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    @property
    def earlier_edits(self) -> list[Edit]:
        """Edits that turn the library's own architecture into the model as it was opened."""
        return [Edit.from_json(edit) for edit in self.earlier]

    def after(self, edits: Sequence[Edit]) -> Origin:
        """Return the origin of the model after these edits."""
        return replace(self, earlier=(*self.earlier, *(edit.shape_only().to_json() for edit in edits)))

    def check_stream(self, name: str, original: Origin, its_name: str) -> None:
        """Check, of models of skeletons, that a model takes the stream and the number of frames that its original does.

        Raises:
            ModelError: it takes others.
        """
        takes = [tuple(map(each.preprocessing.get, ("skeleton", "input_size"))) for each in (self, original)]
        if any(stream for stream, _ in takes) and takes[0] != takes[1]:
            mine, theirs = (f"{stream} {size}" if stream else "no skeletons" for stream, size in takes)
            raise ModelError(f"{name}: takes {mine}, and {its_name} {theirs}; compare a model with its own original.")

    def without_place(self) -> Origin:
        """Return the origin without the folder it came from, which another machine does not have, and without notes."""
        known = {key: "." if key == "tokenizer" and value else value for key, value in self.preprocessing.items()}
        return replace(self, folder=None, preprocessing=known, notes=())

    def placed_at(self, folder: str) -> Origin:
        """Return the origin with this folder for tokenizer and processor: the inverse of `without_place`."""
        known = {key: folder if key == "tokenizer" and value else value for key, value in self.preprocessing.items()}
        return replace(self, folder=folder, preprocessing=known)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        kept = {key: value for key, value in self.__dict__.items() if key != "notes"}
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in kept.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        """Rebuild an origin from `to_json`.

        Raises:
            CheckpointError: a field is missing, unknown or of another kind.
        """
        mappings = {"model_args", "preprocessing", "config"}
        for key, value in data.items() if isinstance(data, Mapping) else ():
            kinds = Mapping if key in mappings else list | tuple if key in ("earlier", "notes") else str | None
            if not isinstance(value, kinds):
                raise CheckpointError(f"origin: damaged; {key} is {value!r:.40}.")
        try:
            return cls(**{**data, "notes": ()})
        except TypeError as error:
            raise CheckpointError(f"origin: damaged or incomplete ({error}).") from None


class ModelBackend(Protocol):
    """What vitrim needs from a model library; one module for each library implements it.

    `WEIGHTS` is the library's own file name for weights, and `SHARDED` whether it reads several files. `COMPANIONS` are
    patterns of files that belong beside the weights: preprocessing and tokenizer, never code. `RELOAD` is Python code
    that loads `folder` as `model` with the library alone, and `LOADS` the same in one line, to show. `READS` is Python
    code that reads only the configuration of `folder` with the library alone: `said`, with the keys of `says`, and
    `transform`, from a PIL image to a tensor. A library without a folder format has "" for all three, and its configs
    are never written.
    """

    WEIGHTS: str
    SHARDED: bool
    COMPANIONS: tuple[str, ...]
    RELOAD: str
    READS: str
    LOADS: str

    def load(self, source: str, weights: bool, reading: Reading) -> tuple[nn.Module, Origin]:
        """Load a model by the library's own name or from a folder; without weights its parameters are on meta."""
        ...

    def origin_of(self, model: nn.Module, name: str) -> Origin | None:
        """Return how a live model was built, or None if the library does not store it."""
        ...

    def build(self, origin: Origin) -> nn.Module:
        """Build the uncut architecture, uninitialised or random."""
        ...

    def resized(self, origin: Origin, edits: Sequence[KeepUnits]) -> Iterator[Origin]:
        """Yield origins that may build the model with the edited widths; the caller checks which one does."""
        ...

    def shortened(self, origin: Origin, run: BlockRun) -> Iterator[Origin]:
        """Yield origins that may build the model without a run of blocks; the caller checks which one does."""
        ...

    def adjusted(self, origin: Origin, model: nn.Module, rebuilt: nn.Module) -> tuple[Origin, list[str]]:
        """Return an origin with the classes and the depth of a live model, and in words what differs from `origin`.

        `rebuilt` is what `origin` builds, on meta.
        """
        ...

    def describe_(self, student: nn.Module, origin: Origin) -> None:
        """Write the model's present widths into its own config."""
        ...

    def write_config(self, student: nn.Module, folder: Path, origin: Origin) -> None:
        """Write the config file as the library does, from the origin alone; the student gives the type of tensors."""
        ...

    def says(self, origin: Origin) -> dict[str, Any]:
        """Return what an output must say as the original did, as JSON: preprocessing, and labels, tag, licence."""
        ...

    def transform(self, origin: Origin) -> Callable[[Any], Tensor] | None:
        """Return the library's own way from a PIL image to the original's input (C, H, W); None if it has none."""
        ...

    def names(self, model: nn.Module, fakes: Mapping[str, Tensor]) -> Mapping[str, str]:
        """Map names in a file to names in the model, for tensors that the library only renames when it loads them.

        `fakes` are the file's tensors on meta. Tensors that the library converts (joins, splits, drops) are left out.
        """
        ...

    def stored(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a model's tensors under the names that they have in the library's own files."""
        ...


def same_names(model: nn.Module, fakes: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Map names in a file to themselves, for those that the model has: `names` of a library that renames nothing."""
    known = model.state_dict()
    return {name: name for name in fakes if name in known}


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        raise MissingExtraError(f"{package} is not installed; pip install 'vitrim[{extra}]'.") from None


def same_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors as they are: `stored` of a library that has the same names in memory and in files."""
    return tensors


@contextmanager
def in_one_line(source: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads a model into a ModelError of one line.

    A damaged config may ask for any number of modules; building stops after MAX_MODULES.

    Raises:
        ModelError: the model could not be loaded.
    """
    made = itertools.count(1)

    def count(*_: Any) -> None:
        if next(made) > MAX_MODULES:
            raise ModelError(f"{source}: its config asks for more than {MAX_MODULES:,} modules; fetch it again.")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    except VitrimError:
        raise
    except Exception as error:  # libraries, the hub client and safetensors each raise their own kinds
        reason = reason_of(error)
        raise ModelError(
            f"{source}: could not load the model ({reason}); check the name, the files or the network, "
            "or pass local-dir:PATH."
        ) from error
    finally:
        hook.remove()


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Call `build` so that parameters are on the meta device and buffers are real."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model = build()
        if not any(buffer.is_meta for buffer in model.buffers()):
            return model
    except (NotImplementedError, RuntimeError):  # timm's Swin v2 reads its parameters while it is built
        pass
    model = build()  # and its Swin puts its masks where its parameters are
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
    return model


def match_buffers_(model: nn.Module) -> None:
    """Cast the buffers that no file holds to half precision, if all tensors of the file have one half precision."""
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if dtypes in ({torch.bfloat16}, {torch.float16}):
        model.to(dtypes.pop())  # not buffer by buffer: timm's DINOv3 keeps its rope in float32 when it is moved


def plain_json(value: Any) -> Any:
    """Return a value as JSON gives it back (tuples become lists), so that equal origins compare equal.

    Raises:
        TypeError: it holds something that JSON can't express.
    """
    return json.loads(json.dumps(value))


def crop_pct(target: int, resized_to: int) -> float:
    """Return the `crop_pct` with which timm resizes to exactly this side; timm divides by it and rounds down."""
    exact = target / resized_to
    return exact if int(target / exact) == resized_to else target / (resized_to + 1e-6)


def copy_companions(origin: Origin, folder: Path, patterns: Sequence[str]) -> None:
    """Copy tokenizer and processor files from the folder that the model came from."""
    import shutil

    source = Path(origin.folder or "")
    for pattern in patterns if origin.folder and source.is_dir() else ():
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
