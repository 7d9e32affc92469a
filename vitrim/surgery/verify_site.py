"""The dead-unit test: whether cutting hidden units of a presumed MLP has the effect that it must have."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vitrim.errors import ModelError, reason_of
from vitrim.storage.tensor_files import not_finite
from vitrim.surgery.edits import apply_
from vitrim.surgery.keep_units import KeepUnits
from vitrim.surgery.modules import run_mlp, weight_of
from vitrim.types import MlpSite


def noises(width: int) -> Iterator[Tensor]:
    """Yield noise as an MLP may take it: tokens (1, 4, D), then a map with channels first, then with channels last."""
    for shape in ((1, 4, width), (1, width, 2, 2), (1, 2, 2, width)):
        yield torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def verify_site(model: nn.Module, site: MlpSite) -> bool:
    """Whether removing hidden units gives the same output as zeroing their columns of the output projection.

    A norm over the hidden units is bypassed for the comparison: removing units changes its statistics, by design.

    Raises:
        ModelError: the question stays open, since the module can't be run on tokens or its values are not finite.
    """
    container = model.get_submodule(site.path) if site.path else model
    weight = weight_of(model, site.output)
    if weight.is_meta:
        return True
    container = copy.deepcopy(container).float().eval()
    local = site.within(site.path)
    if local.norm is not None:
        container.get_submodule(local.norm).register_forward_hook(lambda _, args, output: args[0])
    keep = tuple(range(0, site.d_hidden, 2))
    with torch.no_grad():
        weight_of(container, local.output)[:, 1::2] = 0
        tokens, masked = _first_run(container, local, site.path)
        _check_values(masked, container, site.path)
        apply_(container, [KeepUnits(site=local, keep=keep)])
        cut = _run(container, local, tokens, site.path, "with half of its hidden units")
    scale = masked.abs().max().clamp(min=1e-6)
    return masked.shape == cut.shape and bool((masked - cut).abs().max() <= 1e-4 * scale)


def _first_run(container: nn.Module, site: MlpSite, path: str) -> tuple[Tensor, Tensor]:
    """Return the first kind of noise that a container takes, and its output.

    Raises:
        ModelError: it takes none; the reason is that of the first, tokens.
    """
    failed = []
    for noise in noises(site.d_model):
        noise = noise.to(weight_of(container, site.output).device)
        try:
            return noise, _run(container, site, noise, path, "on noise")
        except ModelError as error:
            failed.append(error)
    raise failed[0]


def _run(container: nn.Module, site: MlpSite, tokens: Tensor, path: str, how: str) -> Tensor:
    """Return the output of a container.

    Raises:
        ModelError: it raises something, or returns no tensor.
    """
    try:
        output = run_mlp(container, site, tokens)
        assert isinstance(output, Tensor), f"it returned {type(output).__name__}"
    except (
        Exception
    ) as error:  # foreign code, such as a forward with the hidden size written into it, may raise anything
        raise ModelError(
            f"{path or type(container).__name__}: looks like an MLP and can't be run {how} "
            f"({type(error).__name__}: {reason_of(error)})."
        ) from error
    return output


def _check_values(output: Tensor, container: nn.Module, path: str) -> None:
    """Check that an output is finite.

    Raises:
        ModelError: it is not; the tensor that is not finite, or else holds the largest value, is named.
    """
    if bool(torch.isfinite(output).all()):
        return
    tensors = {f"{path}.{name}".strip("."): tensor for name, tensor in container.named_parameters()}
    for name, tensor in tensors.items():
        if (what := not_finite(tensor)) is not None:
            raise ModelError(f"{name}: {what}; take a checkpoint that is whole.")
    name = max(tensors, key=lambda name: float(tensors[name].abs().max()))
    raise ModelError(
        f"{path}: puts out NaN or infinite values on noise; the largest of its weights is in {name} "
        f"({float(tensors[name].abs().max()):.3g})."
    )
