"""Models of open_clip: an image tower, which is cut, and a text tower, which is kept as it is."""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.models import from_timm
from vitrim.models.fit import check_fit, read_for
from vitrim.models.origin import Origin, Reading, in_one_line, on_meta, plain_json, require, same_names, same_tensors
from vitrim.storage.tensor_files import user_path
from vitrim.surgery import KeepUnits
from vitrim.types import BlockRun

WEIGHTS = "open_clip_model.safetensors"
SHARDED = False
CONFIG = "open_clip_config.json"
RELOAD = """
import open_clip
model = open_clip.create_model("local-dir:" + folder)
"""
READS = """
import dataclasses, json, pathlib
from open_clip import transform as of_open_clip
read = json.loads((pathlib.Path(folder) / "open_clip_config.json").read_text(encoding="utf-8"))["preprocess_cfg"]
config = of_open_clip.PreprocessCfg(**of_open_clip.merge_preprocess_dict(of_open_clip.PreprocessCfg(), read))
said = {"preprocessing": dataclasses.asdict(config)}
transform = of_open_clip.image_transform_v2(config, is_train=False)
"""
LOADS = 'open_clip.create_model_and_transforms("local-dir:{folder}")'
# A timm tower's own arguments, kept beside open_clip's until they are written to a timm config.
TRUNK_ARGS = "timm_args"
RESIZE_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "spiece.model")
# Files that open_clip reads, and in which nothing can be but tensors.
PLAIN = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")


def load(source: str, weights: bool, reading: Reading) -> tuple[nn.Module, Origin]:
    """Load an open_clip model: `NAME/TAG`, `NAME` (its first tag), `hf-hub:ID`, or a folder with open_clip's config."""
    open_clip = require("open_clip", "clip")
    folder = Path(source.removeprefix("local-dir:"))
    if (folder / CONFIG).is_file():
        name, tag = f"local-dir:{folder}", None
    elif source.startswith("hf-hub:"):
        name, tag = source, None
    else:
        name, tag = _name_and_tag(open_clip, source)
    with in_one_line(f"open_clip/{source}"):
        config = _config(open_clip, name)
        build = partial(on_meta, partial(_build, open_clip, config["model_cfg"]))
        place = folder if tag is None else user_path(tag)
        model = _filled(build, place, reading) if weights and tag != "" and place.exists() else None
        if model is None:
            model = open_clip.create_model(name, pretrained=tag, require_pretrained=True) if weights else build()
    said = getattr(model.visual, "preprocess_cfg", None) or config["preprocess_cfg"] | _tag_config(open_clip, name, tag)
    said = _in_full(said, model.visual)
    own = {key: value for key, value in config.items() if key != "model_cfg"}
    origin = Origin(
        name=source,
        library="open_clip",
        architecture=name,
        model_args=plain_json(config["model_cfg"]),
        preprocessing=_in_timm_words(said),
        encoder="visual",
        folder=str(folder) if folder.is_dir() else None,
        config=plain_json({**own, "preprocess_cfg": said}),
    )
    return model, origin


def _filled(build: Callable[[], nn.Module], place: Path, reading: Reading) -> nn.Module | None:
    """Build a model and fill it from a file or folder that open_clip can't read by itself; None for the others."""
    files = read_for(place, build, reading, prefer="open_clip", plain=PLAIN)
    if files is None:
        return None
    model = build()
    if files.keys() != model.state_dict().keys():  # names of other code, which open_clip converts
        return None
    check_fit(files, model, place, "Its weights are those of another config.")
    model.load_state_dict(dict(files), assign=True)
    return model.float()  # as open_clip reads a file


def origin_of(model: nn.Module, name: str) -> Origin | None:
    """Return the preprocessing of a live open_clip model; it does not store its config. None if it stores neither."""
    visual = getattr(model, "visual", None)
    said = getattr(visual, "preprocess_cfg", None)
    known = None if said is None else _in_timm_words(_in_full(said, visual))
    return None if known is None else Origin(name=name, preprocessing=known, encoder="visual")


def build(origin: Origin) -> nn.Module:
    """Build the uncut pair of towers, without its weights."""
    open_clip = require("open_clip", "clip")
    model = _build(open_clip, origin.model_args)
    if "preprocess_cfg" in origin.config:  # where open_clip itself puts it
        importlib.import_module("open_clip.model").set_model_preprocess_cfg(model, origin.config["preprocess_cfg"])
    return model


def resized(origin: Origin, edits: Sequence[KeepUnits]) -> Iterator[Origin]:
    """Yield an origin for every `mlp_ratio` that may give these widths; a timm tower gets a timm config of its own."""
    for ratio in from_timm.mlp_ratios(edits):
        args = copy.deepcopy(dict(origin.model_args))
        vision = args["vision_cfg"]
        (vision if "timm_model_name" not in vision else vision.setdefault(TRUNK_ARGS, {}))["mlp_ratio"] = ratio
        yield replace(origin, model_args=args)


def shortened(origin: Origin, run: BlockRun) -> Iterator[Origin]:
    """Yield an origin with fewer `layers` or, for a timm tower, with less `depth`."""
    args = copy.deepcopy(dict(origin.model_args))
    vision = args["vision_cfg"]
    if "timm_model_name" in vision:
        vision.setdefault(TRUNK_ARGS, {})["depth"] = run.total - run.length
    else:
        vision["layers"] = run.total - run.length
    yield replace(origin, model_args=args)


def adjusted(origin: Origin, model: nn.Module, rebuilt: nn.Module) -> tuple[Origin, list[str]]:
    """Return the origin as it is: a live model of this library does not store its arguments."""
    return origin, []


def describe_(student: nn.Module, origin: Origin) -> None:
    """Do nothing: an open_clip model does not store its config."""


def write_config(student: nn.Module, folder: Path, origin: Origin) -> None:
    """Write open_clip_config.json, and for a timm tower a folder with the tower's own config beside it."""
    args = copy.deepcopy(dict(origin.model_args))
    if TRUNK_ARGS in args["vision_cfg"]:
        _write_trunk_config(args["vision_cfg"], folder / "trunk")
    # Not in ASCII alone: the path of a trunk is found in it again when the folder gets its final name.
    text = json.dumps({"model_cfg": args, **origin.config}, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def says(origin: Origin) -> dict[str, Any]:
    """Return the preprocessing in open_clip's words; its config has no place for labels or a licence."""
    return {"preprocessing": origin.config.get("preprocess_cfg")}


def transform(origin: Origin) -> Callable[[Any], Tensor] | None:
    """Return open_clip's own transform for evaluation."""
    known = importlib.import_module("open_clip.transform")
    if "preprocess_cfg" not in origin.config:
        return None
    return known.image_transform_v2(known.PreprocessCfg(**origin.config["preprocess_cfg"]), is_train=False)


names, stored = same_names, same_tensors  # open_clip converts only checkpoints of other code


def tokenizer(origin: Origin) -> Callable[[Sequence[str]], Tensor]:
    """Return the tokenizer of a pair: open_clip's own, or one of transformers from the model's folder or the hub."""
    text = origin.model_args["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    with in_one_line(f"{origin.name}: tokenizer"):
        found = importlib.import_module("open_clip.tokenizer")
        if not text.get("hf_tokenizer_name"):
            return found.SimpleTokenizer(**options)
        require("transformers", "hf")
        beside = origin.folder if origin.folder and any(Path(origin.folder).glob("tokenizer*")) else None
        name = beside or text["hf_tokenizer_name"]
        return found.HFTokenizer(name, tokenizer_mode=text.get("tokenizer_mode"), **options)


def imagenet() -> tuple[Sequence[str], Mapping[str, Sequence[Callable[[str], str]]]]:
    """Return the class names of ImageNet-1K, and sets of prompt templates by name, from open_clip."""
    known = require("open_clip", "clip")
    sets = {"openai": known.OPENAI_IMAGENET_TEMPLATES, "simple": known.SIMPLE_IMAGENET_TEMPLATES}
    return known.IMAGENET_CLASSNAMES, sets


def _build(open_clip: Any, config: Any) -> nn.Module:
    """Build the class that open_clip itself would choose for a config, without its weights."""
    args = copy.deepcopy(dict(config))
    args["text_cfg"] |= {"hf_model_pretrained": False} if "hf_model_name" in args["text_cfg"] else {}
    custom = args.pop("custom_text", False) or "hf_model_name" in args["text_cfg"]
    kind = open_clip.CLIP if not custom else open_clip.CoCa if "multimodal_cfg" in args else open_clip.CustomTextCLIP
    with tempfile.TemporaryDirectory() as scratch:
        vision = args["vision_cfg"]
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        if TRUNK_ARGS in vision:
            _write_trunk_config(vision, Path(scratch))
        return kind(**args)


def _write_trunk_config(vision: dict[str, Any], folder: Path) -> None:
    """Move a timm tower's arguments, for which open_clip's config has no place, to a timm config, and refer to that."""
    from timm.models import get_pretrained_cfg

    architecture = vision["timm_model_name"]
    known = get_pretrained_cfg(architecture)
    said = {
        "architecture": architecture.partition(".")[0],
        "model_args": vision.pop(TRUNK_ARGS),
        "pretrained_cfg": {} if known is None else from_timm.without_claims(known.to_dict()),
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    vision["timm_model_name"] = f"local-dir:{folder.resolve()}"


def _config(open_clip: Any, name: str) -> dict[str, Any]:
    """Read the config of a model and of its preprocessing, by name, from a folder or from the hub."""
    if name.startswith("local-dir:"):
        found = json.loads((Path(name.removeprefix("local-dir:")) / CONFIG).read_text(encoding="utf-8"))
    elif name.startswith("hf-hub:"):
        from huggingface_hub import hf_hub_download

        found = json.loads(Path(hf_hub_download(name.removeprefix("hf-hub:"), CONFIG)).read_text(encoding="utf-8"))
    else:
        found = {"model_cfg": open_clip.get_model_config(name)}
    found["model_cfg"] = _with_own_trunk(found["model_cfg"])
    return {"preprocess_cfg": {}, **found}


def _with_own_trunk(config: dict[str, Any]) -> dict[str, Any]:
    """Read a timm tower's arguments back from the folder that `write_config` put them in."""
    vision = config["vision_cfg"]
    where = vision.get("timm_model_name", "")
    if where.startswith("local-dir:"):
        said = json.loads((Path(where.removeprefix("local-dir:")) / "config.json").read_text(encoding="utf-8"))
        vision |= {"timm_model_name": said["architecture"], TRUNK_ARGS: said.get("model_args", {})}
    return config


def _name_and_tag(open_clip: Any, source: str) -> tuple[str, str]:
    """Split `NAME/TAG`; without a tag take the first one with the model's activation."""
    name, _, tag = source.partition("/")
    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean 'open_clip/{close[0]}'?" if close else "open_clip.list_models() lists them."
        raise ModelError(f"open_clip/{source}: open_clip has no model of that name; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags and not user_path(tag).is_file():
        raise ModelError(f"open_clip/{source}: {name} has no weights {tag!r}; it has {', '.join(tags) or 'none'}.")
    quick = bool(open_clip.get_model_config(name).get("quick_gelu"))
    fitting = [each for each in tags if bool(open_clip.get_pretrained_cfg(name, each).get("quick_gelu")) == quick]
    tag = tag or next(iter(fitting or tags), "")
    if tag in tags and tag not in fitting:  # open_clip only warns, and computes other features than it was trained for
        other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        raise ModelError(
            f"open_clip/{source}: the weights {tag!r} belong to another activation; use open_clip/{other}/{tag}."
        )
    return name, tag


def _tag_config(open_clip: Any, name: str, tag: str | None) -> dict[str, Any]:
    """Return the preprocessing that belongs to a tag, for a model that was built without weights."""
    return dict(open_clip.get_pretrained_cfg(name, tag)) if tag else {}


def _in_full(said: Mapping[str, Any], visual: Any) -> dict[str, Any]:
    """Return open_clip's preprocessing with its defaults, and the size that the tower was built for."""
    known = importlib.import_module("open_clip.transform")
    full = known.merge_preprocess_dict(known.PreprocessCfg(), said)
    size = getattr(visual, "image_size", None) or full["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {**full, "size": height if height == width else [height, width]}


def _in_timm_words(said: Mapping[str, Any]) -> dict[str, Any]:
    """Translate open_clip's preprocessing to timm's data config."""
    size = said["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return plain_json(
        {
            "input_size": [3, height, width],
            "mean": said["mean"],
            "std": said["std"],
            "interpolation": "bilinear" if said["interpolation"] == "bilinear" else "bicubic",  # as open_clip reads it
            "crop_pct": 1.0,
            "crop_mode": RESIZE_MODES[said["resize_mode"]],
            "fill_color": said["fill_color"],
        }
    )
