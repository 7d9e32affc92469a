"""Find MLPs by what they do: linear layers that feed one another through a pointwise function, under any names.

A convolution of 1 x 1 is a linear layer, too, of maps whose channels come first.

The smallest module that holds two linear layers of fitting shapes is run on noise. In a copy of it each linear layer is
replaced by one that notes its input and puts out noise, so no layer is seen through another, no weight is read, and a
module on the meta device runs too. Which layers feed which, and unit by unit, is then read from gradients.

Shapes: N tokens, H hidden units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from vitrim.surgery import noises

# (gate, value, output, inner norm): paths within the container.
Found = tuple[str | None, str, str, str | None]


def linear_at(container: nn.Module, name: str) -> nn.Module | None:
    """Return a linear layer below a container by name, or None; a convolution of 1 x 1 is one.

    Its weight must be (out, in) and a parameter of its own, or computed by a parametrization.
    """
    try:
        layer = container.get_submodule(name)
    except AttributeError:
        return None
    weight = getattr(layer, "weight", None)
    plain = isinstance(weight, nn.Parameter) or is_computed(layer)
    return layer if plain and weight is not None and tuple(weight.shape) == _weight_shape(layer) else None


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape that a layer's weight has if it is linear, or a convolution that looks at one position alone."""
    if isinstance(layer, nn.Conv2d):
        alone = layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1
        return (*_shape(layer), 1, 1) if alone and layer.padding in ((0, 0), "same", "valid") else ()
    return _shape(layer)


def is_computed(layer: nn.Module) -> bool:
    """Whether a parametrization of torch, such as weight norm, makes a layer's weight out of other tensors."""
    return is_parametrized(layer, "weight") or isinstance(getattr(layer, "weight_g", None), nn.Parameter)


def is_norm_over(module: nn.Module | None, d_hidden: int) -> bool:
    """Whether a module may be a norm over hidden units: all of its parameters have one number for each."""
    shapes = [] if module is None else [parameter.shape or (0,) for parameter in module.parameters()]
    return bool(shapes) and all(math.prod(shape) == shape[-1] == d_hidden for shape in shapes)


def containers(root: nn.Module, claimed: Collection[str]) -> Iterator[tuple[str, dict[str, nn.Module], list[str]]]:
    """Yield the smallest modules that hold two linear layers which may form an MLP, by their shapes.

    Args:
        root: the module to search; it is not run.
        claimed: paths of linear layers that belong to an MLP already.

    Yields:
        Path of a container, its linear layers by their paths within it, and which of them may be output projections. A
        container never holds several blocks.
    """
    below: dict[str, dict[str, nn.Module]] = {}
    for path in [name for name, _ in root.named_modules() if name]:
        layer = linear_at(root, path)
        if layer is None:
            continue
        for around in _ancestors(path):
            below.setdefault(around, {})[path.removeprefix(f"{around}.") if around else path] = layer
    lists = [path for path in below if _is_list_of_blocks(root, path, below)]
    too_large = {around for path in lists for around in (path, *_ancestors(path))}
    chosen: dict[str, list[str]] = {}
    for path in below[""] if "" in below else ():
        for around in _ancestors(path) if path not in claimed else ():
            if around in too_large:
                break
            name = path.removeprefix(f"{around}.") if around else path
            own = {key for key in below[around] if f"{around}.{key}".strip(".") not in claimed}
            is_run = not isinstance(root.get_submodule(around), nn.ModuleList | nn.ModuleDict)
            if is_run and own & _fitting(below[around], name):
                chosen.setdefault(around, []).append(name)
                break
    for around, outputs in chosen.items():
        yield around, below[around], outputs


def _ancestors(path: str) -> list[str]:
    """Return the paths of all modules around a path, the nearest first and the root last."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]


def _is_list_of_blocks(root: nn.Module, path: str, below: Mapping[str, Mapping[str, nn.Module]]) -> bool:
    """Whether a module is a list of which two or more members hold several linear layers each."""
    module = root.get_submodule(path)
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    return sum(len(below.get(f"{path}.{name}".strip("."), ())) > 1 for name, _ in module.named_children()) > 1


def _fitting(layers: Mapping[str, nn.Module], output: str) -> set[str]:
    """Return the linear layers that may feed one of them: as wide as its output, as tall as its input or twice."""
    d_out, d_hidden = _shape(layers[output])
    shapes = {name: _shape(layer) for name, layer in layers.items() if name != output}
    return {name for name, (height, width) in shapes.items() if width == d_out and height in (d_hidden, 2 * d_hidden)}


def traced(container: nn.Module, layers: Mapping[str, nn.Module], outputs: Sequence[str]) -> list[Found]:
    """Run a container on noise, and return the linear layers in it that are an MLP's.

    Args:
        container: the module to run; a copy is, without its linear layers' weights.
        layers: its linear layers by their paths within it.
        outputs: which of these may be output projections.

    Returns:
        One entry for each output projection that a layer feeds through a pointwise function, or two by their product.

    Raises:
        Exception: whatever the container raises when it can't be run on noise alone.
    """
    widths: dict[int, list[str]] = {}
    for name in outputs:
        widths.setdefault(_shape(layers[name])[0], []).append(name)
    found: dict[str, Found] = {}
    failed: list[Exception] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for width, ends in widths.items():  # what is as wide as the container's own input
            try:
                for norm in [None, *_norms(container, layers, ends)]:
                    stubs = _run(container, layers, norm, width)
                    feeders = {end: _feeders(stubs, end) for end in ends if end not in found}
                    found |= {end: (*feeding, end, norm) for end, feeding in feeders.items() if feeding is not None}
            except Exception as error:  # foreign code that wants something else may raise anything
                failed.append(error)
    if len(failed) == len(widths):
        raise failed[0]
    return list(found.values())


class _Stub(nn.Module):
    """Stands for a linear layer, and puts out noise."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.out_features, self.in_features = self.out_channels, self.in_channels = _shape(layer)
        self.is_conv = isinstance(layer, nn.Conv2d)
        self.weight = torch.zeros(1).expand(self.out_features, self.in_features)  # foreign code may ask for its type
        self.bias = None
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.movedim(1, -1) if self.is_conv else inputs
        if tokens.shape[-1] != self.in_features:
            raise ValueError(f"an input of width {tokens.shape[-1]}, not {self.in_features}")
        output = torch.randn(*tokens.shape[:-1], self.out_features, requires_grad=True)
        self.calls.append((tokens, output))
        return output.movedim(-1, 1) if self.is_conv else output


@dataclass(frozen=True)
class _Grads:
    """How the input of an output projection (N, H) depends on one layer's output (N, H), unit by unit."""

    grad_NH: Tensor
    output_NH: Tensor

    def enters_linearly(self, hidden_NH: Tensor) -> bool:
        """Whether the hidden units are this output times what does not depend on it."""
        return torch.allclose(self.grad_NH * self.output_NH, hidden_NH, rtol=1e-4, atol=1e-5)

    @property
    def is_fixed(self) -> bool:
        """Whether each unit is only scaled, by the same at every token: no function stands in between."""
        return bool((self.grad_NH - self.grad_NH[:1]).abs().max() <= 1e-6 * self.grad_NH.abs().max())


def _run(container: nn.Module, layers: Mapping[str, nn.Module], norm: str | None, width: int) -> dict[str, _Stub]:
    """Run a copy of a container with stubs in place of its linear layers, and return these.

    It is run on the first kind of noise that it takes; if it takes none, the first error is raised.
    """
    failed: list[Exception] = []
    for noise in noises(width):
        stubs = {name: _Stub(layer) for name, layer in layers.items()}
        module = _filled_(copy.deepcopy(container, {id(layer): stubs[name] for name, layer in layers.items()}))
        if norm is not None:
            module.get_submodule(norm).register_forward_hook(lambda _, args, output: args[0])
        try:
            module(noise.requires_grad_())  # torch's attention calls no layer where nothing needs gradients
            return stubs
        except Exception as error:
            failed.append(error)
    raise failed[0]


def _filled_(module: nn.Module) -> nn.Module:
    """Put a module into float32 on the CPU and eval mode, with noise for all parameters: a norm's may still be zero."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.randn(parameter.shape)))
    return module.to("cpu", torch.float32).eval()


def _norms(container: nn.Module, layers: Mapping[str, nn.Module], outputs: Sequence[str]) -> list[str]:
    """Return the modules that may norm the hidden units in front of an output projection."""
    sizes = {_shape(layers[name])[1] for name in outputs}
    found = [name for name, module in container.named_modules() if any(is_norm_over(module, size) for size in sizes)]
    return [name for name in found if name]


def _feeders(stubs: Mapping[str, _Stub], output: str) -> tuple[str | None, str] | None:
    """Return gate and value projection behind an output projection's input, or None if it is no pointwise function."""
    if len(stubs[output].calls) != 1 or not stubs[output].calls[0][0].requires_grad:
        return None
    hidden = stubs[output].calls[0][0]
    called = {name: stub.calls[0][1] for name, stub in stubs.items() if len(stub.calls) == 1 and name != output}
    grads = _pointwise(hidden.flatten(0, -2), called) if called else None
    if grads is None or not 1 <= len(grads) <= 2:
        return None
    if len(grads) == 1:
        ((name, parts),) = grads.items()
        return (None, name) if len(parts) == 2 or not parts[0].is_fixed else None
    if any(len(parts) != 1 for parts in grads.values()):
        return None
    hidden_NH = hidden.detach().flatten(0, -2)
    linear = [name for name, parts in grads.items() if parts[0].enters_linearly(hidden_NH)]
    if not linear:
        return None
    value = linear[-1]
    return next(name for name in grads if name != value), value


def _pointwise(hidden_NH: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, list[_Grads]] | None:
    """Return the gradients of each layer that feeds hidden units, one part a layer or two if it is twice as tall.

    None if a hidden unit depends on another unit, or another token: each half of them, drawn at random, must have no
    gradient outside of itself.
    """
    half_NH = torch.rand(hidden_NH.shape) < 0.5
    total: dict[str, Tensor] = {}
    for mask_NH in (half_NH, ~half_NH):
        grads = torch.autograd.grad(
            hidden_NH, list(outputs.values()), mask_NH.to(hidden_NH), retain_graph=True, allow_unused=True
        )
        for name, grad in zip(outputs, grads, strict=True):
            if grad is None:
                continue
            grad_NK = grad.flatten(0, -2)
            groups = grad_NK.shape[1] // hidden_NH.shape[1]
            if groups not in (1, 2) or grad_NK.shape != (len(hidden_NH), groups * hidden_NH.shape[1]):
                return None
            if bool((grad_NK[~mask_NH.repeat(1, groups)] != 0).any()):
                return None
            total[name] = total[name] + grad_NK if name in total else grad_NK
    found, size = {}, hidden_NH.shape[1]
    for name, grad_NK in total.items():
        output_NK = outputs[name].detach().flatten(0, -2)
        parts = zip(grad_NK.split(size, 1), output_NK.split(size, 1), strict=True)
        found[name] = [_Grads(grad_NH, output_NH) for grad_NH, output_NH in parts]
    silent = any(not bool(part.grad_NH.any()) for parts in found.values() for part in parts)
    return None if silent else found


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Return how many outputs and inputs a linear layer or a convolution has, 0 for another module."""
    what = "channels" if isinstance(layer, nn.Conv2d) else "features"
    return getattr(layer, f"out_{what}", 0), getattr(layer, f"in_{what}", 0)
