"""Walk through a model block by block over calibration images, and sum up each MLP's activations and wanted outputs.

Teacher and student each run on their own activations, so a block is visited with all blocks before it already cut in
the student. Foreign forwards are never copied (see `activations.py`). Only the current block's activations and a
bounded sample of tokens for the refit are stored.

Shapes: N tokens, H hidden units, D model width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.calibrate.activations import Activations, Call, forward_order, run_to_end, stream_like
from vitrim.calibrate.sums import check_finite
from vitrim.models.features import evaluating
from vitrim.ops.products import Products
from vitrim.surgery import channels_last, mlp_output, submodule, weight_of
from vitrim.types import MlpSite, Stats

JUDGING = 4096  # tokens that judge how much feedback pays, at most; spread over all images that are not in the sums
FARTHEST = 2.0**20  # times an MLP's largest output: the largest offset by which a layer scale is probed


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A sample of MLP inputs of the student, and the outputs that the MLP should have for them."""

    inputs_ND: Tensor
    targets_ND: Tensor


@dataclass(frozen=True, kw_only=True)
class SiteVisit:
    """The calibration results of one MLP.

    `scale_D` is the layer scale behind it, None if there is no fixed one. `stands_alone`: the MLP can be run on tokens
    by itself, outside its block. `again` measures once more, with the student as it is at that time. `metric_DD` is the
    metric on its outputs, where a caller has one. `half` are the sums over the first half of the batches in `stats`,
    where they were asked for and there are two.
    """

    site: MlpSite
    stats: Stats
    scale_D: Tensor | None
    stands_alone: bool
    fit: Tokens
    held_out: Tokens
    again: Callable[[], SiteVisit]
    metric_DD: Tensor | None = None
    half: Stats | None = None


def num_in_half(num_fit: int) -> int:
    """Return how many of the batches in the sums make their first half; 0 of a single one."""
    return num_fit // 2


def walk(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor],
    *,
    feedback: float = 1.0,
    num_held_out: int = 1,
    max_tokens: int = 100_000,
    skip: Collection[str] = (),
    offload: Path | None = None,
    moments: torch.dtype = torch.float64,
    halves: bool = False,
    entered: Callable[[str, Activations, Activations], None] | None = None,
) -> Iterator[SiteVisit]:
    """Visit each MLP in forward order; the caller cuts the student's MLP before asking for the next visit.

    Args:
        teacher: the original model, unchanged throughout.
        student: the model that is cut between visits.
        sites: the MLPs to visit.
        batches: calibration images (B, C, H, W), preprocessed; the last `num_held_out` batches are not in the sums.
        feedback: share of the accumulated error of the residual stream that a target corrects, 0..1.
        num_held_out: number of batches kept for judging.
        max_tokens: number of tokens sampled for `fit` (and a quarter of it for `held_out`), spread over all images.
        skip: paths of sites that are finished; their blocks run, but they are not visited.
        offload: folder for the activations, one file per batch; None keeps them in memory.
        moments: dtype of the hidden second moments, summed in float64 tile by tile; float32 halves their memory.
        halves: also give the sums over the first half of the batches.
        entered: called with each block and both models' activations at it before its MLPs are visited, to cut what is
            in front of them.

    Yields:
        One visit per site.
    """
    blocks = forward_order(teacher, sites, batches[0][:2])
    both = (
        Activations(teacher, blocks, batches, frozen=True, offload=offload and offload / "teacher"),
        Activations(student, blocks, batches, frozen=False, offload=offload and offload / "student"),
    )
    for index, block in enumerate(blocks):
        for activations in both:
            activations.enter(index)
        if entered is not None:
            entered(block, *both)
        for site in [site for site in sites if site.block == block and site.path not in skip]:
            yield _visit(site, *both, feedback, num_held_out, max_tokens, moments, halves)


def layer_scale(model: nn.Module, block: str, output: str, call: Call) -> Tensor | None:
    """Find the fixed diagonal (D,) between a layer's output and the residual stream at its block's end, by probing.

    A known offset is added to the layer's output: behind a residual sum with a layer scale the stream moves by that
    scale, everywhere and in proportion. If it moves in another way (a norm in between), the result is None. The first
    offset is as large as the outputs. The second moves each channel of the residual stream by about its size, so that
    the smallest scale comes out as exact as the largest.

    Args:
        model: the model.
        block: path of the block.
        output: path of the layer in it, the output projection of an MLP or attention.
        call: arguments of the block.
    """
    width, put_out = weight_of(model, output).shape[0], []
    handle = submodule(model, output).register_forward_hook(lambda _, args, out: put_out.append(float(out.abs().max())))
    try:
        stream_ND = _stream(model, block, output, call)
    finally:
        handle.remove()
    stream = float(stream_ND.abs().max())
    size = put_out[0] or stream
    if stream_ND.shape[-1] != width or not (0 < size < math.inf and stream < math.inf):
        return None
    offset_D = torch.full((width,), size, device=stream_ND.device)
    rough_ND = moved(model, block, output, call, lambda _: offset_D, before_ND=stream_ND) / size
    rough_D = rough_ND.mean(0)
    signs_D = torch.where(torch.arange(width, device=offset_D.device) % 3 == 0, -0.5, 1.0)
    loud_D = signs_D * torch.minimum(stream / rough_D.abs(), FARTHEST * offset_D)
    moved_ND = moved(model, block, output, call, lambda _: loud_D, before_ND=stream_ND)
    scale_D = moved_ND.mean(0) / loud_D
    # float32 rounding of a residual stream of this size is what an honest diagonal may still show.
    rough_off, off = (rough_ND - scale_D).abs().max(), (moved_ND - scale_D * loud_D).abs().max()
    fixed = rough_off <= 1e-3 * scale_D.abs().max() + 1e-5 * stream / size and off <= 1e-3 * stream
    return scale_D if bool(fixed) and float(scale_D.abs().max()) > 0 else None


def moved(
    model: nn.Module,
    block: str,
    output: str,
    call: Call,
    offset_of: Callable[[Tensor], Tensor],
    *,
    before_ND: Tensor | None = None,
) -> Tensor:
    """Return by how much the stream at a block's end moves (N, D) where an offset is added to what a layer puts out.

    `offset_of` returns the offset for an output with its channels last, in a shape that can be added to it. `before_ND`
    is the stream without it, if that is known.
    """

    def add_(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        seen = channels_last(layer, out)
        seen += offset_of(seen).to(out.dtype)
        return out

    before_ND = _stream(model, block, output, call) if before_ND is None else before_ND
    handle = submodule(model, output).register_forward_hook(add_)
    try:
        return _stream(model, block, output, call) - before_ND
    finally:
        handle.remove()


def _stream(model: nn.Module, block: str, output: str, call: Call) -> Tensor:
    """Return the residual stream at a block's end (N, D), behind the layer `output` in it."""
    part = submodule(model, block)
    with evaluating(part):
        return stream_like(submodule(model, output), run_to_end(part, call)[1]).float().flatten(0, -2)


class Sums:
    """Running sums of hidden activations and targets."""

    def __init__(self, moments: torch.dtype = torch.float64) -> None:
        self.products, self.width = Products(moments), 0

    def add(self, hidden_NH: Tensor, target_ND: Tensor, fed_ND: Tensor | None = None) -> None:
        """Add a batch of tokens; `fed_ND` is the part of the targets that is feedback, if its own sums are wanted."""
        self.width = target_ND.shape[-1]
        self.products.add(hidden_NH, target_ND if fed_ND is None else torch.cat([target_ND, fed_ND], dim=-1))

    def done(self, path: str) -> Stats:
        """Return the sums as a frozen value; `path` is the MLP's.

        Raises:
            ModelError: they are not finite.
        """
        sums, width, fed = self.products, self.width, None
        sums.finish_()
        parts = {
            "hidden_H": sums.total_K,
            "target_D": sums.other_total_D[:width],
            "cross_HD": sums.cross_KD[:, :width],
            "hidden_HH": sums.square_KK,
        }
        square = float(sums.other_square_D[:width].sum())
        if sums.cross_KD.shape[1] > width:
            fed = (sums.other_total_D[width:], sums.cross_KD[:, width:])
            parts["fed"] = fed[1]
        for name, part in {**parts, "square": torch.tensor(square)}.items():
            check_finite(path, f"the sum {name} over {sums.num_tokens:,} tokens", part)
        return Stats(num_tokens=sums.num_tokens, target_square=square, rounding=sums.rounding, **{**parts, "fed": fed})


def _visit(
    site: MlpSite,
    teacher: Activations,
    student: Activations,
    feedback: float,
    num_held_out: int,
    max_tokens: int,
    moments: torch.dtype,
    halves: bool,
) -> SiteVisit:
    """Sum up one MLP over all batches."""
    half, sums, samples = None, Sums(moments), {"fit": [], "held_out": []}
    scale_D = layer_scale(student.model, site.block, site.output, student.call(0))
    num_fit = max(1, len(student.batches) - num_held_out)
    limits = {"fit": max_tokens // num_fit, "held_out": max_tokens // 4 // max(1, num_held_out)}
    generator = torch.Generator().manual_seed(0)
    for index in range(len(student.batches)):
        theirs, ours = teacher.observe(site, index), student.observe(site, index)
        target_ND = corrected(theirs, ours, scale_D, feedback)
        part = "fit" if index < num_fit else "held_out"
        if halves and index == num_in_half(num_fit) > 0:
            half = copy.deepcopy(sums)
        if part == "fit":
            sums.add(ours["hidden"], target_ND, fed_part(theirs, target_ND) if num_held_out else None)
        if index == 0:
            alone = stands_alone(student.model, site, ours)
        rows = torch.randperm(len(target_ND), generator=generator)[: limits[part]].to(target_ND.device)
        samples[part].append((ours["input"][rows].cpu(), target_ND[rows].cpu()))
        del theirs, ours, target_ND  # not beside those of the next batch
    stats = sums.done(site.path)
    pools = {part: _join(pairs or samples["fit"]) for part, pairs in samples.items()}
    for part, pool in pools.items():
        check_finite(site.path, f"a sampled token ({part})", pool.inputs_ND, pool.targets_ND)
    return SiteVisit(
        site=site,
        stats=stats,
        scale_D=scale_D,
        stands_alone=alone,
        fit=pools["fit"],
        held_out=pools["held_out"],
        again=lambda: _visit(site, teacher, student, feedback, num_held_out, max_tokens, moments, halves),
        half=None if half is None else half.done(site.path),
    )


def corrected(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], scale_D: Tensor | None, feedback: float
) -> Tensor:
    """Return the outputs (N, D) that the student's MLP or attention should have.

    They are the teacher's outputs plus a share of the student's accumulated error in the residual stream.

    Args:
        theirs: what `observe` saw in the teacher's block, tokens (N, D).
        ours: the same for the student's block.
        scale_D: layer scale behind it; None if there is no fixed one, and then nothing is corrected.
        feedback: the share of the error to correct, 0..1.
    """
    if scale_D is None or feedback == 0:
        return theirs["output"]
    inverse_D = torch.where(scale_D == 0, 0.0, 1 / scale_D)  # behind a zero no output corrects the residual stream
    behind = (theirs["stream"] - scale_D * theirs["output"]) - (ours["stream"] - scale_D * ours["output"])
    return theirs["output"] + feedback * inverse_D * behind


def fed_part(theirs: Mapping[str, Tensor], target_ND: Tensor) -> Tensor | None:
    """Return the part of targets from `corrected` that is feedback; None if they have none."""
    return None if target_ND is theirs["output"] else target_ND - theirs["output"]


def stands_alone(model: nn.Module, site: MlpSite, seen: dict[str, Tensor]) -> bool:
    """Whether running the MLP on its own, with inputs seen inside its block, gives the outputs seen there."""
    try:
        with evaluating(model):
            again_ND = mlp_output(model, site, seen["input"][:64].to(weight_of(model, site.output).dtype))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # foreign code that takes maps or more than tokens may raise anything
        return False
    expected_ND = seen["output"][:64]
    return bool((again_ND - expected_ND).abs().max() <= 1e-3 * expected_ND.abs().max())


def _join(pairs: list[tuple[Tensor, Tensor]]) -> Tokens:
    """Concatenate the samples of several batches."""
    inputs, targets = zip(*pairs, strict=True)
    return Tokens(inputs_ND=torch.cat(inputs), targets_ND=torch.cat(targets))
