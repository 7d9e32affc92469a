"""Writes the factors of a model's adapters as PEFT does, so that `peft` can put them on the model they were trained on.

An OP-LoRA adapter is written as the ordinary LoRA that it amounts to. Nothing is read back here; PEFT does that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.errors import OutputError, RecipeError
from vitrim.layers.adapters import find_adapters
from vitrim.models.origin import require

PREFIX, OUTPUT, WEIGHTS = "base_model.model.", ".base_layer.out_proj", "adapter_model.safetensors"


def check_peft(model: nn.Module) -> None:
    """Refuse before training whatever `save_adapter` could not write after it.

    Raises:
        MissingExtraError: peft is not installed.
        RecipeError: an adapter is on a weight of torch's attention that PEFT gets wrong or can't name.
    """
    require("peft", "adapters")
    attentions = _attentions(model)
    for place, _ in find_adapters(model):
        parent, _, last = place.path.rpartition(".")
        if last == "out_proj" and parent in attentions:
            reason = "PEFT adds it twice (up to 0.21.2 at least; its pull request 3774)"
        elif place.path in attentions and place.tensor != "in_proj_weight":
            reason = "PEFT has no layout for separate query, key and value matrices"
        else:
            continue
        raise RecipeError(f"recover.adapter.save: {place.name}: {reason}; leave save out, or name other targets.")


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, over those that are there.

    Args:
        model: with adapters attached, all of one rank and alpha.
        folder: where to write; made where it is missing.

    Raises:
        OutputError: the folder can't be written.
    """
    peft: Any = require("peft", "adapters")
    factors = peft_factors(model)
    adapter = next(adapter for _, adapter in find_adapters(model))
    targets = sorted({name for name in factors if not name.endswith(OUTPUT)})
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets, inference_mode=True)
    tensors = {}
    for name, (a_RN, b_MR) in factors.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a_RN, f"{PREFIX}{name}.lora_B.weight": b_MR}
    try:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    except OSError as error:
        raise OutputError(f"{folder}: the adapter can't be written ({error.strerror or error}).") from None


def peft_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors A (R, N) and B (M, R) of each adapter, on the CPU, by the name that PEFT gives its layer.

    PEFT adapts torch's attention as a whole and names its output projection below it, which gets one that adds nothing.
    """
    attentions = _attentions(model)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for place, adapter in find_adapters(model):
        with torch.no_grad():
            a_RN, b_MR = (factor.to("cpu", copy=True).contiguous() for factor in adapter.factors())
        found[place.path] = a_RN, b_MR
        if place.path in attentions:
            width = attentions[place.path].embed_dim
            found[f"{place.path}{OUTPUT}"] = torch.zeros(adapter.rank, width), torch.zeros(width, adapter.rank)
    return found


def _attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
