"""Gradient steps whose size is a share of each weight's own norm, so that no rate depends on anybody's scale.

A matrix moves along its momentum made orthogonal (Muon's rule), so that weak directions learn as fast as strong ones.
Its bias is one more column, fed with the root mean square of the layer's inputs: what a bias shifts is measured by what
the weights add up to. Vectors that scale something (norms, layer scale) move by Adam's direction times their own size,
and vectors that are added behind them by what they are added to.

Weights that are rescaled without changing the function then take the same path: a gain into the weights behind it, a
layer scale into the projection before it, a unit's value into its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.ops.gram_schmidt import working_dtype
from vitrim.ops.orthogonal import orthogonalized
from vitrim.share import ALONE, Share
from vitrim.types import MlpSite

MOMENTUM = 0.95
# Of vectors, as in Adam; and their steps as a share of those of matrices.
VECTOR_MOMENTUM, VECTOR_SQUARES, VECTOR_SHARE = 0.9, 0.99, 0.1


class RelativeSteps:
    """An optimizer for some parameters of a module; `close` takes its hooks off, and what runs then is not measured.

    What it remembers lies in `state`, by parameter, in tensors, as torch's own optimizers have it; and so does the
    size of steps, as `lr` in `param_groups`.

    Args:
        module: what is trained; it must have run before the first step, for the sizes of the layers' inputs.
        parameters: the parameters of the module that are trained.
        gated: weights that hold gates in their first half of rows and values in the other: two matrices.
        scales_M: by weight, factors (M,) that the layer's outputs meet behind it; steps are measured behind them.
        norms: by weight without a bias, the norm to take in place of its own, which may be zero.
        dtype: type in which directions are computed.
        mean: joins a number over the processes that share the data: their mean, or their sum.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        gated: Sequence[nn.Parameter] = (),
        scales_M: Mapping[nn.Parameter, Tensor] | None = None,
        norms: Mapping[nn.Parameter, float] | None = None,
        dtype: torch.dtype = torch.float32,
        mean: Callable[[float], float] = float,
    ) -> None:
        self.dtype, self.mean = dtype, mean
        self.parameters = list(parameters)
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "decays": False}]
        wanted = {id(p): p for p in parameters}
        halved, scales = {id(p) for p in gated}, {id(p): scale for p, scale in (scales_M or {}).items()}
        self.matrices: list[_Matrix] = []
        self.vectors: list[_Vector] = []
        self.handles: list[Any] = []
        for layer in module.modules():
            own = {name: wanted.pop(id(p)) for name, p in layer.named_parameters(recurse=False) if id(p) in wanted}
            weight, bias = own.get("weight"), own.get("bias")
            if weight is not None and weight.ndim > 1 and bias is not None and len(own) == 2:
                self._add_layer(layer, weight, bias, 2 if id(weight) in halved else 1, scales.get(id(weight)))
                continue
            for p in own.values():
                if p.ndim > 1:
                    num_parts = 2 if id(p) in halved else 1
                    matrix = _Matrix(p, self.state, num_parts=num_parts, scale_M=scales.get(id(p)))
                    matrix.norm = (norms or {}).get(p)
                    self.matrices.append(matrix)
                else:  # a norm's bias is added to what its gain scales
                    beside = weight if p is bias and weight is not None else p
                    self.vectors.append(_Vector(p, self.state, beside=beside))

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter against its gradient, a matrix by `lr` times its norm at the beginning."""
        for each in (*self.matrices, *self.vectors):
            each.measure(self.mean)
        for each in (*self.matrices, *self.vectors):
            each.step_(self.param_groups[0]["lr"], self.dtype)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for p in self.parameters:
            p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p)

    def close(self) -> None:
        """Take off the hooks that measure the sizes of layers' inputs in front of the first step."""
        for handle in self.handles:
            handle.remove()

    def _add_layer(
        self, layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter, num_parts: int, scale_M: Tensor | None
    ) -> None:
        transposed = len(bias) != len(weight) or hasattr(layer, "nf")  # transformers' Conv1D holds (in, out)
        matrix = _Matrix(weight, self.state, bias=bias, num_parts=num_parts, transposed=transposed, scale_M=scale_M)

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if weight not in self.state:
                values = args[0].detach()
                matrix.seen[0] += float(values.float().square().mean()) * values.numel()
                matrix.seen[1] += values.numel()

        self.handles.append(layer.register_forward_pre_hook(see))
        self.matrices.append(matrix)


@dataclass(eq=False)
class _Matrix:
    """A layer's weight with its bias as one more column.

    `seen` are the sum of squares and the number of the layer's inputs in front of the first step. `norm` is what its
    steps are shares of, None for its own.
    """

    weight: nn.Parameter
    state: dict[nn.Parameter, dict[str, Tensor]]
    bias: nn.Parameter | None = None
    num_parts: int = 1
    transposed: bool = False
    scale_M: Tensor | None = None
    seen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    norm: float | None = None

    def measure(self, mean: Callable[[float], float]) -> None:
        """Settle, before the first step, how large the layer's inputs and its weights are."""
        if self.weight in self.state:
            return
        square, count = (0.0, 1.0) if self.bias is None else (mean(each) for each in self.seen)
        size = math.sqrt(square / (count or 1.0)) or 1.0
        values = self._parts(self.weight, self.bias, self._scales()[0], 1 / size)
        given = None if self.norm is None else self.norm / math.sqrt(self.num_parts)
        kept = {f"norm{n}": _number(float(part.norm()) if given is None else given) for n, part in enumerate(values)}
        self.state[self.weight] = {"size": _number(size), **kept, "momentum": torch.zeros_like(torch.cat(list(values)))}

    def step_(self, share: float, dtype: torch.dtype) -> None:
        if self.weight.grad is None:
            return
        kept = self.state[self.weight]
        _, inverse_M1 = self._scales()
        size = float(kept["size"])
        bias_grad = None if self.bias is None else self.bias.grad
        gradients = self._parts(self.weight.grad, bias_grad, inverse_M1, size)
        moves = []
        for number, momentum in enumerate(kept["momentum"].chunk(self.num_parts)):
            gradient, norm = gradients[number], float(kept[f"norm{number}"])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            turned = orthogonalized(gradient.lerp(momentum, MOMENTUM), dtype)
            moves.append(turned * (share * norm / turned.norm().clamp(min=torch.finfo(turned.dtype).tiny)))
        self._move_(torch.cat(moves) * inverse_M1, size)

    def _scales(self) -> tuple[Tensor, Tensor]:
        """Return the factors behind the layer and their inverses, (M, 1); where one is next to nothing, 0."""
        if self.scale_M is None:
            one = self.weight.new_ones(1, 1, dtype=torch.float32)
            return one, one
        scale_M1 = self.scale_M.to(self.weight.device).float()[:, None]
        seen = scale_M1.abs() > 1e-3 * scale_M1.abs().max()
        return scale_M1, torch.where(seen, 1 / scale_M1, 0.0)

    def _parts(self, weight: Tensor, bias: Tensor | None, scale_M1: Tensor, size: float) -> Sequence[Tensor]:
        """Return weight and bias side by side, one matrix for each part of the rows."""
        rows = weight.detach().float()
        rows = rows.T if self.transposed else rows.flatten(1)
        if bias is not None:
            rows = torch.cat([rows, bias.detach().float()[:, None] * size], dim=1)
        return (rows * scale_M1).chunk(self.num_parts)

    def _move_(self, move: Tensor, size: float) -> None:
        if self.bias is not None:
            self.bias.sub_((move[:, -1] * size).to(self.bias))
            move = move[:, :-1]
        self.weight.sub_((move.T if self.transposed else move.reshape(self.weight.shape)).to(self.weight))


@dataclass(eq=False)
class _Vector:
    """A vector that scales something, or one that is added to what `beside` scales."""

    vector: nn.Parameter
    state: dict[nn.Parameter, dict[str, Tensor]]
    beside: nn.Parameter

    def measure(self, _: Callable[[float], float]) -> None:
        """Settle, before the first step, how large the vector is."""
        if self.vector not in self.state:
            size = _number(float(self.beside.detach().float().square().mean().sqrt()))
            moments = {"mean": torch.zeros_like(self.vector), "squares": torch.zeros_like(self.vector)}
            self.state[self.vector] = {"step": _number(0.0), "size": size, **moments}

    def step_(self, share: float, dtype: torch.dtype) -> None:
        gradient = self.vector.grad
        if gradient is None:
            return
        kept = self.state[self.vector]
        mean, squares = kept["mean"], kept["squares"]
        kept["step"] += 1
        num_steps = int(kept["step"])
        mean.lerp_(gradient, 1 - VECTOR_MOMENTUM)
        squares.lerp_(gradient.square(), 1 - VECTOR_SQUARES)
        mean, squares = mean / (1 - VECTOR_MOMENTUM**num_steps), squares / (1 - VECTOR_SQUARES**num_steps)
        tiny = torch.finfo(squares.dtype).tiny
        self.vector.sub_(mean / squares.clamp(min=tiny).sqrt() * (share * VECTOR_SHARE * float(kept["size"])))


def gated_weights(sites: Iterable[MlpSite], parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """Return, of parameters by full name, the weights of MLPs that hold gates and values in one matrix."""
    names = (f"{site.value}.weight" for site in sites if site.kind == "packed_gated")
    return [parameters[name] for name in names if name in parameters]


def _number(value: float) -> Tensor:
    """Return a number as an optimizer keeps it: on the CPU, so that reading it waits for no GPU."""
    return torch.tensor(value, dtype=torch.float64)


def shares(peak: float, num_steps: int, warmup: float = 0.1) -> Iterator[float]:
    """Yield the step sizes of a run: a short rise to the peak, then a cosine to zero."""
    rise = max(1.0, warmup * num_steps)
    for number in range(num_steps):
        fall = max(0.0, number + 1 - rise) / (num_steps - rise + 1)
        yield peak * min(1.0, (number + 1) / rise) * 0.5 * (1 + math.cos(math.pi * fall))


def descend_(
    steps: RelativeSteps,
    parameters: Sequence[nn.Parameter],
    losses: Callable[[], Iterable[Tensor]],
    *,
    peak: float,
    num_steps: int,
    share: Share = ALONE,
) -> None:
    """Take steps of sizes up to `peak` along a loss of which each call draws a batch, and yields it in parts.

    The parts' gradients are added in float64, also over the processes of a `share`, so that it makes no difference to a
    step which of them computes which part.
    """
    for size in shares(peak, num_steps):
        sums = [torch.zeros_like(p, dtype=working_dtype(p.device)) for p in parameters]
        unused = set(range(len(sums)))
        for number, part in enumerate(losses()):
            found = torch.autograd.grad(part, parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient
            missed = {index for index, gradient in enumerate(found) if gradient is None}
            unused = missed if number == 0 else unused & missed
        share.sum_(sums)
        for index, (p, total) in enumerate(zip(parameters, sums, strict=True)):
            p.grad = None if share.num == 1 and index in unused else total.to(p)
        steps.param_groups[0]["lr"] = size
        steps.step()
