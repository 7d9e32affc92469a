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
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.calibrate.activations import Activations, Call, forward_order, run_to_end, stream_like
from vitrim.calibrate.sums import check_finite
from vitrim.models.features import evaluating
from vitrim.ops.products import Products
from vitrim.share import ALONE, LANES, Share
from vitrim.surgery import channels_last, mlp_output, submodule, weight_of
from vitrim.types import MlpSite, Stats

JUDGING = 4096  # tokens that judge how much feedback pays, at most; spread over all images that are not in the sums
FARTHEST = 2.0**20  # times an MLP's largest output: the largest offset by which a layer scale is probed


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Tokens that are run together on any number of processes; `numbers_N` are their places in the whole sample."""

    inputs_ND: Tensor
    targets_ND: Tensor
    numbers_N: Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A sample of MLP inputs of the student, and the outputs that the MLP should have for them.

    Processes that share images hold some `lanes` of it each; `num_all` tokens are in all of them.
    """

    lanes: Sequence[Lane]
    num_all: int

    def thinned(self, most: int) -> Tokens:
        """Return at most so many tokens, evenly spread over all."""
        step, lanes = max(1, -(-self.num_all // most)), []
        for lane in self.lanes:
            rows = lane.numbers_N % step == 0
            parts = (each[rows] for each in (lane.inputs_ND, lane.targets_ND, lane.numbers_N))
            lanes.append(Lane(**dict(zip(("inputs_ND", "targets_ND", "numbers_N"), parts, strict=True))))
        return Tokens(lanes=lanes, num_all=-(-self.num_all // step))


@dataclass(frozen=True, kw_only=True)
class SiteVisit:
    """The calibration results of one MLP.

    `scale_D` is the layer scale behind it, None if there is no fixed one. `stands_alone`: the MLP can be run on tokens
    by itself, outside its block. `again` measures once more, with the student as it is at that time. `metric_DD` is the
    metric on its outputs, where a caller has one. `half` are the sums over the first half of the batches in `stats`,
    where they were asked for and there are two. `share` is that of the images; sums are over all of them.
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
    share: Share = ALONE


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
    share: Share = ALONE,
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
        share: of the batches, where several processes walk together; then all of them cut alike.

    Yields:
        One visit per site.
    """
    blocks = forward_order(teacher, sites, batches[0][:2])
    both = (
        Activations(teacher, blocks, batches, frozen=True, offload=offload and offload / "teacher", share=share),
        Activations(student, blocks, batches, frozen=False, offload=offload and offload / "student", share=share),
    )
    asked = _Asked(
        feedback=feedback,
        num_held_out=num_held_out,
        max_tokens=max_tokens,
        moments=moments,
        halves=halves,
        share=share,
    )
    for index, block in enumerate(blocks):
        for activations in both:
            activations.enter(index)
        if entered is not None:
            entered(block, *both)
        for site in [site for site in sites if site.block == block and site.path not in skip]:
            yield _visit(site, *both, asked)


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

    def __init__(self, moments: torch.dtype = torch.float64, share: Share = ALONE) -> None:
        self.products, self.width = Products(moments, share), 0

    def add(self, hidden_NH: Tensor, target_ND: Tensor, fed_ND: Tensor | None = None) -> None:
        """Add a batch of tokens; `fed_ND` is the part of the targets that is feedback, if its own sums are wanted."""
        self.width = target_ND.shape[-1]
        self.products.add(hidden_NH, target_ND if fed_ND is None else torch.cat([target_ND, fed_ND], dim=-1))

    def so_far(self) -> Sums:
        """Return a copy that is not added to any more."""
        self.products.begin()
        return copy.deepcopy(self)

    def done(self, path: str) -> Stats:
        """Return the sums of all processes as a frozen value; `path` is the MLP's.

        Raises:
            ModelError: they are not finite.
        """
        sums, fed = self.products, None
        sums.begin()  # a process without tokens has not yet
        width = max(sums.share.gathered(self.width))
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


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a walk asks of each visit; the fields are the arguments of `walk`."""

    feedback: float
    num_held_out: int
    max_tokens: int
    moments: torch.dtype
    halves: bool
    share: Share


def _visit(site: MlpSite, teacher: Activations, student: Activations, asked: _Asked) -> SiteVisit:
    """Sum up one MLP over all batches."""
    share, sums, half, alone = asked.share, Sums(asked.moments, asked.share), None, False
    scale_D = share.on_main(lambda: layer_scale(student.model, site.block, site.output, student.call(0)))
    num_fit = max(1, len(student.batches) - asked.num_held_out)
    middle = num_in_half(num_fit) if asked.halves else 0
    samples = _Samples(fit=asked.max_tokens // num_fit, held_out=asked.max_tokens // 4 // max(1, asked.num_held_out))
    for index in student.own:
        theirs, ours = teacher.observe(site, index), student.observe(site, index)
        target_ND = corrected(theirs, ours, scale_D, asked.feedback)
        if index >= middle > 0 and half is None:
            half = sums.so_far()
        if index < num_fit:
            sums.add(ours["hidden"], target_ND, fed_part(theirs, target_ND) if asked.num_held_out else None)
        if index == 0:
            alone = stands_alone(student.model, site, ours)
        samples.add("fit" if index < num_fit else "held_out", index, ours["input"], target_ND)
        del theirs, ours, target_ND  # not beside those of the next batch
    if middle > 0 and half is None:
        half = sums.so_far()
    return SiteVisit(
        site=site,
        stats=sums.done(site.path),
        scale_D=scale_D,
        stands_alone=share.on_main(lambda: alone),
        fit=samples.joined("fit", site.path, share),
        held_out=samples.joined("held_out" if num_fit < len(student.batches) else "fit", site.path, share),
        again=lambda: _visit(site, teacher, student, asked),
        half=None if half is None else half.done(site.path),
        share=share,
    )


class _Samples:
    """Tokens of an MLP that are drawn from each batch; `limits` are the most of one, by what they are for."""

    def __init__(self, **limits: int) -> None:
        self.limits = limits
        self.drawn: dict[str, dict[int, tuple[Tensor, Tensor]]] = {part: {} for part in limits}

    def add(self, part: str, index: int, inputs_ND: Tensor, targets_ND: Tensor) -> None:
        """Draw from a batch; which tokens does not depend on the batches before it, which others may have."""
        generator = torch.Generator().manual_seed(index)
        rows = torch.randperm(len(targets_ND), generator=generator)[: self.limits[part]].to(targets_ND.device)
        self.drawn[part][index] = (inputs_ND[rows].cpu(), targets_ND[rows].cpu())

    def joined(self, part: str, path: str, share: Share) -> Tokens:
        """Concatenate what was drawn, and number it among the tokens of all processes.

        Raises:
            ModelError: a token of any process is not finite.
        """
        mine = self.drawn[part]
        counts = {index: len(inputs) for index, (inputs, _) in mine.items()}
        every = dict(sorted(pair for each in share.gathered(counts) for pair in each.items()))
        starts = dict(zip(every, accumulate(every.values(), initial=0), strict=False))
        lanes = []
        for number in sorted({index % LANES for index in mine}):
            here = [index for index in mine if index % LANES == number]
            inputs_ND, targets_ND = (torch.cat(each) for each in zip(*(mine[index] for index in here), strict=True))
            numbers_N = torch.cat([torch.arange(starts[index], starts[index] + counts[index]) for index in here])
            lanes.append(Lane(inputs_ND=inputs_ND, targets_ND=targets_ND, numbers_N=numbers_N))
        tensors = [tensor for lane in lanes for tensor in (lane.inputs_ND, lane.targets_ND)]
        check_finite(path, f"a sampled token ({part})", *tensors, share=share)
        return Tokens(lanes=lanes, num_all=sum(every.values()))


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
