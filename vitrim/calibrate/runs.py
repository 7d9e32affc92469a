"""Runs of consecutive blocks that can be taken out of a model, and sums for what may stand for them.

Whether a run can go is tried, not read off: the model without it must put out what the whole model does with the run's
blocks passed by. That finds models that number their blocks in other places (one rotary table a block, features
read behind block 8) without knowing them by name. The layer in front of a run is asked for its outputs plus what
the run adds to the residual stream. Where blocks end in a norm, the stream is taken in front of the norm, scaled
token by token to the norm's statistics there, since the norm takes out mean and scale anyway.

Shapes: N tokens, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitrim.calibrate.activations import Call, catch_call, run_to_end, stream_like
from vitrim.calibrate.sums import passes
from vitrim.calibrate.walk import Sums, layer_scale
from vitrim.errors import BudgetError
from vitrim.inputs import run_on
from vitrim.models.features import device_of, evaluating, features, first_tensor
from vitrim.surgery import DropBlocks, Edit, apply_, submodule, weight_of
from vitrim.types import BlockRun, MlpSite, RunInputs, Stats


def find_runs(
    model: nn.Module, sites: Sequence[MlpSite], length: int, images: Tensor, note: Callable[[str], None]
) -> list[BlockRun]:
    """Return every run of `length` blocks that can be taken out, in order; say why others can't.

    A block stays in front of each, since the layer into which a stand-in is folded is there.

    Raises:
        BudgetError: there is none.
    """
    lists = {path: blocks for path, blocks in _lists(model, sites).items() if len(blocks) > length}
    found: list[BlockRun] = []
    refused: dict[str, str] = {}
    for path, blocks in lists.items():
        for before, last in zip(blocks, blocks[length:], strict=False):
            run = _run(model, path, blocks, before, last, images)
            if run is None:
                refused[before.block] = "what its last layer puts out is not simply added to the residual stream"
            elif not _can_go(model, run, images):
                refused[before.block] = "without the blocks behind it the model does not do what it does past them"
            else:
                found.append(run)
    reasons = [f"{block}: can't be followed by a gap of {length}, {why}" for block, why in refused.items()]
    if not found:
        why = reasons[0] if reasons else "a run has to leave a block of the same numbered list, and each to hold an MLP"
        raise BudgetError(
            f"{type(model).__name__}: no run of {length} blocks can be taken out ({why}); keep more blocks, or cut "
            "widths alone."
        )
    for reason in reasons:
        note(f"{reason}.")
    return found


def _run(
    model: nn.Module, path: str, blocks: Sequence[MlpSite], before: MlpSite, last: MlpSite, images: Tensor
) -> BlockRun | None:
    """Return the run of blocks behind one up to another; None if nothing can stand for it in the block in front."""
    norm, start = _joint(model, before, images), blocks.index(before) + 1
    if norm is None:
        return None
    return BlockRun(
        path=path,
        start=start,
        length=blocks.index(last) + 1 - start,
        total=len(blocks),
        before=before.block,
        last=last.block,
        output=before.output,
        norm=f"{before.block}.{norm}" if norm else None,
        last_norm=f"{last.block}.{norm}" if norm else None,
        names=tuple(dict.fromkeys(name for site in blocks for name in submodule(model, site.block).state_dict())),
    )


def run_sums(
    model: nn.Module, runs: Sequence[BlockRun], batches: Sequence[Tensor], of: RunInputs
) -> Iterator[tuple[BlockRun, Stats]]:
    """Yield each run with the sums at its `output` layer; as many share a pass over the images as memory allows."""
    for group in passes(runs, lambda run: _sum_bytes(model, run, of)):
        scales = {run.output: _scale(model, run, batches[0]) for run in group}
        adders = {run: Sums() for run in group}
        with ExitStack() as hooks, evaluating(model):
            seen = _watched(model, group, hooks)
            for batch in batches:
                run_on(model, batch.to(device_of(model)))
                for run, adder in adders.items():
                    adder.add(
                        seen[run.output][0 if of == "hidden" else 1], _target(model, run, seen, scales[run.output])
                    )
                seen.clear()
        for run in group:
            yield run, adders.pop(run).done(run.output)


def num_held_out(batches: Sequence[Tensor]) -> int:
    """Return how many batches at the end are held out to judge: a tenth, none of one batch."""
    return max(1, len(batches) // 10) if len(batches) > 1 else 0


def with_edits(model: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """Return a copy of a model with edits made; it shares all tensors that no edit changes."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, shared)
    apply_(changed, edits)
    return changed


def tokens_of(model: nn.Module, batches: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return a model's features on each batch as float32 tokens on the CPU: pooled vectors, and those of each layer."""
    with evaluating(model):
        every = [features(model, batch.to(device_of(model))) for batch in batches]
    return [[part.flatten(0, -2).float().cpu() for part in found.tensors] for found in every]


def relative_error(mine: list[list[Tensor]], theirs: list[list[Tensor]]) -> float:
    """Return the squared error of tokens relative to their spread around the mean; each kind of token has its own."""
    error = spread = 0.0
    for ours, wanted in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True):
        mean_D = torch.cat(wanted).double().mean(0)
        for one, other in zip(ours, wanted, strict=True):
            error += float((one.double() - other.double()).square().sum())
            spread += float((other.double() - mean_D).square().sum())
    return error / max(spread, torch.finfo(torch.float64).tiny)


def _lists(model: nn.Module, sites: Sequence[MlpSite]) -> dict[str, list[MlpSite]]:
    """Return, by path of each list of blocks, the last MLP of each block; every block of a list must have one."""
    found: dict[str, dict[int, MlpSite]] = {}
    for site in sites:
        path, _, number = site.block.rpartition(".")
        if number.isdigit():
            found.setdefault(path, {})[int(number)] = site
    lists = {path: submodule(model, path) for path in found}
    return {
        path: [last[index] for index in range(len(last))]
        for path, last in found.items()
        if isinstance(blocks := lists[path], nn.ModuleList | nn.Sequential) and sorted(last) == list(range(len(blocks)))
    }


def _joint(model: nn.Module, site: MlpSite, images: Tensor) -> str | None:
    """Return the norm at a block's end, by its path in the block, "" if there is none.

    None if the MLP's output is not added, times a fixed scale, to the residual stream there.
    """
    call = _call(model, site.block, images)
    if layer_scale(model, site.block, site.output, call) is None:
        return None
    with evaluating(model):
        return run_to_end(submodule(model, site.block), call)[2]


def _scale(model: nn.Module, run: BlockRun, images: Tensor) -> Tensor:
    """Return the fixed scale (D,) between the output of a run's layer in front and the residual stream."""
    found = layer_scale(model, run.before, run.output, _call(model, run.before, images))
    assert found is not None
    return found


def _can_go(model: nn.Module, run: BlockRun, images: Tensor) -> bool:
    """Return whether a model without a run puts out what it does with the run's blocks passed by."""

    def pass_by(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        came = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, Tensor):
            return came
        return type(output)([came, *output[1:]])

    try:
        shorter = with_edits(model, [DropBlocks(run=run)])
        with ExitStack() as hooks:
            for index in range(run.start, run.stop):
                block = submodule(model, run.block(index))
                hooks.callback(block.register_forward_hook(pass_by, with_kwargs=True).remove)
            return _agree(model, shorter, images)
    except Exception:  # foreign code that counts its blocks may raise anything
        return False


def _agree(model: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Return whether two models put out the same up to rounding."""
    with evaluating(model, other):
        wanted, found = (
            [leaf for leaf in tree_leaves(run_on(each, images)) if isinstance(leaf, Tensor)] for each in (model, other)
        )
    pairs = zip(wanted, found, strict=False)
    return len(wanted) == len(found) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
        for one, other in pairs
    )


def past_run(whole: nn.Module, shorter: nn.Module, run: BlockRun, images: Tensor) -> nn.Module | None:
    """Return a frozen copy of a model without a run of blocks, whose later blocks see what they see in the whole model.

    A repair that compares with it learns what the stand-in for the run lacks. What the layers in front of the run are
    to put out stays what they put out in the shorter model. None where a norm ends blocks, or where blocks can't be
    called as the one in front of the run is.
    """
    copied = copy.deepcopy(shorter).requires_grad_(False)
    own = copy.deepcopy(submodule(copied, run.before))
    paths = [run.block(index) for index in range(run.start - 1, run.stop)]
    blocks = [copy.deepcopy(submodule(whole, path)).requires_grad_(False) for path in paths]

    def hand_on(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        stream = args[0]
        for block in blocks:
            stream = first_tensor(block(stream, *args[1:], **kwargs))
        lacking = stream - first_tensor(own(*args, **kwargs))
        return output + lacking if isinstance(output, Tensor) else type(output)([output[0] + lacking, *output[1:]])

    submodule(copied, run.before).register_forward_hook(hand_on, with_kwargs=True)
    try:
        return copied if run.norm is None and _agree(whole, copied, images.to(device_of(whole))) else None
    except Exception:  # foreign code that counts its blocks may raise anything
        return None


def _sum_bytes(model: nn.Module, run: BlockRun, of: RunInputs) -> int:
    """Return the memory of a run's float64 sums in bytes."""
    width, inputs = weight_of(model, run.output).shape
    seen = inputs if of == "hidden" else width
    return 8 * seen * (seen + width)


def _watched(model: nn.Module, runs: Sequence[BlockRun], hooks: ExitStack) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what every forward pass fills with first input and output, as tokens, of the modules that runs look at."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(path: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        came = args[0] if args else next(iter(kwargs.values()))
        came, output = (stream_like(layer, each) for each in (came, first_tensor(output)))
        seen[path] = (came.reshape(-1, came.shape[-1]).float(), output.reshape(-1, output.shape[-1]).float())

    layers = {
        path: submodule(model, run.output)
        for run in runs
        for path in (run.output, run.norm or run.before, run.last_norm or run.last)
    }
    for path, layer in layers.items():
        handle = submodule(model, path).register_forward_hook(
            lambda _, *given, path=path, layer=layer: see(path, layer, *given), with_kwargs=True
        )
        hooks.callback(handle.remove)
    return seen


def _target(model: nn.Module, run: BlockRun, seen: Mapping[str, tuple[Tensor, Tensor]], scale_D: Tensor) -> Tensor:
    """Return what a run's layer in front should put out (N, D): its own output, and what the run adds to the stream."""
    own_ND = seen[run.output][1]
    if run.norm is None or run.last_norm is None:
        added_ND = seen[run.last][1] - seen[run.before][1]
    else:
        eps = float(cast(Any, submodule(model, run.norm)).eps)
        (mean_N1, size_N1), (last_mean_N1, last_size_N1) = (_spread(seen[n][0], eps) for n in (run.norm, run.last_norm))
        wanted_ND = (seen[run.last_norm][0] - last_mean_N1) / last_size_N1 * size_N1 + mean_N1
        added_ND = wanted_ND - seen[run.norm][0]
    scale_D = scale_D.to(own_ND)
    return own_ND + torch.where(scale_D == 0, 0.0, added_ND / scale_D)


def _spread(tokens_ND: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return each token's mean and standard deviation, as a norm takes them."""
    variance_N1, mean_N1 = torch.var_mean(tokens_ND, dim=-1, keepdim=True, correction=0)
    return mean_N1, (variance_N1 + eps).sqrt()


def _call(model: nn.Module, block: str, images: Tensor) -> Call:
    """Return the arguments of a block, for two images."""
    return catch_call(model, block, images[:2].to(device_of(model)))
