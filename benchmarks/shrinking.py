"""The rules by which `registry.py` shrinks an architecture to toy size: depth 2, narrow, small images.

Nothing is known of single architectures. What their constructors and configs call depth, width, heads, image and patch
size is set to little, by name, at any depth of nesting; where the library does not take that, less is shrunk, step by
step (`LEVELS`), until a model is built that fits `MAX_PARAMETERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.errors import SiteNotFoundError
from vitrim.models.load import origin_of
from vitrim.models.origin import on_meta
from vitrim.models.sites import find_mlps

MAX_PARAMETERS = 45_000_000
# Most is shrunk first; then patches and images stay as they are, then widths and heads, then all but depth, then all.
LEVELS = ("all", "depth, widths and image", "depth and widths", "depth and image", "depth", "nothing")
DEPTHS = re.compile(
    r"depth|depths|serial_depths|parallel_depth|layers|num_layers|num_blocks|stages|depth_list|num_blocks_list|n_layers?|transformer_depths|"
    r"(num_|encoder_|decoder_|num_encoder_|num_decoder_)?(hidden_|encoder_|decoder_)?layers|"
    r"(decoder_|num_)?num_hidden_layers|stage_num_blocks|stage_numb_of_layers"
)
WIDTHS = re.compile(
    r"embed_dims?|dims?|widths?|width_list|hidden_sizes?|hidden_dim|d_model|n_embd|out_hidden_size|"
    r"(encoder_|decoder_)hidden_(size|dim)|embedding_size|decoder_hidden_size|vision_hidden_size|text_hidden_size"
)
WIDER = re.compile(
    r"(\w+_)?intermediate_size|(encoder_|decoder_)?ffn_dim|mlp_dim|(\w+_)?dim_feedforward|ffn_hidden_size"
)
HEADS = re.compile(
    r"num_heads?|heads|n_head|num_heads_outer|(\w+_)?attention_heads|num_key_value_heads|decoder_num_heads|num_kv_heads"
)
IMAGES = re.compile(r"img_size|image_size|input_size")
PATCHES = re.compile(r"patch_size")
VOCABULARY, TOKENS = 320, re.compile(r"\w*_token_(id|index)|image_token|pad_index")
DEPENDENT = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "layer_types")
DEPENDENT += ("per_layer_config", "mlp_layer_types")
DEPTH, WIDTH, HIDDEN, NUM_HEADS, IMAGE, PATCH, STAGED_IMAGE = 2, 64, 96, 2, 48, 8, 64


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """An architecture at toy size, and the names of all that are the same at it.

    Attributes:
        library: name of its library.
        family: the class that it is of.
        names: the architectures.
        build: makes the model; None for one that can't be shrunk by rule.
        size: of its images.
        said: what was shrunk, or why it can't be.
        has_mlps: whether vitrim finds MLPs in it on the meta device; where not, it is not built in full.
        save: writes the model into a folder as its library does.
    """

    library: str
    family: str
    names: list[str]
    build: Callable[[], nn.Module] | None = None
    size: tuple[int, ...] = (3, IMAGE, IMAGE)
    said: str = ""
    has_mlps: bool = True
    save: Callable[[nn.Module, Path], Any] = field(default=lambda model, folder: None)


def smaller(values: Mapping[str, Any], level: str) -> dict[str, Any]:
    """Return those values of a constructor or config that are shrunk at a level, by name, with their new values."""
    found: dict[str, Any] = {}
    if level == "nothing":
        return found
    staged = any(DEPTHS.fullmatch(key) and isinstance(value, list | tuple) for key, value in values.items())
    patch = values.get("patch_size")
    smaller_patch = isinstance(patch, int) and patch > PATCH and level == "all"
    for key, value in values.items():
        kind = next((kind for kind in (DEPTHS, WIDTHS, WIDER, HEADS, IMAGES, PATCHES) if kind.fullmatch(key)), None)
        if (value is None and kind is not IMAGES) or isinstance(value, bool) or kind is None:
            continue
        if kind is DEPTHS:
            found[key] = _depth(value)
        elif kind in (WIDTHS, WIDER, HEADS) and ("widths" in level or level == "all"):
            found[key] = _narrow(value, kind, staged)
        elif kind is IMAGES and ("image" in level or level == "all"):
            side = IMAGE if smaller_patch and not staged else STAGED_IMAGE
            if isinstance(patch, int) and not smaller_patch:
                side = patch * max(2, round(side / patch))
            found[key] = type(value)([side] * len(value)) if isinstance(value, list | tuple) else side
        elif kind is PATCHES and smaller_patch:
            found[key] = PATCH
    return {key: value for key, value in found.items() if value != values[key]}


def _depth(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_depth(item) if isinstance(item, list | tuple) else min(item, 1) for item in value)
    return min(value, DEPTH) if isinstance(value, int) else value


def _narrow(value: Any, kind: re.Pattern[str], staged: bool) -> Any:
    """Return narrow widths or few heads; of several widths the proportions stay."""
    if kind is HEADS:
        return (
            type(value)(_narrow(item, kind, staged) for item in value)
            if isinstance(value, list | tuple)
            else (min(value, NUM_HEADS))
        )
    few = HIDDEN if kind is WIDER else WIDTH // 2 if staged else WIDTH
    if isinstance(value, int):
        return min(value, few)
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) and item for item in value):
        return type(value)(min(item, few * min(4, max(1, round(item / min(value))))) for item in value)
    return value


def has_mlps(model: nn.Module) -> bool:
    """Whether vitrim finds MLPs in a model."""
    try:
        return bool(find_mlps(model, scope=origin_of(model).encoder))
    except SiteNotFoundError:
        return False
    except Exception:  # of vitrim's own code: the steps show it
        return True


def runs(model: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether a model takes images of this size."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(2, *size))
    except Exception:
        return False
    return True


Candidate = tuple[Callable[[], nn.Module], tuple[int, ...], str]


@dataclass(frozen=True)
class Named:
    """An architecture that is not shrunk yet, and what its library would build at a level, of images of which size."""

    known: Shrunk
    candidate: Callable[[str], Candidate]

    def shrunk(self) -> Shrunk:
        """Return the architecture at the first level at which its library builds it and it runs, if there is one."""
        known, candidate = self.known, self.candidate
        reasons, built = [], None
        for level in LEVELS:
            try:
                build, size, said = candidate(level)
                empty = on_meta(build)
                found = replace(known, build=build, size=size, said=f"{level}: {said}")
                if not has_mlps(empty):
                    return replace(found, has_mlps=False)
                if sum(parameter.numel() for parameter in empty.parameters()) > MAX_PARAMETERS:
                    reasons.append("too large")
                    continue
                if runs(build(), size):
                    return found
                built = built or found
                reasons.append("does not run")
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {str(error)[:80]}")
        # One that is built and takes no images (a detector, a model of patches) is for vitrim to refuse.
        return built or replace(known, said="; ".join(dict.fromkeys(reasons)))


def smaller_config(values: Any, level: str) -> Any:
    """Return a config as a dict, shrunk at any depth."""
    is_config = {
        key: isinstance(value, dict) and all(isinstance(k, str) for k in value) for key, value in values.items()
    }
    found = {key: smaller_config(value, level) if is_config[key] else value for key, value in values.items()}
    found |= smaller(found, level)
    for key in DEPENDENT:  # on the depth; the config works them out
        found.pop(key, None)
    if isinstance(found.get("vocab_size"), int):
        found["vocab_size"] = min(found["vocab_size"], VOCABULARY)
    for key, value in found.items():
        if TOKENS.fullmatch(key) and isinstance(value, int) and value >= VOCABULARY:
            found[key] = VOCABULARY - 1 - sum(map(ord, key)) % 50
        if key in ("deepstack_visual_indexes", "fullatt_block_indexes") and isinstance(value, list):
            found[key] = [min(index, at) for at, index in enumerate(value[:DEPTH])]
        if key == "mrope_section" and isinstance(value, list):
            found[key] = [WIDTH // NUM_HEADS // 2 - 2 * (len(value) - 1), *[2] * (len(value) - 1)]
        if key == "head_dim" and isinstance(value, int) and ("widths" in level or level == "all"):
            found[key] = WIDTH // NUM_HEADS
    return found
