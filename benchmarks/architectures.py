"""The architectures of timm, transformers and open_clip, each with how to build it smaller, for `registry.py`.

Those whose arguments are the same when they are shrunk are one, under several names.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from shrinking import (
    DEPTH,
    IMAGE,
    LEVELS,
    PATCH,
    STAGED_IMAGE,
    WIDTH,
    Candidate,
    Named,
    Shrunk,
    smaller,
    smaller_config,
)
from torch import nn

# timm


class _CaughtError(Exception):
    pass


@contextmanager
def _catching() -> Iterator[None]:
    """Let timm's entry points raise what they would build, in place of building it."""

    def catch(model_class: Any, variant: str, pretrained: bool, **kwargs: Any) -> None:
        raise _CaughtError(model_class, kwargs)

    modules = [module for name, module in sys.modules.items() if name.startswith("timm.models.")]
    real = import_module("timm.models._builder").build_model_with_cfg
    changed = [module for module in modules if getattr(module, "build_model_with_cfg", None) is real]
    for module in changed:
        module.build_model_with_cfg = catch
    try:
        yield
    finally:
        for module in changed:
            module.build_model_with_cfg = real


NOT_ARGUMENTS = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "feature_cfg", "pretrained_filter_fn"}
NOT_ARGUMENTS |= {"pretrained_strict", "kwargs_filter", "pretrained_custom_load", "features_only"}


@functools.cache
def timm_arguments(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the class of an architecture, what its entry point passes to it, and all that can be passed, by name."""
    import timm

    try:
        with _catching():
            timm.create_model(name)
    except _CaughtError as error:
        model_class, passed = error.args
    passed = {key: value for key, value in passed.items() if key not in NOT_ARGUMENTS}
    taken: dict[str, Any] = {}
    for each in reversed(model_class.__mro__ if isinstance(model_class, type) else [model_class]):
        if each not in (object, nn.Module):
            taken |= {k: p.default for k, p in inspect.signature(each).parameters.items() if p.default is not p.empty}
    for key in [key for key, value in passed.items() if is_dataclass(value)]:  # a config object takes its own fields
        taken |= vars(passed[key])
    return model_class, passed, {**taken, **passed}


def timm_overrides(name: str, level: str) -> dict[str, Any]:
    """Return what is passed to `timm.create_model` to shrink an architecture."""
    return smaller(timm_arguments(name)[2], level)


def of_timm() -> Iterator[Named]:
    """Yield timm's architectures, those that are the same at toy size as one."""
    import timm

    groups: dict[str, list[str]] = {}
    for name in timm.list_models():
        model_class, passed, _ = timm_arguments(name)
        passed = {key: value for key, value in passed.items() if key not in ("img_size", "patch_size")}
        groups.setdefault(repr((model_class, {**passed, **timm_overrides(name, LEVELS[0])})), []).append(name)
    yield from map(_timm, groups.values())


def _timm(names: list[str]) -> Named:
    family = getattr(timm_arguments(names[0])[0], "__name__", str(timm_arguments(names[0])[0]))
    known = Shrunk(library="timm", family=family, names=names, save=_save_timm)
    return Named(known, lambda level: _timm_candidate(names[0], level))


def _timm_candidate(name: str, level: str) -> Candidate:
    import timm

    overrides = timm_overrides(name, level)
    known = timm.get_pretrained_cfg(name)
    native = known.input_size if known is not None else (3, 224, 224)
    side = overrides.get("img_size", STAGED_IMAGE if "image" in level or level == "all" else native[-1])
    size = (native[0], *(side if isinstance(side, list | tuple) else [side] * 2))
    overlay = {"input_size": size, "test_input_size": None}
    build = functools.partial(timm.create_model, name, num_classes=10, pretrained_cfg_overlay=overlay, **overrides)
    return build, size, json.dumps(overrides)


def _save_timm(model: nn.Module, folder: Path) -> None:
    from timm.models import get_model_args
    from timm.models._hub import save_for_hf

    save_for_hf(model, str(folder), model_args=get_model_args(model), safe_serialization=True)


# transformers


def of_transformers() -> Iterator[Named]:
    """Yield every class of transformers that `AutoModel` and its relatives build from a config that has images."""
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    by_type = {"": modeling_auto.MODEL_MAPPING_NAMES}
    for key in ("IMAGE_CLASSIFICATION", "MASKED_IMAGE_MODELING", "IMAGE", "BACKBONE", "IMAGE_TEXT_TO_TEXT"):
        by_type[key] = getattr(modeling_auto, f"MODEL_FOR_{key}_MAPPING_NAMES", {})
    seen: set[str] = set()
    for key, mapping in by_type.items():
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name in seen or not (key or _has_images(model_type, modeling_auto)):
                    continue
                seen.add(name)
                yield _transformers(name, model_type)


def _transformers(name: str, model_type: str) -> Named:
    known = Shrunk(library="transformers", family=model_type, names=[name], save=_save_transformers)
    return Named(known, lambda level: _transformers_candidate(name, model_type, level))


def _has_images(model_type: str, modeling_auto: Any) -> bool:
    """Whether models of a type take images: one of the image mappings has it, or its default config has a size."""
    words = ("IMAGE", "BACKBONE", "DEPTH", "SEGMENTATION", "DETECTION", "VIDEO", "KEYPOINT")
    maps = [key for key in vars(modeling_auto) if key.endswith("MAPPING_NAMES") and any(word in key for word in words)]
    if any(model_type in getattr(modeling_auto, key) for key in maps):
        return True
    try:
        known = _default_config(model_type).to_dict()
    except Exception:
        return False
    return "audio" not in model_type and any(key in known for key in ("vision_config", "image_size", "patch_size"))


def _default_config(model_type: str) -> Any:
    import transformers

    return transformers.CONFIG_MAPPING[model_type]()


def _transformers_candidate(name: str, model_type: str, level: str) -> Candidate:
    import transformers

    before = _default_config(model_type).to_dict()
    after = smaller_config(before, level)
    config = type(_default_config(model_type)).from_dict(copy.deepcopy(after))
    vision = next(
        (after[key] for key in ("vision_config", "backbone_config") if isinstance(after.get(key), dict)), after
    )
    side = next((vision[key] for key in ("image_size", "img_size") if vision.get(key)), STAGED_IMAGE)
    channels = vision.get("num_channels", 3)
    size = (channels if isinstance(channels, int) else 3, *(side if isinstance(side, list | tuple) else [side] * 2))
    model_class = getattr(transformers, name)
    return lambda: model_class(copy.deepcopy(config)), size, level


def _save_transformers(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]


# open_clip


TEXT = {"context_length": 16, "vocab_size": 64, "width": WIDTH, "heads": 2, "layers": 1}


def of_open_clip() -> Iterator[Named]:
    """Yield open_clip's pairs; a text tower from the hub is replaced by a small one of open_clip's own."""
    import open_clip

    groups: dict[str, list[str]] = {}
    for name in open_clip.list_models():
        groups.setdefault(json.dumps(_open_clip_config(name, LEVELS[0], None), sort_keys=True), []).append(name)
    yield from map(_open_clip, groups.values())


def _open_clip(names: list[str]) -> Named:
    import open_clip

    vision = open_clip.get_model_config(names[0])["vision_cfg"]
    family = "ModifiedResNet" if isinstance(vision.get("layers"), list) else "VisionTransformer"
    if "timm_model_name" in vision:
        family = f"{timm_arguments(vision['timm_model_name'].partition('.')[0])[0].__name__} of timm"
    known = Shrunk(library="open_clip", family=family, names=names, save=_save_open_clip)
    return Named(known, lambda level: _open_clip_candidate(names[0], level))


def _open_clip_config(name: str, level: str, folder: Path | None) -> dict[str, Any]:
    """Return a pair's config at a level; the shrunk config of a timm tower is written into a folder."""
    import open_clip

    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = WIDTH
    config["text_cfg"] = {**{k: v for k, v in text.items() if not k.startswith(("hf_", "tokenizer", "eos_id"))}, **TEXT}
    config.pop("multimodal_cfg", None)
    architecture = vision.get("timm_model_name", "").partition(".")[0]
    if architecture:
        overrides = timm_overrides(architecture, level)
        vision["image_size"] = overrides.get("img_size", STAGED_IMAGE if "image" in level or level == "all" else 224)
        said = {"architecture": architecture, "model_args": overrides, "pretrained_cfg": {}}
        if folder is None:
            vision["timm_model_name"] = said
        else:
            (folder / "trunk").mkdir(exist_ok=True)
            (folder / "trunk" / "config.json").write_text(json.dumps(said))
            vision["timm_model_name"] = f"local-dir:{folder / 'trunk'}"
        return config
    is_resnet = isinstance(vision["layers"], list)
    vision |= {"image_size": STAGED_IMAGE if is_resnet else IMAGE, "layers": [1, 1, 1, 1] if is_resnet else DEPTH}
    vision |= {"width": WIDTH, "head_width": WIDTH // 2} | ({} if is_resnet else {"patch_size": PATCH})
    return config


def _open_clip_candidate(name: str, level: str) -> Candidate:
    import open_clip

    side = _open_clip_config(name, level, None)["vision_cfg"]["image_size"]

    def build() -> nn.Module:
        folder = Path(tempfile.mkdtemp(prefix="registry-"))
        said = {
            "model_cfg": _open_clip_config(name, level, folder),
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(said))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        model.registry_folder = str(folder)
        return model

    return build, (3, side, side), level


def _save_open_clip(model: nn.Module, folder: Path) -> None:
    """Write weights and config; the trunk of a timm tower stays where it was built."""
    from safetensors.torch import save_file

    (folder / "open_clip_config.json").write_text((Path(model.registry_folder) / "open_clip_config.json").read_text())
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


LIBRARIES: dict[str, Callable[[], Iterator[Named]]] = {
    "timm": of_timm,
    "transformers": of_transformers,
    "open_clip": of_open_clip,
}


def named(library: str, name: str) -> Named:
    """Return one architecture, alone."""
    if library == "transformers":
        import transformers

        return _transformers(name, getattr(transformers, name).config_class.model_type)
    return {"timm": _timm, "open_clip": _open_clip}[library]([name])
