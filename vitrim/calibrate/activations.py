"""The activations of one model on all calibration batches, at one block at a time.

Foreign forwards are never copied: a hook catches the first block's arguments, and each block module is then called on
them. Where blocks are no chain (between Swin's stages) the model is run up to the block. Only the current block's
arguments are kept, in memory or in files.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrim.inputs import real_tokens, run_on
from vitrim.models.features import device_of, evaluating, first_tensor
from vitrim.share import ALONE, Share
from vitrim.surgery import channels_last, submodule
from vitrim.types import AttentionSite, MlpSite

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Activations:
    """The arguments with which one model calls its current block, for each batch, kept on the CPU.

    For a frozen model the block's outputs, seen while its MLPs are observed, are kept as the next block's inputs: so no
    block runs twice.

    Args:
        model: the model.
        blocks: paths of the blocks to enter, in forward order.
        batches: calibration images (B, C, H, W).
        frozen: whether the model stays unchanged throughout.
        offload: folder for the values, one file per batch; None keeps them in memory.
        share: of the batches: those of other processes are not run.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[Tensor],
        *,
        frozen: bool,
        offload: Path | None,
        share: Share = ALONE,
    ) -> None:
        self.own = share.batches(len(batches))
        self.model, self.blocks, self.batches, self.frozen = model, blocks, batches, frozen
        self.outputs = Store(offload and offload / "outputs")
        self.device = device_of(model)
        self.calls = Store(offload and offload / "calls")
        self.chained = _links(model, blocks, batches[0][:2].to(self.device))
        self.at: int | None = None

    def enter(self, index: int) -> None:
        """Set `calls` to the arguments of block `index`; the blocks before it must be in their final state.

        If the current block is an earlier one of the same chain, only the blocks between are run; otherwise the model
        is run up
        to the block.
        """
        start, self.at = self.at, index
        if start is not None and start < index and all(self.chained[start + 1 : index + 1]):
            self._go_on(start, index)
        else:
            block = self.blocks[index]
            for i in self.own:
                batch = self.batches[i].to(self.device)
                self.calls.put(i, _to(catch_call(self.model, block, batch), "cpu"))
        self.outputs.clear()

    def _go_on(self, start: int, end: int) -> None:
        """Run blocks `start`..`end` - 1 on their arguments, but take known outputs of the first one."""
        passed = [submodule(self.model, block) for block in self.blocks[start:end]]
        with evaluating(self.model):
            for i in self.own:
                (args, kwargs), left = self.calls.get(i), passed
                if self.outputs.has(i):
                    args, left = (self.outputs.get(i), *args[1:]), passed[1:]
                if left:
                    args, kwargs = _to(args, self.device), _to(kwargs, self.device)
                for block in left:
                    args = (first_tensor(block(*args, **kwargs)), *args[1:])
                self.calls.put(i, _to((args, kwargs), "cpu"))

    def call(self, index: int) -> Call:
        """Return the arguments of batch `index`, on the model's device."""
        return _to(self.calls.get(index), self.device)

    def run(self, index: int) -> None:
        """Run the current block of a frozen model on a batch, and keep its output in `outputs`, on the CPU."""
        assert self.at is not None and self.frozen
        args, kwargs = self.call(index)
        with evaluating(self.model):
            self.outputs.put(index, first_tensor(submodule(self.model, self.blocks[self.at])(*args, **kwargs)).cpu())

    def observe(self, site: MlpSite | AttentionSite, index: int, *, silent: Collection[str] = ()) -> dict[str, Tensor]:
        """Run the current block on a batch and return what `observe` sees; a frozen model's output is kept.

        The layers `silent` put out zeros; then no output is kept. Tokens that are padding are left out.
        """
        with silenced(self.model, silent):
            output, seen = observe(self.model, site, self.call(index))
        if self.frozen and not silent:
            self.outputs.put(index, output.cpu())
        return {name: real_tokens(tokens, self.batches[index]) for name, tokens in seen.items()}


@contextmanager
def silenced(model: nn.Module, layers: Collection[str]) -> Iterator[None]:
    """Let some layers put out zeros."""

    def silence(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    handles = [submodule(model, path).register_forward_hook(silence) for path in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(model: nn.Module, site: MlpSite | AttentionSite, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a block on arguments; return its output, and the activations of one MLP or attention inside it.

    Returns:
        The block's output, and float32 tensors of shape (tokens, width): `input`, `hidden` and `output` (input, hidden
        activations and output of the MLP; of an attention, hidden are the mixed values) and `stream` (the residual
        stream at the block's end: its output, or what a norm that ends the block is given).
    """
    seen: dict[str, Tensor] = {}
    block, value, output = (submodule(model, path) for path in (site.block, site.value, site.output))

    def see_input(layer: nn.Module, args: Any) -> None:
        seen["input"] = channels_last(layer, args[0])

    def see_output(layer: nn.Module, args: Any, out: Any) -> None:
        seen["hidden"], seen["output"] = channels_last(layer, args[0]), channels_last(layer, out)

    handles = [value.register_forward_pre_hook(see_input), output.register_forward_hook(see_output)]
    try:
        with evaluating(block):
            out, stream, _ = run_to_end(block, call)
            seen["stream"] = stream_like(output, stream)
    finally:
        for handle in handles:
            handle.remove()
    return out, {name: tensor.reshape(-1, tensor.shape[-1]).float() for name, tensor in seen.items()}


def stream_like(layer: nn.Module, stream: Tensor) -> Tensor:
    """Return the residual stream behind a layer with its channels last; behind a convolution a map has them second."""
    return channels_last(layer, stream) if stream.ndim == 4 else stream


def run_to_end(block: nn.Module, call: Call) -> tuple[Tensor, Tensor, str]:
    """Run a block; return its output, the residual stream at its end, and the path in it of a norm there or "".

    Where the last thing that a block does is a norm (BERT), the stream is what the norm is given.
    """
    given: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, args: Any, output: Any) -> None:
        if args:
            given[name] = (args[0], first_tensor(output))

    norms = [(name, part) for name, part in block.named_modules() if hasattr(part, "normalized_shape")]
    handles = [
        norm.register_forward_hook(lambda _, args, output, name=name: see(name, args, output)) for name, norm in norms
    ]
    try:
        out = first_tensor(block(*call[0], **call[1]))
    finally:
        for handle in handles:
            handle.remove()
    for name, (stream, normed) in given.items():
        if normed is out:
            return out, stream, name
    return out, out, ""


class Store(Sequence[Any]):
    """Values by batch number, in memory, or with their tensors in files of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.values: dict[int, Any] = {}
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.get(range(len(self))[index])

    def has(self, index: int) -> bool:
        """Whether there is a value for a batch."""
        return index in self.values

    def put(self, index: int, value: Any) -> None:
        """Keep a value for a batch; its tensors must be on the CPU."""
        if self.folder is None:
            self.values[index] = value
            return
        leaves, spec = tree_flatten(value)
        written = io.BytesIO()  # given a path, torch's writer aborts the whole process on a full disk
        torch.save([leaf for leaf in leaves if isinstance(leaf, Tensor)], written)
        (self.folder / f"{index}.pt").write_bytes(written.getbuffer())
        self.values[index] = ([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], spec)

    def get(self, index: int) -> Any:
        """Return the value of a batch."""
        if self.folder is None:
            return self.values[index]
        others, spec = self.values[index]
        tensors = iter(torch.load(self.folder / f"{index}.pt", weights_only=True))
        return tree_unflatten([next(tensors) if other is None else other[0] for other in others], spec)

    def clear(self) -> None:
        """Forget all values."""
        self.values.clear()


class _StopForward(Exception):
    """Raised to end a forward pass once a block's arguments have been seen."""


def catch_call(model: nn.Module, block: str, images: Tensor) -> Call:
    """Return the arguments with which a model calls one of its blocks."""
    caught: list[Call] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _StopForward

    handle = submodule(model, block).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with evaluating(model):
            run_on(model, images)
    except _StopForward:
        pass
    finally:
        handle.remove()
    return caught[0]


def block_calls(model: nn.Module, blocks: Sequence[str], images: Tensor) -> dict[str, tuple[Call, Any]]:
    """Return arguments and output of each block in one forward pass, in the order in which they run."""
    seen: dict[str, tuple[Call, Any]] = {}
    handles = []
    for block in blocks:

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, block: str = block) -> None:
            seen[block] = ((args, kwargs), output)

        handles.append(submodule(model, block).register_forward_hook(note, with_kwargs=True))
    try:
        with evaluating(model):
            run_on(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def forward_order(model: nn.Module, sites: Sequence[MlpSite | AttentionSite], images: Tensor) -> list[str]:
    """Return the paths of the blocks that hold sites, in forward order."""
    device = next(model.parameters()).device
    return list(block_calls(model, list(dict.fromkeys(site.block for site in sites)), images.to(device)))


def activation_bytes(model: nn.Module, blocks: Sequence[str], images: Tensor) -> tuple[int, int]:
    """Return how many bytes per image a block's arguments take, and its output: the maximum over all blocks.

    Args:
        model: the model; it is run once.
        blocks: the blocks that will be entered.
        images: a few images; data that a batch holds once for all its images makes the result too large, never too
            small.
    """
    seen = block_calls(model, blocks, images.to(device_of(model))).values()
    pairs = [(call, first_tensor(output)) for call, output in seen]
    calls, outputs = (max(map(_num_bytes, values)) for values in zip(*pairs, strict=True))
    return -(-calls // len(images)), -(-outputs // len(images))


def _num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested values."""
    return sum(leaf.nbytes for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _links(model: nn.Module, blocks: Sequence[str], images: Tensor) -> list[bool]:
    """For each block, whether its arguments are those of the previous block with the first replaced by its output."""
    seen = block_calls(model, blocks, images)
    links = [False]
    for before, after in pairwise(blocks):
        (old_args, old_kwargs), output = seen[before]
        (args, kwargs), _ = seen[after]
        links.append(
            bool(args) and _same((args[0], args[1:], kwargs), (first_tensor(output), old_args[1:], old_kwargs))
        )
    return links


def _same(a: Any, b: Any) -> bool:
    """Whether nested arguments are equal; tensors are compared by value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a is b or a == b)


def _to(value: Any, device: Any) -> Any:
    """Return nested arguments with their tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
