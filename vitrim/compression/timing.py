"""What sizes of an MLP or attention cost in time, measured on the device by running it by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from vitrim.calibrate.activations import catch_call
from vitrim.calibrate.runs import with_edits
from vitrim.compression.curves import Measured
from vitrim.compression.heads import HeadsCut
from vitrim.cost.latency import import_timer
from vitrim.errors import RecipeError
from vitrim.models.features import device_of, evaluating
from vitrim.surgery import KeepUnits, apply_, submodule
from vitrim.surgery.modules import run_mlp
from vitrim.types import AttentionSite, MlpSite

TIMED_IMAGES, TIMED_ROUNDS = 8, 15


def time_mlp_(found: Measured, teacher: nn.Module, site: MlpSite, widths: Sequence[int]) -> Mapping[str, int]:
    """Return what widths of an MLP take for a few images, in nanoseconds by width as text; those not known are timed.

    Raises:
        RecipeError: the MLP can't be run by itself.
    """
    num_tokens = max(1, round(TIMED_IMAGES * found.tokens[site.path]))
    key = f"{site.label}, {site.d_model}, {site.d_hidden}, {num_tokens} tokens"  # MLPs of one shape are timed once
    known, inner = found.times.setdefault(key, {}), site.within(site.path)
    tokens = torch.randn(1, num_tokens, site.d_model, generator=torch.Generator().manual_seed(0)).to(device_of(teacher))
    runs: dict[int, Callable[[], object]] = {}
    for width in [width for width in widths if str(width) not in known]:
        holder = nn.Sequential(copy.deepcopy(submodule(teacher, site.path)))
        apply_(holder, [KeepUnits.first(inner.below("0"), width)])
        runs[width] = lambda mlp=holder[0]: run_mlp(mlp, inner, tokens)
    known |= _timed(runs, teacher, site.path)
    return known


def time_attention_(
    found: Measured, teacher: nn.Module, cut: HeadsCut, site: AttentionSite, sizes: Sequence[int], batch: Tensor
) -> Mapping[str, int]:
    """Return what sizes of an attention take for a few images of a batch, as `time_mlp_` does.

    Raises:
        RecipeError: the attention can't be run by itself.
    """
    few = batch[torch.arange(TIMED_IMAGES) % len(batch)].to(device_of(teacher))
    args, kwargs = catch_call(teacher, site.path, few)
    shape = [tuple(each.shape) for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    what = "heads" if cut.method.whole_heads() else f"dims {site.mixes}"
    key = f"attention, {site.d_model}, {site.num_heads} of {site.head_dim}, {what}, {shape}"
    known, runs = found.times.setdefault(key, {}), {}
    for size in [size for size in sizes if str(size) not in known]:
        edits = [] if size == cut.size_of(site) else [cut.first(site, size)]
        attention = submodule(with_edits(teacher, edits), site.path)
        runs[size] = lambda attention=attention: attention(*args, **kwargs)
    known |= _timed(runs, teacher, site.path)
    return known


def time_block_(found: Measured, teacher: nn.Module, block: str, batch: Tensor) -> int:
    """Return what a whole block takes for a few images of a batch, in nanoseconds, as `time_mlp_` times an MLP.

    Raises:
        RecipeError: the block can't be run by itself.
    """
    few = batch[torch.arange(TIMED_IMAGES) % len(batch)].to(device_of(teacher))
    (args, kwargs), module = catch_call(teacher, block, few), submodule(teacher, block)
    shapes = [tuple(each.shape) for each in (*args, *module.state_dict().values()) if isinstance(each, Tensor)]
    known = found.times.setdefault(f"block, {shapes}", {})
    if not known:
        known |= _timed({0: lambda: module(*args, **kwargs)}, teacher, block)
    return known["0"]


def _timed(runs: Mapping[int, Callable[[], object]], teacher: nn.Module, where: str) -> dict[str, int]:
    """Return what each call takes, in alternating rounds, so that a slow moment affects all alike."""
    make_timer, seen = import_timer(), {size: [] for size in runs}
    timers = {
        size: make_timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for size, run in runs.items()
    }
    with evaluating(teacher):
        for _ in range(TIMED_ROUNDS + 1):  # the first is a warm-up
            for size, timer in timers.items():
                try:
                    seen[size].append(timer.timeit(1).mean)
                except Exception as error:  # a foreign module that needs more than what it is given may raise anything
                    reason = f"{type(error).__name__}: {error}"
                    raise RecipeError(
                        f"allocate.cost: {where} can't be timed by itself ({reason:.100}); use macs."
                    ) from error
    return {str(size): round(1e9 * median(times[1:])) for size, times in seen.items()}
