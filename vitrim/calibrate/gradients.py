"""Gradients of a model's final features, and what they say of the outputs of its layers.

Shapes: N tokens, D width of a layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrim.calibrate.sums import check_finite
from vitrim.errors import ModelError
from vitrim.models.features import device_of, evaluating, features, frozen
from vitrim.models.reads import reads
from vitrim.ops.gram_schmidt import working_dtype
from vitrim.ops.output_metric import signs_like
from vitrim.surgery import channels_last, submodule

NUM_IMAGES, NUM_PROBES = 256, 4  # for a metric: many vectors beside any width, as each token gives one per probe
AT_ONCE = 16  # images whose graph is held at a time


@contextmanager
def graph_from(
    model: nn.Module, paths: Sequence[str], of: Literal["inputs", "outputs"]
) -> Iterator[list[tuple[str, Tensor]]]:
    """Hold a model in eval mode so that forward passes have a graph, from the first of some modules on.

    No parameter is in the graph. Yields a list to which each pass adds every one of these modules with its first input,
    or its output.
    """
    seen: list[tuple[str, Tensor]] = []
    with ExitStack() as held:
        for path in paths:
            module = submodule(model, path)
            if of == "inputs":
                handle = module.register_forward_pre_hook(_keep_input(path, seen))
            else:
                handle = module.register_forward_hook(_keep_output(path, seen))
            held.callback(handle.remove)
        for context in (evaluating(model), frozen(model), torch.inference_mode(False), torch.enable_grad()):
            held.enter_context(context)
        yield seen


def final_metrics(
    model: nn.Module,
    paths: Sequence[str],
    batches: Sequence[Tensor],
    *,
    num_images: int = NUM_IMAGES,
    num_probes: int = NUM_PROBES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return by how much an error in the outputs of some layers moves the final features.

    The metric of a layer is the mean over its output tokens of J'J, where J is the derivative of all final tokens,
    pooled ones and patches, by one output token. It is estimated from random signs of the features, with one backward
    pass for all layers, without labels.

    Args:
        model: the model, which is not changed.
        paths: the layers.
        batches: calibration inputs.
        num_images: how many of them are used.
        num_probes: random signs for each.
        seed: of these.

    Returns:
        By path, a metric (D, D) with trace D, so that no scale is left in it; zeros where nothing moves the features.

    Raises:
        ModelError: a layer did not run, no gradient comes back to it, or a gradient is not finite.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    images = islice(chain.from_iterable(batches), num_images)
    few = torch.stack(list(images)).split(AT_ONCE)
    with graph_from(model, paths, "outputs") as seen:
        for batch in few:
            found = features(model, batch.to(device_of(model)))
            if missed := [path for path in paths if path not in dict(seen)]:
                raise ModelError(f"{missed[0]}: did not run as a layer, so its part in the features is not known.")
            parts, unread = found.tensors, reads(model) is not None
            for probe in range(num_probes):
                signs = [signs_like(part, generator) for part in parts]
                for path, gradient in _gradients(parts, seen, signs, last=probe + 1 == num_probes, unread=unread):
                    sums[path] = sums.get(path, 0) + _gram(channels_last(submodule(model, path), gradient))
            seen.clear()
    for path, gram_DD in sums.items():
        check_finite(path, "a gradient of the features", gram_DD)
    return {path: gram_DD * (len(gram_DD) / _positive(gram_DD.trace())) for path, gram_DD in sums.items()}


def _gradients(
    parts: Sequence[Tensor], seen: Sequence[tuple[str, Tensor]], signs: Sequence[Tensor], *, last: bool, unread: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of signed features for what each module put out; zeros where some modules may be unread."""
    if not all(part.requires_grad for part in parts):
        raise ModelError("the model's features have no gradient, so it can't be said what they feel of an MLP's error.")
    outputs = [output for _, output in seen]
    found = torch.autograd.grad(parts, outputs, signs, retain_graph=not last, allow_unused=True)
    for (path, output), gradient in zip(seen, found, strict=True):
        if gradient is None and not unread:
            raise ModelError(f"{path}: no gradient of the features comes back to it, so its errors can't be weighed.")
        yield path, torch.zeros_like(output) if gradient is None else gradient


def _gram(gradient: Tensor) -> Tensor:
    """Return the sum over all tokens of each one's gradient times itself, (D, D)."""
    gradient_ND = gradient.flatten(0, -2)
    gradient_ND = gradient_ND.to(working_dtype(gradient_ND.device))
    return gradient_ND.T @ gradient_ND


def _positive(trace: Tensor) -> Tensor:
    """Return a trace, or 1 for one of zeros."""
    return torch.where(trace > 0, trace, 1)


def _keep_input(path: str, seen: list[tuple[str, Tensor]]) -> Callable[..., tuple[Any, ...]]:
    """Return a forward hook that keeps a module's first input and, if it has no graph, starts one there."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        hidden = _in_graph(args[0])
        seen.append((path, hidden))
        return hidden, *args[1:]

    return hook


def _keep_output(path: str, seen: list[tuple[str, Tensor]]) -> Callable[..., Tensor]:
    """Return a forward hook that keeps a module's output and, if it has no graph, starts one there."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append((path, _in_graph(output)))
        return seen[-1][1]

    return hook


def _in_graph(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()
