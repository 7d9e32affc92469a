"""The dead-unit test: whether cutting hidden units of a presumed MLP has the effect that it must have."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vitrim.surgery.edits import apply_
from vitrim.surgery.keep_units import KeepUnits
from vitrim.surgery.modules import run_mlp, weight_of
from vitrim.types import MlpSite


def verify_site(model: nn.Module, site: MlpSite) -> bool:
    """Whether removing hidden units gives the same output as zeroing their columns of the output projection.

    A norm over the hidden units is bypassed for the comparison: removing units changes its statistics, by design.
    """
    container = model.get_submodule(site.path) if site.path else model
    weight = weight_of(model, site.output)
    if weight.is_meta:
        return True
    container = copy.deepcopy(container).float().eval()
    local = site.within(site.path)
    if local.norm is not None:
        container.get_submodule(local.norm).register_forward_hook(lambda _, args, output: args[0])
    tokens = torch.randn(1, 4, site.d_model, generator=torch.Generator().manual_seed(0)).to(weight.device)
    keep = tuple(range(0, site.d_hidden, 2))
    with torch.no_grad():
        weight_of(container, local.output)[:, 1::2] = 0
        try:
            masked = run_mlp(container, local, tokens)
            apply_(container, [KeepUnits(site=local, keep=keep)])
            cut = run_mlp(container, local, tokens)
        except Exception:  # foreign code, such as a forward with the hidden size written into it, may raise anything
            return False
    scale = masked.abs().max().clamp(min=1e-6)
    return bool((masked - cut).abs().max() <= 1e-4 * scale)
