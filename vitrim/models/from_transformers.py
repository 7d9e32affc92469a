"""Models of transformers: vision encoders, CLIP and SigLIP pairs, the vision tower of a VLM, text encoders.

Code from a repository (`trust_remote_code`) is never run.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from vitrim.errors import CheckpointError, ModelError
from vitrim.models import stored_names
from vitrim.models.fit import read_for
from vitrim.models.origin import Origin, Reading, crop_pct, in_one_line, on_meta, plain_json, require
from vitrim.models.processors import processing_of
from vitrim.models.reads import tell_reads_
from vitrim.models.remote_code import KEY
from vitrim.models.takes import encoder_path, needs_beside_images, takes_token_ids
from vitrim.surgery import KeepUnits
from vitrim.types import BlockRun

WEIGHTS = "model.safetensors"
SHARDED = True
RELOAD = """
import json, pathlib, transformers
name = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
model = getattr(transformers, name).from_pretrained(folder)
"""
READS = """
import transformers
said = {"preprocessing": None, "id2label": transformers.AutoConfig.from_pretrained(folder).to_dict().get("id2label")}
try:
    said["preprocessing"], _ = transformers.ImageProcessingMixin.get_image_processor_dict(folder)
except OSError:
    pass
def transform(image):
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor(images=image, return_tensors="pt")["pixel_values"][0]
"""
LOADS = 'transformers.{architecture}.from_pretrained("{folder}")'
# Files beside the weights: preprocessing, tokenizer, generation. Never weights, never code.
COMPANIONS = (
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",  # sentencepiece's, under several names
    "generation_config.json",
    "chat_template.*",
)
# Files that transformers reads, and in which nothing can be but tensors.
PLAIN = (WEIGHTS, f"{WEIGHTS}.index.json")
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
TEXT_LENGTH = 128
BY_NUMBER = ("out_features", "out_indices", "stage_names")  # of its backbones; follow from the number of blocks
# What its configs call the number of blocks; a list of them for a model with stages.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "depths")
WIDTHS = {"intermediate_size", "mlp_dim", "mlp_ratio"}  # what they call the hidden units of an MLP
HEADS = ("classifier", "score")  # where its models for classification have their last layer


def load(source: str, weights: bool, reading: Reading) -> tuple[nn.Module, Origin]:
    """Load a model by hub id, or from a folder with transformers' config.json."""
    transformers = require("transformers", "hf")
    with in_one_line(f"hf/{source}"):
        config = _config(transformers, source)
        if hasattr(config, KEY):
            raise ModelError(
                f"hf/{source}: its widths are built by the modeling file beside it, and vitrim does not run code from "
                "a repository; download the folder that vitrim wrote, with its vitrim.json, and pass that."
            )
        if getattr(config, "quantization_config", None):
            raise ModelError(f"hf/{source}: its weights are quantized; pass the model from before it was quantized.")
        model_class: Any = _known_class(transformers, (config.architectures or [""])[0]) or transformers.AutoModel
        build = partial(on_meta, partial(_uncut, transformers, model_class, config))
        model = _filled(model_class, config, build, source, reading) if weights else build()
        folder = source if Path(source).is_dir() else _companions_of(source)
    return model, _origin(model, source, folder)


def _uncut(transformers: Any, model_class: Any, config: Any) -> nn.Module:
    """Build the architecture of a config."""
    return model_class.from_config(config) if model_class is transformers.AutoModel else model_class(config)


def _filled(model_class: Any, config: Any, build: Callable[[], nn.Module], source: str, reading: Reading) -> nn.Module:
    """Load a model with its weights, from files that transformers reads or from others.

    Raises:
        ModelError: weights are missing, or have other shapes than the architecture's.
    """
    files = None
    if Path(source).is_dir():
        files = read_for(Path(source), build, reading, prefer="model", plain=PLAIN)
    given: dict[str, Any] = (
        {"trust_remote_code": False} if files is None else {"config": config, "state_dict": dict(files)}
    )
    given[_dtype_key(require("transformers", "hf"))] = "auto"
    model, report = model_class.from_pretrained(
        source if files is None else None,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **given,
    )
    for name, found, wanted in sorted(report.get("mismatched_keys", ())):
        raise ModelError(
            f"hf/{source}: {name} is {tuple(found)} in its files and {tuple(wanted)} by its config; fetch both again."
        )
    _refuse_random_weights(source, report["missing_keys"])
    return model


def origin_of(model: nn.Module, name: str) -> Origin | None:
    """Return how transformers built a live model; None for other classes than its own, which it could not build."""
    kind = type(model)
    if (
        not kind.__module__.startswith("transformers.")
        or _known_class(sys.modules["transformers"], kind.__name__) != kind
    ):
        return None
    known = getattr(model, "name_or_path", "")
    return _origin(model, name, known if known and Path(known).is_dir() else None)


def build(origin: Origin) -> nn.Module:
    """Build the uncut architecture."""
    transformers = require("transformers", "hf")
    config = _config_of(transformers, origin)
    model_class: Any = _known_class(transformers, origin.architecture)
    if model_class is None:  # a name from a file is never called but for a model
        raise CheckpointError(f"origin: transformers has no model {origin.architecture!r}; update it.")
    model = model_class(config)
    tell_reads_(model, origin.encoder, origin.model_args)
    model.name_or_path = origin.folder or ""  # where transformers itself keeps where a model came from
    return model


def resized(origin: Origin, edits: Sequence[KeepUnits]) -> Iterator[Origin]:
    """Yield an origin for every key of the encoder's config that may give these widths."""
    edit = edits[0]
    for key in sorted(WIDTHS & _config_of_encoder(origin.model_args, origin.encoder).keys()):
        for value in _mlp_ratios(edit) if key == "mlp_ratio" else [edit.width]:
            args = copy.deepcopy(dict(origin.model_args))
            _config_of_encoder(args, origin.encoder)[key] = value
            yield replace(origin, model_args=args)


def shortened(origin: Origin, run: BlockRun) -> Iterator[Origin]:
    """Yield an origin for every key of the config that may count the blocks; lists with an entry a block lose some."""
    stage = re.search(r"\d+", run.path)
    for key in DEPTHS:
        args = copy.deepcopy(dict(origin.model_args))
        part = _config_of_encoder(args, origin.encoder)
        counted = part.get(key)
        if counted == run.total:
            part[key] = run.total - run.length
            part |= {name: _without(value, run) for name, value in part.items() if _one_each(value, run)}
            for name in BY_NUMBER:
                part.pop(name, None)
        elif isinstance(counted, list) and stage and counted[int(stage[0]) :][:1] == [run.total]:
            counted[int(stage[0])] = run.total - run.length
        else:
            continue
        yield replace(origin, model_args=args)


def _one_each(value: Any, run: BlockRun) -> bool:
    """Whether a value of a config is a list with an entry for every block, such as `layer_types`."""
    return isinstance(value, list) and len(value) == run.total


def _without(value: list[Any], run: BlockRun) -> list[Any]:
    """Return a list with an entry for every block without those of a run."""
    return value[: run.start] + value[run.stop :]


def adjusted(origin: Origin, model: nn.Module, rebuilt: nn.Module) -> tuple[Origin, list[str]]:
    """Return an origin with the classes of a live model's head and its number of blocks, and what differs in words."""
    args, said = copy.deepcopy(dict(origin.model_args)), []
    part, built = _config_of_encoder(args, origin.encoder), dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        mine, theirs = getattr(module, "out_features", None), getattr(built.get(name), "out_features", None)
        if name in HEADS and mine and theirs and mine != theirs:
            args["id2label"] = {str(label): f"LABEL_{label}" for label in range(mine)}
            args["label2id"] = {f"LABEL_{label}": label for label in range(mine)}
            said.append(f"its head has {mine} classes in place of {theirs}")
        blocks = built.get(name)
        if isinstance(module, nn.ModuleList) and isinstance(blocks, nn.ModuleList) and len(module) != len(blocks):
            if part.get("num_hidden_layers") == len(blocks):
                part["num_hidden_layers"] = len(module)
                said.append(f"it has {len(module)} blocks in place of {len(blocks)}")
    return replace(origin, model_args=args), said


def describe_(student: nn.Module, origin: Origin) -> None:
    """Set the new widths in the configs of the model and of its tower, which may be two objects."""
    wanted = _config_of_encoder(origin.model_args, origin.encoder)
    whole: Any = student.config
    parts = [
        reduce(getattr, _keys_to_encoder(origin.model_args, origin.encoder), whole),
        getattr(student.get_submodule(origin.encoder), "config", None),
    ]
    for part in parts:
        for key in (*WIDTHS, *DEPTHS, "layer_types"):
            if key in wanted and hasattr(part, key):
                setattr(part, key, wanted[key])
    labels = origin.model_args.get("id2label")
    if labels is not None and len(labels) != len(whole.id2label):
        whole.id2label = {int(label): name for label, name in labels.items()}
        whole.label2id = dict(origin.model_args["label2id"])


def write_config(student: nn.Module, folder: Path, origin: Origin) -> None:
    """Write config.json, and generation_config.json for a model that has one, by transformers' own functions."""
    transformers = require("transformers", "hf")
    config = _config_of(transformers, origin)
    config.architectures = [origin.architecture]
    setattr(config, _dtype_key(transformers), next(student.parameters()).dtype)
    config.save_pretrained(folder)
    beside = Path(origin.folder or "") / "generation_config.json"  # copied from there, as it was
    if getattr(student, "generation_config", None) is None or not student.can_generate():  # type: ignore[operator]
        return
    if origin.folder is None or not beside.is_file():
        student.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]


def says(origin: Origin) -> dict[str, Any]:
    """Return the image processor's settings as its file says them, and the labels."""
    said = _processor_settings(require("transformers", "hf"), origin.folder)
    return plain_json({"preprocessing": said, "id2label": origin.model_args.get("id2label")})


def transform(origin: Origin) -> Callable[[Any], Tensor] | None:
    """Return the model's own image processor for one image; None if it has none that gives one image (C, H, W)."""
    transformers = require("transformers", "hf")
    if "mean" not in origin.preprocessing or _processor_settings(transformers, origin.folder) is None:
        return None
    with in_one_line(str(origin.folder)):
        processor = transformers.AutoImageProcessor.from_pretrained(origin.folder, trust_remote_code=False)
    return lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]


def _dtype_key(transformers: Any) -> str:
    """Return what transformers calls the type of tensors."""
    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


names, stored = stored_names.names, stored_names.stored


def _config(transformers: Any, source: str) -> Any:
    """Read the config of a model whose code is part of transformers."""
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" in str(error) or "does not recognize this architecture" in str(error):
            raise ModelError(
                f"hf/{source}: transformers does not know this kind of model, and vitrim does not run code from a "
                "repository; load it yourself and pass the module."
            ) from None
        raise


def _config_of(transformers: Any, origin: Origin) -> Any:
    """Return the config with which an origin is built."""
    args = copy.deepcopy(dict(origin.model_args))
    return transformers.AutoConfig.for_model(args.pop("model_type"), **args)


def _known_class(transformers: Any, name: str) -> type[nn.Module] | None:
    """Return the model class of this name, or None if transformers has none."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _refuse_random_weights(source: str, missing: Iterable[str]) -> None:
    """Refuse a model in which transformers filled missing weights at random.

    A missing pooler is common and allowed: it is never read.
    """
    random = sorted(name for name in missing if "pooler" not in name)
    if random:
        raise ModelError(f"hf/{source}: its files have no weights for {len(random)} tensors, such as {random[0]}.")


def _origin(model: nn.Module, name: str, folder: str | None) -> Origin:
    """Collect everything that a transformers model says about itself."""
    encoder = encoder_path(model)
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    for key in ("_name_or_path", "architectures", "transformers_version"):
        config.pop(key, None)
    tell_reads_(model, encoder, config)
    found = Origin(
        name=name,
        library="transformers",
        architecture=type(model).__name__,
        model_args=plain_json(config),
        encoder=encoder,
        folder=folder,
    )
    tower = model.get_submodule(encoder)
    return replace(found, preprocessing=_preprocessing(tower, folder, config.get("model_type", "")))


def _preprocessing(tower: nn.Module, folder: str | None, model_type: str) -> dict[str, Any]:
    """Return image size, crop and statistics as timm's data config, or tokenizer and length for a text encoder.

    Of a tower that takes more than images (C, H, W), its processor.
    """
    config: Any = getattr(tower, "config", None)  # some wrap a backbone in a module of their own
    if takes_token_ids(tower):
        length = min(TEXT_LENGTH, getattr(config, "max_position_embeddings", TEXT_LENGTH))
        return {"tokenizer": folder, "num_tokens": length, "vocab_size": config.vocab_size}
    transformers = require("transformers", "hf")
    settings = _processor_settings(transformers, folder)
    if named := processing_of(tower, model_type, settings):
        return named
    size = getattr(config, "image_size", None)
    known: dict[str, Any] = {}
    if size is not None and not needs_beside_images(tower):
        known["input_size"] = [
            getattr(config, "num_channels", 3),
            *(size if isinstance(size, list | tuple) else [size] * 2),
        ]
    return plain_json(known | _in_timm_words(settings or {}))


def _processor_settings(transformers: Any, folder: str | None) -> dict[str, Any] | None:
    """Return the settings of a folder's image processor; None without one: images must come as tensors."""
    try:
        return transformers.ImageProcessingMixin.get_image_processor_dict(folder)[0] if folder else None
    except OSError:
        return None


def _in_timm_words(said: dict[str, Any]) -> dict[str, Any]:
    """Translate an image processor's settings to timm's data config."""
    if "image_mean" not in said:
        return {}
    size = said.get("size") or {}
    resized_to = (size.get("height"), size.get("width")) if "height" in size else (size.get("shortest_edge"),) * 2
    crop = said.get("crop_size") if said.get("do_center_crop") else None
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    target = (crop["height"], crop["width"]) if crop else resized_to
    found: dict[str, Any] = {"mean": said["image_mean"], "std": said["image_std"]}
    if said.get("resample") is not None:
        found["interpolation"] = INTERPOLATIONS[int(said["resample"])]
    if target[0] and resized_to[0]:
        found |= {"input_size": [3, *target], "crop_pct": crop_pct(target[0], resized_to[0])}
        found["crop_mode"] = "squash" if "height" in size else "center"
    return found


def _mlp_ratios(edit: KeepUnits) -> list[float | int]:
    """Return ratios that may give a width; some configs take whole numbers only, and round the result."""
    exact = [ratio for ratio in range(1, 9) if ratio * edit.site.d_model == edit.width]
    nudged = [(edit.width + extra) / edit.site.d_model for extra in (0, 0.5)]
    return [*exact, *nudged, *(ratio for ratio in range(1, 9) if ratio not in exact)]


def _config_of_encoder(args: Any, encoder: str) -> dict[str, Any]:
    """Return the part of a config that describes the encoder."""
    for key in _keys_to_encoder(args, encoder):
        args = args[key]
    return args


def _keys_to_encoder(args: Any, encoder: str) -> list[str]:
    """Return the keys of the part that describes the encoder, from the outside in: none if the whole config does."""
    nested = "text_config" if "text" in encoder or "language" in encoder else "vision_config"
    nested = "backbone_config" if encoder.endswith("backbone") else nested
    if not encoder or not isinstance(args.get(nested), dict):
        return []
    trunk = args[nested].get("backbone_config")  # the trunk below a neck: SAM 2 and 3
    return [nested] if WIDTHS & args[nested].keys() or not isinstance(trunk, dict) else [nested, "backbone_config"]


def _companions_of(source: str) -> str:
    """Return the folder in the hub's cache that holds a model's small files, after downloading them."""
    from huggingface_hub import snapshot_download

    return snapshot_download(source, allow_patterns=["config.json", *COMPANIONS])
