"""Find the linear and convolution layers of any module, and say which can't be replaced by another module.

Foreign classes are never named. torch's own are known by their exact type, since a subclass may compute something else;
another module that looks like a linear layer is run, to see whether it is one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vitrim.layers.low_rank import LowRankConv, LowRankLinear
from vitrim.types import LayerKind, LayerSite

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PACKED = "nn.MultiheadAttention reads its weights, in_proj's and out_proj's, and calls no layer"
TIED = "its parameters are also another layer's"


def find_layers(model: nn.Module, *, factors: bool = False) -> tuple[LayerSite, ...]:
    """Find every linear and convolution layer of a model, in the order of its modules.

    Args:
        model: any module; a layer on the meta device that is not torch's own is judged by its attributes alone.
        factors: whether to include the two factors of a layer that was replaced before.

    Returns:
        One site a layer. If no other module can replace the layer, its `fixed` says why.
    """
    holders = Counter(
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in _own(module).values()
    )
    return tuple(_find(model, "", holders, factors))


def _find(module: nn.Module, prefix: str, holders: Counter[int], factors: bool) -> Iterator[LayerSite]:
    """Yield the layers below a module; a shared one at its first place."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, LowRankLinear | LowRankConv):
            yield from _find(child, f"{path}.", holders, factors) if factors else ()
            continue
        tied = any(holders[id(parameter)] > 1 for parameter in _own(child).values())
        packed = name == "out_proj" and bool({"in_proj_weight", "q_proj_weight"} & _own(module).keys())
        site = _site(child, path, PACKED if packed else TIED if tied else "")
        if site is None:
            yield from _find(child, f"{path}.", holders, factors)
        else:
            yield site


def _site(module: nn.Module, path: str, fixed: str) -> LayerSite | None:
    """Return the site of a module, or None if it is no linear or convolution layer."""
    weight, bias = (_own(module).get(name) for name in ("weight", "bias"))
    if weight is None or not weight.is_floating_point() or not _own(module).keys() <= {"weight", "bias"}:
        return None
    if type(module) in CONVOLUTIONS:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return LayerSite(
            path=path,
            kind="conv",
            num_in=module.in_channels,
            num_out=module.out_channels,
            groups=module.groups,
            kernel=tuple(module.kernel_size),
            has_bias=bias is not None,
            fixed=fixed,
        )
    kind = _linear_kind(module, weight)
    if kind is None:
        return None
    num_out, num_in = weight.shape if kind == "linear" else reversed(weight.shape)
    return LayerSite(path=path, kind=kind, num_in=num_in, num_out=num_out, has_bias=bias is not None, fixed=fixed)


def _linear_kind(module: nn.Module, weight: Tensor) -> LayerKind | None:
    """Return which kind of linear layer a module is, by its attributes and its output; None if it is none."""
    if weight.ndim != 2 or any(True for _ in module.children()):
        return None
    if (getattr(module, "out_features", None), getattr(module, "in_features", None)) == tuple(weight.shape):
        return "linear" if type(module) is nn.Linear or _puts_out(module, weight) else None
    if getattr(module, "nf", None) == weight.shape[1] and _puts_out(module, weight.T):
        return "transposed_linear"
    return None


def _puts_out(module: nn.Module, weight_MN: Tensor) -> bool:
    """Whether a module multiplies by a matrix, adds its bias, and does nothing else."""
    if weight_MN.is_meta:
        return True
    module = copy.deepcopy(module).float().eval()
    tokens = torch.randn(2, weight_MN.shape[1], generator=torch.Generator().manual_seed(0)).to(weight_MN.device)
    with torch.no_grad():
        expected = nn.functional.linear(tokens, weight_MN.float(), _own(module).get("bias"))
        try:
            found = module(tokens)
        except Exception:  # foreign code, which may ask for other arguments or another shape, may raise anything
            return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters by name."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
