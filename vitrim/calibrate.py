"""Walks a model block by block over calibration images and sums up what each MLP sees and should put out.

The teacher runs on its own stream of tokens, the student on its own, so a block is seen exactly when the blocks before
it are already cut. Foreign forwards are never copied: the first block's inputs are caught by a hook and each block
module is then called on them. Where blocks are no chain (between Swin's stages) the model is run up to the block.
Activations are not stored; only the current block's streams and a bounded sample of tokens for the refit are.

Shapes: N tokens, H hidden units, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.models.taps import evaluating
from vitrim.ops.gram_schmidt import working_dtype
from vitrim.surgery import mlp_output, submodule, weight_of
from vitrim.types import MlpSite, Stats

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A sample of MLP inputs of the student and of the outputs that the MLP should have there."""

    inputs_ND: Tensor
    targets_ND: Tensor


@dataclass(frozen=True, kw_only=True)
class SiteVisit:
    """What calibration has seen of one MLP.

    `scale_D` is the layer scale that follows it, None where there is no fixed one. `stands_alone`: the MLP can be run
    on tokens by itself, outside its block. `again` measures once more, with the student as it is by then.
    """

    site: MlpSite
    stats: Stats
    scale_D: Tensor | None
    stands_alone: bool
    fit: Tokens
    held_out: Tokens
    again: Callable[[], SiteVisit]


def walk(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[MlpSite],
    batches: Sequence[Tensor],
    *,
    feedback: float = 1.0,
    num_held_out: int = 1,
    max_tokens: int = 100_000,
) -> Iterator[SiteVisit]:
    """Visit each MLP in forward order; the caller cuts the student's site before asking for the next.

    Args:
        teacher: the original model, unchanged throughout.
        student: the model being cut, block after block, between visits.
        sites: the MLPs to visit.
        batches: calibration images (B, C, H, W), preprocessed; the last `num_held_out` batches are not in the sums.
        feedback: share of the accumulated error of the residual stream that a target corrects, 0..1.
        num_held_out: batches kept for judging.
        max_tokens: tokens sampled for `fit` (and a quarter of it for `held_out`), spread over all images.

    Yields:
        One visit a site.
    """
    blocks = _forward_order(teacher, sites, batches[0][:2])
    streams = [_Stream(teacher, blocks, batches, frozen=True), _Stream(student, blocks, batches, frozen=False)]
    for index, block in enumerate(blocks):
        for stream in streams:
            stream.enter(index)
        for site in [site for site in sites if site.block == block]:
            yield _visit(site, streams[0], streams[1], feedback, num_held_out, max_tokens)


def layer_scale(model: nn.Module, site: MlpSite, call: Call) -> Tensor | None:
    """The fixed diagonal between an MLP's output and its block's output, found by probing.

    A known offset is added to the output projection's output: behind a residual sum with a layer scale the block's
    output moves by that scale, everywhere and in proportion. Any other answer (a norm in between) gives None.
    """
    block, output = submodule(model, site.block), submodule(model, site.output)
    width = weight_of(model, site.output).shape[0]
    signs = torch.where(torch.arange(width) % 3 == 0, -0.5, 1.0)
    with evaluating(model):
        base = first_tensor(block(*call[0], **call[1])).float()
        if base.shape[-1] != width:
            return None
        answers = []
        for offset in (torch.ones(width), signs):
            offset = offset.to(base.device)

            def add(_: nn.Module, args: Any, out: Any, offset: Tensor = offset) -> Tensor:
                return out + offset.to(out.dtype)

            handle = output.register_forward_hook(add)
            try:
                moved = first_tensor(block(*call[0], **call[1])).float() - base
            finally:
                handle.remove()
            answers.append((moved / offset).reshape(-1, width))
    scale_D = answers[0].mean(0)
    # float32 rounding of a residual stream of size |base| is what an honest diagonal may still show.
    tolerance = 1e-3 * scale_D.abs().max() + 1e-5 * base.abs().max()
    fixed = all(bool(((answer - scale_D).abs() <= tolerance).all()) for answer in answers)
    return scale_D if fixed and float(scale_D.abs().max()) > 0 else None


def first_tensor(output: Any) -> Tensor:
    """A block's output tensor, also where it comes first in a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


@dataclass
class _Sums:
    """Running float64 sums of hidden activations and targets."""

    num_tokens: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, hidden_NH: Tensor, target_ND: Tensor) -> None:
        """Add a batch of tokens."""
        dtype = working_dtype(hidden_NH.device)
        hidden_NH, target_ND = hidden_NH.to(dtype), target_ND.to(dtype)
        new = {
            "hidden_H": hidden_NH.sum(0),
            "hidden_HH": hidden_NH.T @ hidden_NH,
            "target_D": target_ND.sum(0),
            "cross_HD": hidden_NH.T @ target_ND,
            "square": target_ND.square().sum(),
        }
        self.num_tokens += len(hidden_NH)
        for name, value in new.items():
            self.parts[name] = self.parts[name].add_(value) if name in self.parts else value

    def done(self) -> Stats:
        """The sums as a frozen value."""
        parts = dict(self.parts)
        square = float(parts.pop("square"))
        return Stats(num_tokens=self.num_tokens, target_square=square, **parts)


class _Stream:
    """The arguments with which one model's current block is called, batch by batch, kept on the CPU.

    A frozen model's block outputs, seen while its MLPs are observed, are the next block's inputs: it never runs twice.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor], *, frozen: bool) -> None:
        self.model, self.blocks, self.batches, self.frozen = model, blocks, batches, frozen
        self.outputs: dict[int, Tensor] = {}
        self.device = next(model.parameters()).device
        self.calls: list[Call] = []
        self.chained = _links(model, blocks, batches[0][:2].to(self.device))

    def enter(self, index: int) -> None:
        """Make `calls` the arguments of block `index`, given that the blocks before it are final."""
        if index > 0 and self.chained[index]:
            previous = submodule(self.model, self.blocks[index - 1])
            with evaluating(self.model):
                for i, (args, kwargs) in enumerate(self.calls):
                    output = self.outputs.pop(i, None)
                    if output is None:
                        output = first_tensor(previous(*_to(args, self.device), **_to(kwargs, self.device))).cpu()
                    self.calls[i] = ((output, *args[1:]), kwargs)
        else:
            block = self.blocks[index]
            self.outputs.clear()
            self.calls = [_to(_catch_call(self.model, block, batch.to(self.device)), "cpu") for batch in self.batches]

    def call(self, index: int) -> Call:
        """Batch `index`'s arguments, on the model's device."""
        return _to(self.calls[index], self.device)

    def observe(self, site: MlpSite, index: int) -> dict[str, Tensor]:
        """Run the block on a batch; its output, and the MLP's input, hidden activations and output, as (N, width)."""
        seen: dict[str, Tensor] = {}
        value, output = submodule(self.model, site.value), submodule(self.model, site.output)

        def see_input(_: nn.Module, args: Any) -> None:
            seen["input"] = args[0]

        def see_output(_: nn.Module, args: Any, out: Any) -> None:
            seen["hidden"], seen["mlp"] = args[0], out

        handles = [value.register_forward_pre_hook(see_input), output.register_forward_hook(see_output)]
        args, kwargs = self.call(index)
        try:
            with evaluating(self.model):
                seen["block"] = first_tensor(submodule(self.model, site.block)(*args, **kwargs))
            if self.frozen:
                self.outputs[index] = seen["block"].cpu()
        finally:
            for handle in handles:
                handle.remove()
        return {name: tensor.reshape(-1, tensor.shape[-1]).float() for name, tensor in seen.items()}


def _visit(
    site: MlpSite, teacher: _Stream, student: _Stream, feedback: float, num_held_out: int, max_tokens: int
) -> SiteVisit:
    """Sum up one site over all batches."""
    sums, samples = _Sums(), {"fit": [], "held_out": []}
    scale_D = layer_scale(student.model, site, student.call(0))
    num_fit = max(1, len(student.batches) - num_held_out)
    limits = {"fit": max_tokens // num_fit, "held_out": max_tokens // 4 // max(1, num_held_out)}
    generator = torch.Generator().manual_seed(0)
    for index in range(len(student.batches)):
        theirs, ours = teacher.observe(site, index), student.observe(site, index)
        target_ND = theirs["mlp"]
        if scale_D is not None and feedback > 0:
            # Where the scale is next to nothing, no output of the MLP could correct the stream.
            inverse_D = torch.where(scale_D.abs() > 1e-3 * scale_D.abs().max(), 1 / scale_D, 0.0)
            behind = (theirs["block"] - scale_D * theirs["mlp"]) - (ours["block"] - scale_D * ours["mlp"])
            target_ND = target_ND + feedback * inverse_D * behind
        part = "fit" if index < num_fit else "held_out"
        if part == "fit":
            sums.add(ours["hidden"], target_ND)
        rows = torch.randperm(len(target_ND), generator=generator)[: limits[part]].to(target_ND.device)
        samples[part].append((ours["input"][rows].cpu(), target_ND[rows].cpu()))
    pools = {part: _join(pairs or samples["fit"]) for part, pairs in samples.items()}
    return SiteVisit(
        site=site,
        stats=sums.done(),
        scale_D=scale_D,
        stands_alone=_stands_alone(student.model, site, student.observe(site, 0)),
        fit=pools["fit"],
        held_out=pools["held_out"],
        again=lambda: _visit(site, teacher, student, feedback, num_held_out, max_tokens),
    )


def _stands_alone(model: nn.Module, site: MlpSite, seen: dict[str, Tensor]) -> bool:
    """Whether running the MLP on its caught inputs gives the outputs it gave inside its block."""
    with evaluating(model):
        again_ND = mlp_output(model, site, seen["input"][:64].to(weight_of(model, site.output).dtype))
    expected_ND = seen["mlp"][:64]
    return bool((again_ND - expected_ND).abs().max() <= 1e-3 * expected_ND.abs().max())


def _join(pairs: list[tuple[Tensor, Tensor]]) -> Tokens:
    """Samples of several batches as one."""
    inputs, targets = zip(*pairs, strict=True)
    return Tokens(inputs_ND=torch.cat(inputs), targets_ND=torch.cat(targets))


class _StopForward(Exception):
    """Ends a forward pass once what was wanted has been seen."""


def _catch_call(model: nn.Module, block: str, images: Tensor) -> Call:
    """The arguments with which a model calls one of its blocks."""
    caught: list[Call] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _StopForward

    handle = submodule(model, block).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with evaluating(model):
            model(images)
    except _StopForward:
        pass
    finally:
        handle.remove()
    return caught[0]


def _record(model: nn.Module, blocks: Sequence[str], images: Tensor) -> dict[str, tuple[Call, Tensor]]:
    """Arguments and output of each block in one forward pass, in the order in which they run."""
    seen: dict[str, tuple[Call, Tensor]] = {}
    handles = []
    for block in blocks:

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, block: str = block) -> None:
            seen[block] = ((args, kwargs), first_tensor(output))

        handles.append(submodule(model, block).register_forward_hook(note, with_kwargs=True))
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _forward_order(model: nn.Module, sites: Sequence[MlpSite], images: Tensor) -> list[str]:
    """The blocks that hold sites, in the order in which the data meets them."""
    device = next(model.parameters()).device
    return list(_record(model, list(dict.fromkeys(site.block for site in sites)), images.to(device)))


def _links(model: nn.Module, blocks: Sequence[str], images: Tensor) -> list[bool]:
    """For each block, whether its arguments are the previous block's, with the first replaced by that one's output."""
    seen = _record(model, blocks, images)
    links = [False]
    for before, after in pairwise(blocks):
        (old_args, old_kwargs), output = seen[before]
        (args, kwargs), _ = seen[after]
        links.append(bool(args) and _same((args[0], args[1:], kwargs), (output, old_args[1:], old_kwargs)))
    return links


def _same(a: Any, b: Any) -> bool:
    """Equality of nested arguments; tensors by value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a is b or a == b)


def _to(value: Any, device: Any) -> Any:
    """Nested arguments with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
