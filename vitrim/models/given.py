"""A live model as its owner has it: wrappers are taken off, and what can't be compressed as it is, is refused.

Nothing of the caller's is changed. Refused are adapters and masks that are not yet part of the weights, shards, and
tensors without values: each in one line that says how to go on.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from vitrim.errors import ModelError
from vitrim.storage.tensor_files import not_finite


def unwrapped(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """Return the model that `torch.compile`, `DataParallel` and `DistributedDataParallel` are wrapped around.

    Args:
        model: a live model.
        in_place: whether the model itself will be changed, so that no copy of its module tree may be returned.

    Returns:
        The module inside all wrappers; if blocks of it are wrapped too, a copy of the tree with the same tensors.

    Raises:
        ModelError: adapters of PEFT, masks of `torch.nn.utils.prune` or shards of FSDP are on it; or, with `in_place`,
            a wrapper that holds on to the tensors of the uncut model.
    """
    while (inner := _inside(model)) is not None:
        if in_place and isinstance(model, DistributedDataParallel):
            raise ModelError(
                "model: DistributedDataParallel holds on to the uncut tensors; prune_(model.module), and wrap it then."
            )
        model = inner
    _refuse_unfinished(model)
    wrapped = [name for name, module in model.named_modules() if _inside(module) is not None]
    if not wrapped:
        return model
    if in_place:
        raise ModelError(f"{wrapped[0]}: is wrapped ({_kind(model, wrapped[0])}); prune_ first, and wrap it then.")
    model = copy.deepcopy(model, {id(tensor): tensor for _, tensor in named_tensors(model)})
    outermost = [name for name in wrapped if not any(name.startswith(f"{other}.") for other in wrapped)]
    for name in outermost:
        holder, _, last = name.rpartition(".")
        setattr(model.get_submodule(holder), last, unwrapped(model.get_submodule(name)))
    return model


def with_values(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """Return a live model whose tensors can be read and trained: itself, or a copy if it was built for inference alone.

    Raises:
        ModelError: a tensor is on the meta device; or, with `in_place`, the model was built in inference mode.
    """
    empty = [name for name, tensor in named_tensors(model) if tensor.is_meta]
    if empty:
        raise ModelError(
            f"model: {empty[0]} (and {len(empty) - 1} more) is on the meta device and has no values; load the weights "
            "first, all of them into memory."
        )
    frozen = next((name for name, tensor in named_tensors(model) if tensor.is_inference()), None)
    if frozen is None:
        return model
    if in_place:
        raise ModelError(
            f"model: {frozen} was made under torch.inference_mode and can't be changed in place; "
            "model = copy.deepcopy(model) outside of it makes one that can."
        )
    return copy.deepcopy(model)


def check_weights(model: nn.Module, where: str) -> None:
    """Check that every parameter and buffer is finite; a buffer may hold infinity, as masks do.

    Args:
        model: any module; tensors on the meta device are left out.
        where: name of the model, for the error.

    Raises:
        ModelError: a value is NaN or infinite; the tensor is named.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in named_tensors(model):
        if (what := not_finite(tensor, masks=name not in parameters)) is not None:
            raise ModelError(f"{where}: {name} {what}; take weights that are whole.")


def _inside(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper of torch holds, or None if the module is no wrapper."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        return module.module
    if type(module).__name__ == "OptimizedModule":  # its class is in torch._dynamo, which takes a second to import
        return getattr(module, "_orig_mod", None)
    return None


def _refuse_unfinished(model: nn.Module) -> None:
    """Refuse shards, adapters and masks.

    Raises:
        ModelError: the model has some.
    """
    fsdp, tensor = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    shards = tuple(kind for kind in (getattr(fsdp, "FullyShardedDataParallel", None),) if kind)
    if any(isinstance(module, shards) for module in model.modules()) or any(
        tensor is not None and isinstance(parameter, tensor.DTensor) for parameter in model.parameters()
    ):
        raise ModelError(
            "model: is sharded (FSDP, DTensor), so no process has its weights; gather its full state dict, load that "
            "into the model as it was before sharding, and pass it."
        )
    adapted = [name for name, module in model.named_modules() if _is_adapted(module)]
    if adapted or hasattr(model, "merge_and_unload"):
        line = "model = model.merge_and_unload()"
        if not hasattr(model, "merge_and_unload"):
            line = "model = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()"
        where = adapted[0] if adapted else type(model).__name__
        raise ModelError(f"model: {where} has adapters of PEFT beside its weights; merge them first: {line}.")
    masked = [name for name, _ in model.named_buffers() if name.endswith("_mask") and _is_masked(model, name)]
    if masked:
        path, _, tensor_name = masked[0].removesuffix("_mask").rpartition(".")
        raise ModelError(
            f"model: {path} has a pruning mask (and {len(masked) - 1} more modules); make them permanent first: "
            f'torch.nn.utils.prune.remove(model.get_submodule("{path}"), "{tensor_name}").'
        )


def _is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT: another layer with an adapter that can be merged into it."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "merged_adapters")


def _is_masked(model: nn.Module, mask: str) -> bool:
    """Whether a buffer is a mask of `torch.nn.utils.prune`: the tensor that it masks is a parameter beside it."""
    path, _, name = mask.removesuffix("_mask").rpartition(".")
    return isinstance(getattr(model.get_submodule(path), f"{name}_orig", None), nn.Parameter)


def _kind(model: nn.Module, path: str) -> str:
    return type(model.get_submodule(path)).__name__


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
