"""The only writer of modules: turns edits into smaller modules and smaller state dicts.

Every edit has two halves. `reshape_` changes a module tree (also on the meta device); `transform` changes a mapping
from names to tensors, read lazily. Pruning a live model, loading a compressed checkpoint and pruning file to file
are the same two halves in different order. Nothing here decides what to cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrim.errors import BudgetError, SiteNotFoundError
from vitrim.types import Edit, KeepUnits, MlpSite, MlpWeights


def apply_(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Cut a live model in place.

    Args:
        model: the model that the edits were made for.
        edits: in any order; each site at most once.

    Raises:
        BudgetError: an edit keeps no unit, a unit twice, or one that is not there.
        SiteNotFoundError: an edit names a module that the model does not have.
    """
    names = edit_of(edits)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    smaller = dict(transform(tensors, edits))
    reshape_(model, edits)
    model.load_state_dict(smaller, strict=False, assign=True)


def reshape_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Give each edited module its new shape; the new tensors are uninitialised, on the device of the old ones."""
    edits = tuple(edits)
    for edit in edits:  # all of them before the first is carried out, so that a bad one leaves the model whole
        _check(edit)
        for name in (edit.site.value, edit.site.gate, edit.site.output, edit.site.norm):
            if name is not None:
                submodule(model, name)
    for edit in edits:
        site, width = edit.site, edit.width
        for name in (site.value, site.gate):
            if name is not None:
                _resize_(submodule(model, name), dim=0, size=width * site.num_groups, attribute="out_features")
        _resize_(submodule(model, site.output), dim=1, size=width, attribute="in_features")
        if site.norm is not None:
            _resize_(submodule(model, site.norm), dim=0, size=width, attribute="normalized_shape")


def transform(tensors: Mapping[str, Tensor], edits: Iterable[Edit]) -> Iterator[tuple[str, Tensor]]:
    """Pass a state dict through, tensor by tensor, with the edited tensors cut or replaced.

    Args:
        tensors: names to tensors; each is read once, when its turn comes.
        edits: what to cut.

    Yields:
        Every name of `tensors` in its order, with its tensor after the edits.
    """
    touched = edit_of(edits)
    for name in tensors:
        edit = touched.get(name)
        if edit is None:
            yield name, tensors[name]
        elif name in edit.repaired:
            original = tensors[name]
            yield name, edit.repaired[name].to(device=original.device, dtype=original.dtype).contiguous()
        else:
            yield name, _cut(name, tensors[name], edit)


def edit_of(edits: Iterable[Edit]) -> dict[str, Edit]:
    """Names of the tensors that edits cut or replace, with the edit that does; a name may not be in the model."""
    return {name: edit for edit in edits for name in _touched(edit)}


def read_weights(model: nn.Module, site: MlpSite) -> MlpWeights:
    """The canonical view of a live site's weights; views and copies, never to be written to."""
    paths = [path for path in (site.value, site.gate, site.output) if path is not None]
    tensors = {f"{path}.weight": weight_of(model, path) for path in paths}
    biases = {f"{path}.bias": _bias(model, path) for path in paths}
    return site_weights({**tensors, **{name: bias for name, bias in biases.items() if bias is not None}}, site)


def site_weights(tensors: Mapping[str, Tensor], site: MlpSite) -> MlpWeights:
    """The canonical view of a site's weights, from a mapping of names to tensors."""
    gate_weight = gate_bias = None
    value_weight, value_bias = tensors[f"{site.value}.weight"], tensors.get(f"{site.value}.bias")
    if site.kind == "packed_gated":
        gate_weight, value_weight = value_weight.chunk(2)
        gate_bias, value_bias = (None, None) if value_bias is None else value_bias.chunk(2)
    elif site.gate is not None:
        gate_weight, gate_bias = tensors[f"{site.gate}.weight"], tensors.get(f"{site.gate}.bias")
    return MlpWeights(
        value_HD=value_weight,
        value_bias_H=value_bias,
        gate_HD=gate_weight,
        gate_bias_H=gate_bias,
        output_DH=tensors[f"{site.output}.weight"],
        output_bias_D=tensors.get(f"{site.output}.bias"),
    )


def submodule(model: nn.Module, path: str) -> nn.Module:
    """A module by dotted path.

    Raises:
        SiteNotFoundError: there is none of that name.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        kind = type(model).__name__
        raise SiteNotFoundError(f"{path}: no such module in {kind}; the plan was made for another model.") from None


def weight_of(model: nn.Module, path: str) -> Tensor:
    """A layer's weight without its graph, (out, in); writing to it writes to the layer."""
    return cast(Tensor, submodule(model, path).weight).detach()


def mlp_output(model: nn.Module, site: MlpSite, tokens_ND: Tensor) -> Tensor:
    """What a site's output projection puts out for MLP inputs (N, D), with the model's own activation between."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: Any, output: Any) -> None:
        caught.append(output)

    hook = submodule(model, site.output).register_forward_hook(catch)
    try:
        _run(submodule(model, site.path), site.within(site.path), tokens_ND[None])
    finally:
        hook.remove()
    return caught[0][0]


def confirm_site(model: nn.Module, site: MlpSite) -> bool:
    """Whether removing hidden units is the same as zeroing their columns of the output projection.

    A norm over the hidden units is bypassed for the comparison: removal changes its statistics, by design.
    """
    container = model.get_submodule(site.path) if site.path else model
    weight = weight_of(model, site.output)
    if weight.is_meta:
        return True
    container = copy.deepcopy(container).float().eval()
    local = site.within(site.path)
    if local.norm is not None:
        container.get_submodule(local.norm).register_forward_hook(lambda _, args, output: args[0])
    tokens = torch.randn(1, 4, site.d_model, generator=torch.Generator().manual_seed(0)).to(weight.device)
    keep = tuple(range(0, site.d_hidden, 2))
    with torch.no_grad():
        weight_of(container, local.output)[:, 1::2] = 0
        try:
            masked = _run(container, local, tokens)
            apply_(container, [KeepUnits(site=local, keep=keep)])
            cut = _run(container, local, tokens)
        except Exception:  # foreign code, such as a forward with the hidden size written into it, may raise anything
            return False
    scale = masked.abs().max().clamp(min=1e-6)
    return bool((masked - cut).abs().max() <= 1e-4 * scale)


def _run(container: nn.Module, site: MlpSite, tokens: Tensor) -> Tensor:
    """Run an MLP on tokens; one that is spread over two modules (`intermediate`, `output`) is composed."""
    first, _, inner = site.value.partition(".")
    if inner:
        second = site.output.partition(".")[0]
        return container.get_submodule(second)(container.get_submodule(first)(tokens), tokens)
    output = container(tokens)
    return output[0] if isinstance(output, tuple) else output


def _touched(edit: Edit) -> list[str]:
    """Names of the tensors that an edit cuts or replaces."""
    site = edit.site
    rows = [name for name in (site.value, site.gate, site.norm) if name is not None]
    names = [f"{name}.{part}" for name in rows for part in ("weight", "bias")] + [f"{site.output}.weight"]
    return names + [name for name in edit.repaired if name not in names]


def _check(edit: Edit) -> None:
    """Refuse an edit that can't be carried out."""
    total = edit.site.d_hidden
    if not edit.keep or len(set(edit.keep)) != len(edit.keep) or not 0 <= min(edit.keep) <= max(edit.keep) < total:
        raise BudgetError(f"{edit.site.path}: indices must be unique, at least one, within 0..{total - 1}.")


def _cut(name: str, tensor: Tensor, edit: Edit) -> Tensor:
    """One tensor of a site without the removed units."""
    _check(edit)
    site = edit.site
    keep = torch.tensor(edit.keep, device=tensor.device)
    dim, num_groups = int(name == f"{site.output}.weight"), site.num_groups if name.startswith(f"{site.value}.") else 1
    if tensor.shape[dim] != num_groups * site.d_hidden:
        units = tensor.shape[dim] // num_groups
        raise BudgetError(
            f"{name}: has {units} hidden units, the plan was made for {site.d_hidden}; use its own model."
        )
    keep = torch.cat([keep + group * site.d_hidden for group in range(num_groups)])
    return tensor.index_select(dim, keep).contiguous()


def _resize_(module: nn.Module, *, dim: int, size: int, attribute: str) -> None:
    """Replace the parameters of a linear or norm layer by uninitialised ones of another size."""
    for name, old in list(module.named_parameters(recurse=False)):
        if dim < old.ndim:
            shape = [*old.shape[:dim], size, *old.shape[dim + 1 :]]
            fresh = torch.empty(shape, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(fresh, requires_grad=old.requires_grad))
    if hasattr(module, attribute):
        setattr(module, attribute, (size,) if attribute == "normalized_shape" else size)


def _bias(model: nn.Module, path: str) -> Tensor | None:
    """A layer's bias without its graph, if it has one."""
    bias = getattr(submodule(model, path), "bias", None)
    return None if bias is None else bias.detach()
