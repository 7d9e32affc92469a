"""Goes through a training step on paper: torch's fake tensors have shapes and no values, and every operator is seen.

So what a step holds, multiplies and moves is known of any model before it is loaded anywhere.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrim.cost.count import UNCOUNTED_ATTENTION, UNCOUNTED_PRODUCTS, attention_flops

BACKWARD = 2.5  # of the products of fused attention: five where the forward pass has two


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator that ran: its floating-point operations in products, the bytes it reads and writes, its type."""

    flops: int
    num_bytes: int
    dtype: torch.dtype


@dataclass(kw_only=True)
class Rehearsal:
    """What a step takes.

    Attributes:
        peak: most bytes held at a time beside parameters and their gradients: activations and copies of weights.
        operators: every operator that ran, but views.
    """

    peak: int = 0
    operators: list[Operator] = field(default_factory=list)

    def seconds(self, flops_per_s: Callable[[torch.dtype], float], bytes_per_s: float) -> tuple[float, float]:
        """Return the least seconds of the operators that products bound, and of those that memory bounds."""
        products = traffic = 0.0
        for operator in self.operators:
            multiplying, moving = operator.flops / flops_per_s(operator.dtype), operator.num_bytes / bytes_per_s
            products += multiplying if multiplying >= moving else 0.0
            traffic += moving if multiplying < moving else 0.0
        return products, traffic


@contextmanager
def on_paper(*models: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield copies of models without values; all tensors that are made inside have none either."""
    copies = [copy.deepcopy(model).to("meta") for model in models]
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield [model.to_empty(device="cpu") for model in copies]


def rehearse(step: Callable[[], Tensor], *models: nn.Module) -> Rehearsal:
    """Run a step forward and backward, inside `on_paper`.

    Args:
        step: returns the loss.
        models: what has parameters; their gradients are let go of as soon as they are there.
    """
    found = Rehearsal()
    parameters = [p for model in models for p in (*model.parameters(), *model.buffers())]
    hooks = [
        p.register_post_accumulate_grad_hook(_let_go) for model in models for p in model.parameters() if p.requires_grad
    ]
    try:
        with _Follower(found, parameters):
            step().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


class _Follower(TorchDispatchMode):
    """Follows each storage from its operator until it is freed, and notes what operators do."""

    def __init__(self, found: Rehearsal, known: list[Tensor]) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.found, self.live = found, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.formulas: Mapping[Any, Callable[..., int]] = flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for tensor in outputs:
            self._follow(tensor.untyped_storage())
        self.found.peak = max(self.found.peak, self.live)
        if any(tensor.untyped_storage()._cdata not in inputs for tensor in outputs) or func._schema.is_mutable:
            self._note(func, args, kwargs or {}, result, outputs)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any, outputs: list[Tensor]) -> None:
        """Note an operator that makes or changes a tensor."""
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)] + outputs
        moved = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
        dtype = next((tensor.dtype for tensor in outputs if tensor.is_floating_point()), torch.float32)
        flops = self._flops(func, args, kwargs, result)
        self.found.operators.append(Operator(flops=flops, num_bytes=moved, dtype=dtype))

    def _flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        packet = func._overloadpacket
        name = packet.__name__
        if packet in self.formulas:
            return int(self.formulas[packet](*args, **kwargs, out_val=result))
        if name in UNCOUNTED_ATTENTION:
            return attention_flops(*(tensor.shape for tensor in args[:3]))
        if name.removesuffix("_backward") in UNCOUNTED_ATTENTION:
            return int(BACKWARD * attention_flops(*(tensor.shape for tensor in args[1:4])))
        if name in UNCOUNTED_PRODUCTS:
            return UNCOUNTED_PRODUCTS[name](*(t.shape if isinstance(t, Tensor) else t for t in args), **kwargs)
        return 0

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
