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
from torch.overrides import TorchFunctionMode

from vitrim.errors import ModelError
from vitrim.models.fit import check_fit, check_floats, in_model_names
from vitrim.models.origin import Origin, Reading, in_one_line, match_buffers_, on_meta, plain_json, reason_of
from vitrim.models.timm_args import check_args, find_args, in_words, saved_preprocessing
from vitrim.storage.tensor_files import TensorFiles, find_weights, open_tensors
from vitrim.surgery import KeepUnits

WEIGHTS = "model.safetensors"
SHARDED = False
COMPANIONS: tuple[str, ...] = ()
RELOAD = """
import timm
model = timm.create_model("local-dir:" + folder, pretrained=True)
"""
LOADS = 'timm.create_model("local-dir:{folder}", pretrained=True)'

ADVICE = (
    "Name the architecture that it was trained as, or give its arguments: --model-arg KEY=VALUE (model_args in Python)."
)


def load(source: str, weights: bool, reading: Reading) -> tuple[nn.Module, Origin]:
    """Load a timm model: `NAME`, `NAME@FILE` (a state dict), `hf-hub:ID` or `local-dir:PATH`."""
    import timm

    name, path = _name_and_path(source)
    if ":" not in name:
        _check_name(name)
    if path is None:
        reading.refuse_model_args(f"timm/{source}")
        with in_one_line(f"timm/{source}"):
            model = timm.create_model(name, pretrained=True) if weights else on_meta(lambda: timm.create_model(name))
        notes: tuple[str, ...] = ()
    else:
        model, notes = _load_file(name, path, weights, reading)
    origin = origin_of(model, source)
    if origin is None:
        raise ModelError(f"timm/{source}: timm does not say how it built this model; pass the module itself.")
    return model, replace(origin, notes=notes)


def _name_and_path(source: str) -> tuple[str, Path | None]:
    """Return what timm calls a model, and the file or folder with its weights; None for those that timm downloads."""
    if source.startswith("local-dir:"):
        folder = Path(source.removeprefix("local-dir:")).expanduser()
        return f"local-dir:{folder}", folder
    name, _, file = source.partition("@")
    if file and not source.startswith("hf-hub:"):
        return name, Path(file).expanduser()
    return source, None


def _load_file(name: str, path: Path, weights: bool, reading: Reading) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the architecture that a file or folder belongs to, and fill it; return it with notes for the user."""
    import timm

    where = str(path)
    if name.startswith("local-dir:"):
        reading.refuse_model_args(name)
    elif not path.exists():
        raise ModelError(f"{path}: no such file; use NAME@FILE with a .safetensors, .pth or .bin file.")
    with in_one_line(where):
        model = on_meta(lambda: timm.create_model(name))
        if not weights and not find_weights(path):
            return model, ()
        files = in_model_names(open_tensors(path, prefer="model", weights=reading.weights), model, reading.weights)
        shapes = {key: info.shape for key, info in files.infos.items()}
        check_args(reading.model_args, model, where)
        args, notes = find_args(shapes, model, files.said, reading.model_args, where)
    if args:
        model = _built_with(name, args, reading.model_args, where)
    for key, value in saved_preprocessing(files.said).items():
        model.pretrained_cfg[key] = value  # type: ignore[operator, index]
    check_floats(files.fakes(), model, path)
    with in_one_line(where):
        check_fit(in_timm_names(files.fakes(), model), model, path, ADVICE)
    if weights:
        _fill_(model, files, path)
    return model, (*files.notes, *notes)


def _built_with(name: str, args: Mapping[str, Any], given: Mapping[str, Any], where: str) -> nn.Module:
    """Build an architecture with arguments of its class, on the meta device.

    Raises:
        ModelError: timm can't.
    """
    import timm

    try:
        return on_meta(lambda: timm.create_model(name, **args))
    except Exception as error:  # whatever a wrong value leads to
        of = "model_args" if given else "its arguments"
        raise ModelError(
            f"{where}: {of}: timm can't build {name} with {in_words(args)} ({reason_of(error)}). {ADVICE}"
        ) from None


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
    """Rename a state dict to timm's names, by timm's own filter for checkpoints of the original code.

    Raises:
        ModelError: a weight would have to be resampled to the size of the model's.
    """
    from timm.models import clean_state_dict  # type: ignore[attr-defined]

    cleaned: dict[str, Tensor] = clean_state_dict(dict(tensors))
    original_names = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    with _NeverResampled():
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
    config["input_size"] = (getattr(model, "in_chans", config["input_size"][0]), *config["input_size"][1:])
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


def _fill_(model: nn.Module, files: TensorFiles, path: Path) -> None:
    """Load tensors into a model on meta, in timm's names or, through timm's own filter, in the original's."""
    with in_one_line(str(path)):
        tensors = in_timm_names(dict(files), model)
    model.load_state_dict(tensors, assign=True)
    if path.is_dir():  # as timm reads a folder
        model.float()
    match_buffers_(model)


class _NeverResampled(TorchFunctionMode):
    """Refuses to change the size of a weight: inside it, timm's filters rename and convert only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, if it is not an interpolation."""
        if func is nn.functional.interpolate:
            height, width = args[0].shape[-2:]
            raise ModelError(
                f"weights for {height} x {width} patches or pixels would be resampled, which changes the model, since "
                f"the architecture is of another size. {ADVICE}"
            )
        return func(*args, **(kwargs or {}))
