"""Measures the cost of a model: parameters, bytes, multiply-accumulates, peak memory.

Everything is measured on the model as it is, in eval mode without gradients. How good the model is, is measured in
`metrics/`; nothing is estimated from a config.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrim.inputs import parts_of, run_on
from vitrim.models.features import evaluating, frozen, inputs_for
from vitrim.types import MlpSite

MIB = 2**20

# Fused attention that torch's counter does not know and would count as 0 (CPU: pytorch issue 195460).
UNCOUNTED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)


class ModelSize(TypedDict):
    """Parameters, and bytes of what a file holds; shared tensors count once."""

    num_parameters: int
    num_bytes: int


def num_parameters(model: nn.Module) -> int:
    """Count parameters, shared ones once, frozen ones too; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def site_parameters(site: MlpSite, width: int) -> int:
    """Count the parameters of a site's units at a width: input rows with biases, output columns, inner norm."""
    num_inputs = 1 if site.kind == "plain" else 2
    per_unit = num_inputs * (site.d_model + int(site.has_bias)) + site.d_model + (2 if site.norm else 0)
    return per_unit * width


def site_macs(site: MlpSite, width: int) -> int:
    """Count the multiply-accumulates of a site for one token, at a width."""
    return (2 if site.kind == "plain" else 3) * site.d_model * width


def model_size(model: nn.Module) -> ModelSize:
    """Return the parameters of a model, and the bytes that it takes in a file.

    The bytes are those of parameters and persistent buffers, such as masks, each in its own type; the names and shapes
    at the head of a file are not counted.
    """
    stored = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return {"num_parameters": num_parameters(model), "num_bytes": sum(stored.values())}


def count_macs(model: nn.Module, images_BCHW: Tensor) -> int:
    """Count the multiply-accumulates of one image while the model runs (half of torch's FLOPs).

    Matrix products, convolutions and attention count, and so do weighted sums of gathered rows, which are products that
    leave out zeros; norms, activations, softmax and biases don't, as usual in papers. Causal attention counts in full.

    Args:
        model: any module that takes images.
        images_BCHW: B images; the count is their mean, which matters only where the work depends on the
            image.

    Returns:
        Multiply-accumulates per image, rounded.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    formulas = dict.fromkeys(UNCOUNTED_ATTENTION, attention_flops) | UNCOUNTED_PRODUCTS
    packets = {name: getattr(torch.ops.aten, name) for name in formulas if hasattr(torch.ops.aten, name)}
    mapping: dict[Any, Any] = {
        packet: formulas[name] for name, packet in packets.items() if packet not in flop_registry
    }
    # Under inference mode torch's counter stumbles over a parameter that is itself the input of a module (the query of
    # an attention pool) while it asks for gradients.
    with frozen(model), evaluating(model), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run_on(model, inputs_for(model, images_BCHW))
    return round(counter.get_total_flops() / (2 * len(images_BCHW)))


def peak_memory_mib(model: nn.Module, images_BCHW: Tensor) -> float:
    """Measure the peak memory of one forward pass: the weights, plus the most that the pass held at any moment.

    On CUDA the second part is the allocator's peak above what was allocated before. Elsewhere it is the exact
    peak of live tensors, followed from operator to operator: the input, activations and outputs, each storage
    from its creation until it is freed. Scratch space inside a kernel is not seen there, nor is what the
    allocator holds in reserve; so it is comparable between models, and below what the operating system
    reports for the process.

    Args:
        model: any module that takes images.
        images_BCHW: one batch; memory grows with its size.

    Returns:
        MiB, weights and input included.
    """
    weights = _storages(model)
    images = inputs_for(model, images_BCHW)
    with evaluating(model):
        if images.is_cuda:
            before = torch.cuda.memory_allocated(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            run_on(model, images)
            peak = torch.cuda.max_memory_allocated(images.device) - before
        else:
            with _LiveStorages({*weights, *(part.untyped_storage().data_ptr() for part in parts_of(images))}) as live:
                run_on(model, images)
            peak = live.peak_bytes
    return (sum(weights.values()) + images.nbytes + peak) / MIB


class _LiveStorages(TorchDispatchMode):
    """Counter of the bytes of tensor storages that are made while it is active, until each is freed."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # an operator made of others (linear, attention) is followed part by part
            result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._known:
            self._known.add(address)
            self._live_bytes += size
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._live_bytes -= size


def _product_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the FLOPs of a product of a matrix with a matrix or a vector, from the shapes of its factors."""
    return 2 * math.prod(left) * (right[1] if len(right) > 1 else 1)


def _bag_flops(weight: Sequence[int], places: Sequence[int], offsets: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of sums of gathered rows: a product for each entry of each row, if they are weighted at all."""
    weights = args[3] if len(args) > 3 else kwargs.get("per_sample_weights")
    return 0 if weights is None else 2 * math.prod(places) * weight[1]


# Products that torch's counter does not know: int8 by int8, a matrix by a vector, weighted sums of gathered rows.
UNCOUNTED_PRODUCTS: dict[str, Callable[..., int]] = {
    "_int_mm": _product_flops,
    "mv": _product_flops,
    "addmv": lambda added, *factors, **_: _product_flops(*factors),
    "_embedding_bag": _bag_flops,
    "_embedding_bag_forward_only": _bag_flops,
}


def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of softmax(QK')V from the shapes (B, heads, tokens, width): two matrix products."""
    batch, heads, num_queries, width = query
    return 2 * batch * heads * num_queries * key[-2] * (width + value[-1])


def _storages(model: nn.Module) -> Mapping[int, int]:
    """Return the bytes of each storage behind the parameters and buffers, by address."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
