"""Models of timm: by name, by hub id, from a local folder in timm's layout, or a bare state dict with a name."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrim.errors import ModelError, reason_of
from vitrim.models.fit import check_fit, check_floats, in_model_names
from vitrim.models.origin import Origin, Reading, in_one_line, match_buffers_, on_meta, plain_json, same_tensors
from vitrim.models.timm_args import check_args, find_args, in_words, saved_preprocessing
from vitrim.storage.tensor_files import TensorFiles, find_weights, open_tensors, user_path
from vitrim.surgery import KeepUnits
from vitrim.types import BlockRun

WEIGHTS = "model.safetensors"
SHARDED = False
COMPANIONS: tuple[str, ...] = ()
RELOAD = """
import timm
model = timm.create_model("local-dir:" + folder, pretrained=True)
"""
READS = """
import timm.data
from timm.models._hub import load_model_config_from_path
said, _, _ = load_model_config_from_path(folder)
said["preprocessing"] = timm.data.resolve_data_config(pretrained_cfg=said)
transform = timm.data.create_transform(**said["preprocessing"])
"""
LOADS = 'timm.create_model("local-dir:{folder}", pretrained=True)'

ADVICE = (
    "Name the architecture that it was trained as, or give its arguments: --model-arg KEY=VALUE (model_args in Python)."
)
# What a `pretrained_cfg` says of the weights themselves: true of these weights only, not of the architecture.
LABELS = ("label_names", "label_descriptions")
OF_THE_WEIGHTS = (*LABELS, "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
# What timm's config file holds at its top besides what is the file's own.
TOP = ("architecture", "num_classes", "num_features", "global_pool", "model_args", "pretrained_cfg", *LABELS)


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
        if "." not in name and ":" not in name:  # the tag and licence of timm's own weights are not those of the file
            model.pretrained_cfg = without_claims(model.pretrained_cfg)  # type: ignore[arg-type]
    origin = origin_of(model, source)
    if origin is None:
        raise ModelError(f"timm/{source}: timm does not say how it built this model; pass the module itself.")
    folder = str(path) if path is not None and path.is_dir() else None
    return model, replace(origin, folder=folder, config={**_own_fields(name), **origin.config}, notes=notes)


def _name_and_path(source: str) -> tuple[str, Path | None]:
    """Return what timm calls a model, and the file or folder with its weights; None for those that timm downloads."""
    if source.startswith("local-dir:"):
        folder = user_path(source.removeprefix("local-dir:"))
        return f"local-dir:{folder}", folder
    name, _, file = source.partition("@")
    if file and not source.startswith("hf-hub:"):
        return name, user_path(file)
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
        if not weights and name.startswith("local-dir:") and not find_weights(path):  # its config says all
            return model, ()
        files = in_model_names(open_tensors(path, prefer="model", weights=reading.weights), model, reading.weights)
        shapes = {key: info.shape for key, info in files.infos.items()}
        check_args(reading.model_args, model, where)
        args, notes = find_args(shapes, model, files.said, reading.model_args, where)
    if args:
        model = _built_with(name, args, reading.model_args, where)
    said = saved_preprocessing(files.said)
    notes += (f"{where}: {in_words(said)}, read from the arguments saved in it.",) if said else ()
    model.pretrained_cfg.update(said)  # type: ignore[operator, union-attr]
    model.pretrained_cfg["input_size"] = tuple(preprocessing(model)["input_size"])  # type: ignore[operator, index]
    check_floats(files.fakes(), model, path)
    with in_one_line(where):
        advice = "It is not the one of its config, or damaged; fetch it again." if path.is_dir() else ADVICE
        check_fit(in_timm_names(files.fakes(), model), model, path, advice)
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
        return Origin(name=name, preprocessing=preprocessing(model), config={"pretrained_cfg": _pretrained_cfg(model)})
    return Origin(
        name=name,
        library="timm",
        architecture=architecture,
        model_args=model_args,
        preprocessing=preprocessing(model),
        config={"pretrained_cfg": _pretrained_cfg(model)},
    )


def build(origin: Origin) -> nn.Module:
    """Build the uncut architecture, with the original's own `pretrained_cfg` in place of the architecture's."""
    import timm
    from timm.models import filter_pretrained_cfg

    _check_name(origin.architecture)
    foreign = inspect.signature(timm.create_model).parameters.keys() & origin.model_args.keys()
    if foreign:  # such as checkpoint_path: files of whoever wrote the plan would be opened
        raise ModelError(f"timm/{origin.architecture}: {min(foreign)} is no argument of a model; compress it again.")
    known = filter_pretrained_cfg(dict(origin.config.get("pretrained_cfg", {})), remove_source=True) or None
    return timm.create_model(origin.architecture, pretrained=False, pretrained_cfg=known, **origin.model_args)


def resized(origin: Origin, edits: Sequence[KeepUnits]) -> Iterator[Origin]:
    """Yield an origin for every argument that may give these widths, a pool with MLPs of its own included."""
    pools = [edit for edit in edits if "attn_pool" in edit.site.path]
    for ratio in mlp_ratios([edit for edit in edits if edit not in pools] or edits):
        yield replace(origin, model_args={**origin.model_args, "mlp_ratio": ratio})
        for own in mlp_ratios(pools) if pools else ():
            yield replace(origin, model_args={**origin.model_args, "mlp_ratio": ratio, "attn_pool_mlp_ratio": own})
    yield replace(origin, model_args={**origin.model_args, "intermediate_size": edits[0].width})  # Gemma 4


def shortened(origin: Origin, run: BlockRun) -> Iterator[Origin]:
    """Yield an origin with another `depth`, or `depths` of a model with stages."""
    left, stage = run.total - run.length, re.search(r"\d+", run.path)
    if stage is None:
        yield replace(origin, model_args={**origin.model_args, "depth": left})
        return
    depths = _depths(on_meta(lambda: build(origin)))
    if int(stage[0]) < len(depths):
        depths[int(stage[0])] = left
        yield replace(origin, model_args={**origin.model_args, "depths": depths})


def adjusted(origin: Origin, model: nn.Module, rebuilt: nn.Module) -> tuple[Origin, list[str]]:
    """Return an origin with the classes of a live model's head and its numbers of blocks, and what differs in words."""
    args, config, said = dict(origin.model_args), dict(origin.config), []
    (mine, theirs) = (_num_classes(each) for each in (model, rebuilt))
    if mine is not None and mine != theirs:
        args["num_classes"] = mine
        known = {key: value for key, value in config.get("pretrained_cfg", {}).items() if key not in LABELS}
        config["pretrained_cfg"] = {**known, "num_classes": mine}
        said.append(f"its head has {mine} classes in place of {theirs}")
    for key, count in (("depth", _depth), ("depths", _depths)):
        mine, theirs = count(model), count(rebuilt)
        if mine and mine != theirs:
            args[key] = mine
            said.append(f"it has {mine} blocks in place of {theirs}")
    return replace(origin, model_args=args, config=config), said


def _num_classes(model: nn.Module) -> int | None:
    """Return how many classes a model's head has, 0 for none; None if the head is no linear layer."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    head = head[0] if isinstance(head, tuple) else head
    return 0 if isinstance(head, nn.Identity) else getattr(head, "out_features", None)


def _depth(model: nn.Module) -> int:
    """Return the number of blocks of a model without stages, 0 for others."""
    blocks = getattr(model, "blocks", None)
    return len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else 0


def _depths(model: nn.Module) -> list[int]:
    """Return the number of blocks of each stage, [] for a model without stages."""
    stages = getattr(model, "layers", getattr(model, "stages", ()))
    stages = stages if isinstance(stages, nn.Sequential | nn.ModuleList) else ()
    return [_depth(stage) for stage in stages] if all(_depth(stage) for stage in stages) else []


def describe_(student: nn.Module, origin: Origin) -> None:
    """Write the new arguments to where timm's own functions for saving look for them."""
    if hasattr(student, "_model_args"):
        student._model_args = dict(origin.model_args)  # type: ignore[assignment]


def write_config(student: nn.Module, folder: Path, origin: Origin) -> None:
    """Write config.json, by timm's own function."""
    from timm.data.model_config import resolve_input_data_config
    from timm.models._hub import save_config_for_hf

    model = on_meta(lambda: build(origin))
    own = {key: value for key, value in origin.config.items() if key != "pretrained_cfg"}
    shown = {"model_config": own, "model_args": dict(origin.model_args)}
    size = tuple(origin.preprocessing.get("input_size", ()))
    if size and size != tuple(resolve_input_data_config(model)["input_size"]):
        shown["data_config"] = {"input_size": size}  # a size that timm would not take from the model
    save_config_for_hf(model, str(folder / "config.json"), **shown)


def says(origin: Origin) -> dict[str, Any]:
    """Return the preprocessing, and what `pretrained_cfg` says of the weights."""
    known = origin.config.get("pretrained_cfg", {})
    return {"preprocessing": dict(origin.preprocessing), **{key: known.get(key) for key in OF_THE_WEIGHTS}}


def transform(origin: Origin) -> Callable[[Any], Tensor] | None:
    """Return timm's own transform for evaluation."""
    from timm.data.transforms_factory import create_transform

    return create_transform(**origin.preprocessing) if origin.preprocessing else None  # type: ignore[return-value]


stored = same_tensors


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
    from timm.data.model_config import resolve_input_data_config

    config = resolve_input_data_config(model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None:  # timm leaves the size of a model that takes several alone, whatever it was built for
        config["input_size"] = (config["input_size"][0], *built_for)
    return plain_json(config)


def without_claims(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `pretrained_cfg` without what it says of weights: these are others."""
    return {key: value for key, value in known.items() if key not in OF_THE_WEIGHTS}


def _pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return what a model's `pretrained_cfg` says, but for where its weights were and how their file was to be read."""
    from timm.models import filter_pretrained_cfg

    known: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    said = filter_pretrained_cfg({key: known[key] for key in known if key != "state_dict"}, remove_source=True)
    left_out = {"architecture", "custom_load", "label_offset"}  # timm leaves them out when it saves
    if said.get("num_classes") != getattr(model, "num_classes", None):
        left_out |= {*LABELS}  # its head is another one than the labels were of
    return plain_json({key: value for key, value in said.items() if key not in left_out})


def _own_fields(source: str) -> dict[str, Any]:
    """Return what a source's config.json holds at its top that timm does not know."""
    from timm.models._hub import download_from_hf, load_cfg_from_json

    kind, _, place = source.partition(":")
    if kind not in ("local-dir", "hf-hub"):
        return {}
    file = Path(place) / "config.json" if kind == "local-dir" else download_from_hf(place, "config.json")
    said = load_cfg_from_json(file)
    return {key: value for key, value in said.items() if key not in TOP} if "pretrained_cfg" in said else {}


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
