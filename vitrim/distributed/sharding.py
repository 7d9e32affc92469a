"""Spreads a model's parameters over the processes (FSDP2), and trades activations for a second forward pass.

torch's own `fully_shard` is used, since accelerate's plugin does nothing on a CPU. A copy is spread, block by block,
and the model itself waits in main memory, because nothing in torch undoes a sharding. Weights that train keep their
type: autocast decides what runs in bf16, as it does without shards, so that both see the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from vitrim.distributed.precision import around_recomputation
from vitrim.distributed.processes import broadcast_, num_processes
from vitrim.errors import RecipeError
from vitrim.metrics.judging import FeatureModel
from vitrim.models.sites import find_mlps
from vitrim.tokens import Parts
from vitrim.types import FeaturesAt


class Sharded(FeatureModel):
    """Model in shards. Every process has to call it as often as the others: each call gathers from all."""

    def forward(self, images_BCHW: Tensor) -> Parts:
        """Return the features in memory of their own: hooks of a sharding don't work on views."""
        return tuple(None if part is None else part.clone() for part in super().forward(images_BCHW))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model outside of inference mode: tensors gathered there could never take part in training."""
        trains = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(trains):
            found = super().__call__(*args, **kwargs)
        if not trains:  # else the backward pass does it; the outermost part would go on with values that are stale
            cast(FSDPModule, self).reshard()
        return found


def block_paths(model: nn.Module) -> list[str]:
    """Return the paths of a model's transformer blocks, known by the MLPs in them; inner blocks before outer ones."""
    paths = dict.fromkeys(site.block for site in find_mlps(model))
    return sorted(paths, key=lambda path: -path.count("."))


def shard(
    model: nn.Module, blocks: Sequence[str], *, device: torch.device, at: FeaturesAt, dtype: torch.dtype | None = None
) -> Sharded:
    """Spread a copy of a model over the processes, with the main process's values; the model itself goes to the CPU.

    Args:
        model: in the memory of every process, whole.
        blocks: paths of the parts that are gathered one at a time; the rest is gathered as one.
        device: where the shards go.
        at: where features are read.
        dtype: type of the shards; None keeps each parameter's own.

    Raises:
        RecipeError: a parameter is a single number, which can't be cut.
    """
    broadcast_([*model.parameters(), *model.buffers()])
    model.to("cpu")
    for name, p in model.named_parameters():
        if p.ndim == 0:
            raise RecipeError(f"recover.fsdp: {name} is a single number, which can't be cut; drop fsdp.")
    shared = {
        id(p): nn.Parameter(p.detach().to(dtype or p.dtype).contiguous(), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    spread = Sharded(copy.deepcopy(model, cast(Any, shared)), at)
    mesh = init_device_mesh(device.type, (num_processes(),))
    for part in [*_modules(spread.model, blocks), spread]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return spread


def full(tensor: Tensor) -> Tensor:
    """Return a tensor as a whole; where it is in shards, every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, cut as `like` is; the tensor itself if `like` is whole."""
    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor
    # Each process has the whole, so that none needs to send anything.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def checkpointed(
    model: nn.Module, blocks: Sequence[str], *, around: Callable[[], Any] = around_recomputation
) -> Iterator[None]:
    """Let blocks keep only their inputs for the backward pass and run again in it: exact, for a third more compute.

    Args:
        model: holds the blocks.
        blocks: paths of modules without randomness: dropout would draw anew.
        around: returns two contexts, around the forward pass and around its repetition.
    """
    modules = _modules(model, blocks)
    before = [vars(module).get("forward") for module in modules]
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=around)
    for module in modules:
        module.forward = partial(again, module.forward)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own


def _modules(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """Return the modules at these paths, each once: a block may stand at several paths."""
    return list(dict.fromkeys(model.get_submodule(path) for path in paths))
