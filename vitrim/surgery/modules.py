"""Read modules: by path, as the weights of an MLP, and by running one MLP on tokens. Nothing here changes a module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from vitrim.errors import SiteNotFoundError
from vitrim.types import LayerSite, MlpSite, MlpWeights


def read_weights(model: nn.Module, site: MlpSite) -> MlpWeights:
    """Return the weights of an MLP in a live model as (H, D) and (D, H) matrices.

    They may be views of the model's own tensors: never write to them.
    """
    paths = [path for path in (site.value, site.gate, site.output) if path is not None]
    tensors = {f"{path}.weight": weight_of(model, path) for path in paths}
    biases = {f"{path}.bias": _bias(model, path) for path in paths}
    return site_weights({**tensors, **{name: bias for name, bias in biases.items() if bias is not None}}, site)


def site_weights(tensors: Mapping[str, Tensor], site: MlpSite) -> MlpWeights:
    """Return the weights of an MLP as (H, D) and (D, H) matrices, from a mapping of names to tensors."""
    gate_weight = gate_bias = None
    value_weight, value_bias = _matrix(tensors[f"{site.value}.weight"]), tensors.get(f"{site.value}.bias")
    if site.kind == "packed_gated":
        gate_weight, value_weight = value_weight.chunk(2)
        gate_bias, value_bias = (None, None) if value_bias is None else value_bias.chunk(2)
    elif site.gate is not None:
        gate_weight, gate_bias = _matrix(tensors[f"{site.gate}.weight"]), tensors.get(f"{site.gate}.bias")
    return MlpWeights(
        value_HD=value_weight,
        value_bias_H=value_bias,
        gate_HD=gate_weight,
        gate_bias_H=gate_bias,
        output_DH=_matrix(tensors[f"{site.output}.weight"]),
        output_bias_D=tensors.get(f"{site.output}.bias"),
    )


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path.

    Raises:
        SiteNotFoundError: the model has no module at that path.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        kind = type(model).__name__
        raise SiteNotFoundError(f"{path}: no such module in {kind}; the plan was made for another model.") from None


def check_layer(model: nn.Module, layer: LayerSite) -> None:
    """Check that a model has the layer that a site describes.

    Raises:
        SiteNotFoundError: the module is missing, or of another kind or size.
    """
    own = dict(submodule(model, layer.path).named_parameters(recurse=False)) if layer.path else {}
    check_weight(layer, own["weight"].shape if "weight" in own else ())


def check_weight(layer: LayerSite, shape: Sequence[int]) -> None:
    """Check that a weight has the shape of the layer that a site describes.

    Raises:
        SiteNotFoundError: it has another shape.
    """
    if tuple(shape) != layer.weight_shape:
        wanted = "x".join(map(str, layer.weight_shape))
        raise SiteNotFoundError(f"{layer.path}: no layer with a weight of {wanted}; the plan is of another model.")


def weight_of(model: nn.Module, path: str) -> Tensor:
    """Return a layer's weight (out, in) without its graph; writing to it changes the layer."""
    return _matrix(cast(Tensor, submodule(model, path).weight).detach())


def _matrix(weight: Tensor) -> Tensor:
    """Return a weight as a matrix (out, in): that of a 1x1 convolution has two more dimensions, of size 1."""
    return weight.flatten(1)


def channels_last(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Return what a layer is given, or puts out, with its channels last: those of a convolution come second."""
    return tensor.movedim(1, -1) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else tensor


def mlp_output(model: nn.Module, site: MlpSite, tokens_ND: Tensor) -> Tensor:
    """Run the MLP on tokens (N, D) and return the output of its output projection (N, D)."""
    return hidden_and_output(model, site, tokens_ND)[1]


def hidden_and_output(model: nn.Module, site: MlpSite, tokens_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Run the MLP on tokens (N, D) and return input (N, H) and output (N, D) of its output projection."""
    caught: list[tuple[Tensor, Tensor]] = []

    def catch(layer: nn.Module, args: Any, output: Any) -> None:
        caught.append((channels_last(layer, args[0]), channels_last(layer, output)))

    hook = submodule(model, site.output).register_forward_hook(catch)
    try:
        run_mlp(submodule(model, site.path), site.within(site.path), tokens_ND[None])
    finally:
        hook.remove()
    hidden, output = caught[0]
    return hidden.flatten(0, -2), output.flatten(0, -2)


def run_mlp(container: nn.Module, site: MlpSite, tokens: Tensor) -> Tensor:
    """Run an MLP on tokens; the parts of one that is spread over two modules (`intermediate`, `output`) in turn.

    The second part of these adds the residual itself (BERT), or leaves it to the block (Swin). Of a `Sequential` the
    members between the two layers are run, without a norm in front. To convolutions, tokens (B, N, D) are a map.
    """
    if tokens.ndim == 3 and isinstance(submodule(container, site.value), nn.Conv2d):
        tokens = tokens.mT[..., None]
    if site.value.startswith("intermediate."):
        hidden, output = container.get_submodule("intermediate")(tokens), container.get_submodule("output")
        return output(hidden, tokens) if len(inspect.signature(output.forward).parameters) > 1 else output(hidden)
    if isinstance(container, nn.Sequential):
        names = [name for name, _ in container.named_children()]
        first, last = (names.index(path.partition(".")[0]) for path in (site.value, site.output))
        for member in list(container)[first : last + 1]:
            tokens = member(tokens)
        return tokens
    output = container(tokens)
    return output[0] if isinstance(output, tuple) else output


def _bias(model: nn.Module, path: str) -> Tensor | None:
    """Return a layer's bias without its graph, or None."""
    bias = getattr(submodule(model, path), "bias", None)
    return None if bias is None else bias.detach()
