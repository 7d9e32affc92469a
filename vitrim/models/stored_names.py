"""Names of tensors in files of transformers: those of the hub and of versions 4, where version 5 has others in memory.

Version 5 renames modules of many models and converts names when it loads a file. A file in its new names would be read
by version 4, too, but with most weights left at random, and no more than a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from vitrim.models.origin import same_names


def names(model: nn.Module, fakes: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Map names in a file to names in the model, by transformers' own rules for names of older versions."""
    conversion, loading = _renaming_modules()
    if conversion is None or loading is None:
        return same_names(model, fakes)
    known = model.state_dict()
    rules = conversion.get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, loading.WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)  # in front of the names of a larger relative
    found = {}
    for name in fakes:
        new, converted = loading.rename_source_key(name, renamings, converters, prefix, known)
        if new not in known and name in known:
            new, converted = name, None
        if converted is None and new in known:
            found[name] = new
    return found


def stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a model's tensors under the names that files of the hub have, by transformers' own rules, reversed.

    Where these would convert tensors, and not only rename them, the model's names stay.
    """
    conversion, loading = _renaming_modules()
    if conversion is None or loading is None:
        return tensors
    rules = conversion.get_model_conversion_mapping(model, add_legacy=False)
    had, before = hasattr(model, "_weight_conversions"), getattr(model, "_weight_conversions", None)
    try:  # all of them: transformers itself leaves out prefixes that the file which a model came from did not have
        model._weight_conversions = [rule for rule in rules if not _doubles(rule)]  # type: ignore[assignment]
        found = loading.revert_weight_conversion(model, dict(tensors))
    finally:
        if had:
            model._weight_conversions = before  # type: ignore[assignment]
        else:
            del model._weight_conversions
    back = names(model, found)
    pure = len(found) == len(tensors) and all(found[name] is tensors.get(back.get(name, "")) for name in found)
    return found if pure else tensors


def _doubles(rule: Any) -> bool:
    """Return whether a rule for a part of a model, reversed, puts the part's own name in front once more.

    The image tower of CLIP has `vision_model.` in front by itself and as `vision_tower`, but not as `vision_model`.
    """
    prefix, scope = getattr(rule, "prefix_to_remove", None), getattr(rule, "scope_prefix", None)
    return prefix is not None and prefix == (scope or "").strip(".").rpartition(".")[2]


def _renaming_modules() -> tuple[Any, Any]:
    """Return transformers 5's modules that rename on loading; None for older versions, which don't rename."""
    try:
        return import_module("transformers.conversion_mapping"), import_module("transformers.core_model_loading")
    except ImportError:
        return None, None
