"""Builds the edit after which each head of an attention has other mixtures of its dimensions.

Shapes: G heads, F dimensions of a head, K kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrim.ops.gram_schmidt import working_dtype
from vitrim.surgery.keep_head_dims import KeepHeadDims
from vitrim.surgery.keep_padded_dims import KeepPaddedDims
from vitrim.surgery.modules import submodule
from vitrim.types import AttentionSite


def mix_heads(
    attention: nn.Module, site: AttentionSite, mixtures: Mapping[str, Tensor], output: Mapping[str, Tensor]
) -> KeepHeadDims | KeepPaddedDims:
    """Return the edit that mixes the dimensions of an attention's heads.

    Args:
        attention: the module at the site, with the tensors that are mixed.
        site: the attention; `mixes` says which edit it takes.
        mixtures: for "q", "k" and "v" the mixture of each head (G, K, F); one that is missing changes nothing.
        output: weight and bias of the output projection behind the mixed values; none changes nothing.
    """
    eye_GFF = torch.eye(site.head_dim).expand(site.num_heads, -1, -1)
    num_qk, num_v = (mixtures.get(role, eye_GFF).shape[1] for role in ("q", "v"))
    first = {num: (tuple(range(num)),) * site.num_heads for num in (num_qk, num_v)}
    parts: dict[str, list[Tensor]] = {}
    for role, path in (("q", site.query), ("k", site.key), ("v", site.value)):
        name = path if site.mixes else f"{site.path}.{role}"
        for part, rows in _rows(attention, site, path, role, mixtures.get(role)).items():
            parts.setdefault(f"{name}.{part}", []).append(rows)
    behind = site.output if site.mixes else f"{site.path}.proj"
    tensors = {name: torch.cat(rows).contiguous() for name, rows in parts.items()}
    tensors |= {f"{behind}.{part}": tensor.contiguous() for part, tensor in output.items()}
    if site.mixes:
        return KeepPaddedDims(site=site, num_qk=num_qk, num_v=num_v, tensors=tensors)
    return KeepHeadDims(site=site, keep_qk=first[num_qk], keep_v=first[num_v], tensors=tensors)


def _rows(
    attention: nn.Module, site: AttentionSite, path: str, role: str, mixture_GKF: Tensor | None
) -> dict[str, Tensor]:
    """Return weight and bias of one projection with each head's rows mixed."""
    found = {}
    for part, tensor in submodule(attention, path.removeprefix(f"{site.path}.")).named_parameters(recurse=False):
        rows = tensor.detach().to(working_dtype(tensor.device))
        rows = rows.chunk(3)["qkv".index(role)] if site.fused else rows
        if mixture_GKF is not None:
            heads = rows.unflatten(0, (site.num_heads, site.head_dim))
            rows = torch.einsum("gkf,gf...->gk...", mixture_GKF.to(rows), heads).flatten(0, 1)
        found[part] = rows
    return found


def turned(attention: nn.Module, site: AttentionSite) -> KeepHeadDims | KeepPaddedDims:
    """Return an edit that changes nothing if the dimensions of the site's heads may be mixed as it says.

    Values are mixed by invertible matrices that are undone in the output projection; queries, unless values alone are
    to be mixed, by others that are undone in the keys.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (site.num_heads, site.head_dim, site.head_dim)
    turns, _ = torch.linalg.qr(torch.randn(2, *shape, generator=generator, dtype=torch.float64))
    spread = torch.linspace(0.5, 2, site.head_dim, dtype=torch.float64)
    turns = turns * spread
    back = torch.linalg.inv(turns)
    output = submodule(attention, site.output.removeprefix(f"{site.path}."))
    named = {name: tensor.detach() for name, tensor in output.named_parameters(recurse=False)}
    weight = named["weight"].double().unflatten(1, (site.num_heads, site.head_dim))
    named["weight"] = torch.einsum("dgf,gfk->dgk", weight, back[0]).flatten(1)
    mixtures = {"v": turns[0]}
    if site.mixes != "values":
        mixtures |= {"q": turns[1], "k": back[1].mT}
    return mix_heads(attention, site, mixtures, named)
