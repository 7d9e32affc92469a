"""How many CLS, distillation and register tokens stand in front of a model's patches, by what it does and not by names.

Such a token is the same for all images where it joins the patches. So one run is watched: what is made of parameters
and constants alone is followed, and where it is joined with tokens that are not, its place there is noted. Nothing is
put into the model, and no run is added.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vitrim.errors import ModelError
from vitrim.layers.kept_tokens import SplitBlock
from vitrim.models.takes import takes_token_ids

JOINS = (torch.cat, torch.concat, torch.concatenate, torch.hstack)
# By model, and by where features are read in it.
_FOUND: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


class Prefix:
    """The tokens in front of a model's patches, at one place where features are read.

    Args:
        model: an encoder.
        at: the place; each has its own number, since models drop such tokens on the way.
    """

    def __init__(self, model: nn.Module, at: str) -> None:
        self.model, self.at = model, at
        self.watch: _Watch | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the model's run inside a `with` block, if their number is not known yet."""
        with ExitStack() as stack:
            if _said(self.model) is None and self.at not in _FOUND.get(self.model, {}):
                self.watch = stack.enter_context(_Watch(self.model))
            yield

    def number(self, count: int) -> int:
        """Return how many of the tokens that the model put out in the run, so many in all, stand in front."""
        known = _said(self.model)
        if known is not None:
            return known
        found = _FOUND.setdefault(self.model, {})
        if self.at not in found:
            found[self.at] = 0 if self.watch is None else self.watch.number(count)
        return found[self.at]


def num_prefix_tokens(model: nn.Module) -> int:
    """Return how many CLS, distillation and register tokens precede the patches; 1 for a text encoder.

    Raises:
        ModelError: nothing says so, and the model's features were not read yet.
    """
    known = _said(model)
    if known is not None:
        return known
    found = _FOUND.get(model, {})
    if not found:
        raise ModelError(f"{type(model).__name__}: where patches begin shows when it runs; read its features first.")
    return next(iter(found.values()))


def _said(model: nn.Module) -> int | None:
    """Return what a model of timm or of vitrim says itself; None for others."""
    if hasattr(model, "num_prefix_tokens"):
        return int(model.num_prefix_tokens)  # type: ignore[arg-type]
    pooled_first = hasattr(model, "output_tokens")  # open_clip's own towers, also where the first is a pool's query
    return 1 if pooled_first or takes_token_ids(model) else None


class _Watch(TorchFunctionMode):
    """Follows what depends on no image, and notes where it is joined with tokens (B, N, D) that do.

    Attributes:
        seen: of each such row of tokens how many stand in front that depend on no image, and of how many in all.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self._own = {id(buffer) for buffer in model.buffers()}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self._places: list[tuple[int, int]] = []  # in the last row: where tokens of no image begin and end
        self._edited = any(isinstance(module, SplitBlock) for module in model.modules())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch as it is, and look at what goes in and comes out."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in JOINS:
            self._joined(args[0] if args else kwargs["tensors"], output)
        if all(self._is_fixed(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    self._made[id(tensor)] = weakref.ref(tensor)
        return output

    def number(self, count: int) -> int:
        """Return how many of so many tokens that came out stand in front; those alone may have come out.

        Blocks of vitrim's own in which tokens end never end these. In other models another number than what they
        joined means that they were dropped on the way.
        """
        for front, total in reversed(self.seen):
            if count == total or (count == front and count) or (self._edited and count <= total):
                return front
        return 0

    def _is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a constant, or made of such alone."""
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._own:
            return True
        made = self._made.get(id(tensor))
        return made is not None and made() is tensor

    def _joined(self, parts: Sequence[Tensor], output: Tensor) -> None:
        """Note where tokens of no image stand in a row that others are part of, with what is known of that row."""
        lengths = [part.shape[1] if part.ndim == 3 else 0 for part in parts]
        fixed = [self._is_fixed(part) for part in parts]
        if output.ndim != 3 or output.shape[1] != sum(lengths) or all(fixed) or not any(fixed):
            return
        others = sum(length for length, own in zip(lengths, fixed, strict=True) if not own)
        if not self.seen or self.seen[-1][1] != others:  # another row than before
            self._places = []
        start = 0
        for length, own in zip(lengths, fixed, strict=True):
            if own:
                self._places = [*_moved(self._places, start, length), (start, start + length)]
            start += length
        self.seen.append((_front(self._places), sum(lengths)))


def _moved(places: Sequence[tuple[int, int]], start: int, length: int) -> list[tuple[int, int]]:
    """Return places in a row after so many tokens were put in at `start`."""
    return [(a + length, b + length) if a >= start else (a, b) for a, b in places]


def _front(places: Sequence[tuple[int, int]]) -> int:
    """Return how many tokens from the first on are in one of the places."""
    end = 0
    for start, stop in sorted(places):
        if start > end:
            break
        end = max(end, stop)
    return end
