"""Find the MLPs of a model by structure and naming, and verify each by a dead-unit test.

Foreign classes are never named: an MLP is a pair (or triple) of linear layers with known names whose shapes fit.
Whether it behaves like one is then checked by running it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from vitrim.errors import ModelError, SiteNotFoundError
from vitrim.layers.moefication import ExpertMlp
from vitrim.surgery import verify_site, weight_of
from vitrim.types import MlpKind, MlpSite

# (gate, value, output) below a container; gate None: plain, or packed where the value projection is twice as tall.
NAMES: tuple[tuple[str | None, str, str], ...] = (
    ("fc1_g", "fc1_x", "fc2"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w2", "w3"),
    ("w1", "w3", "w2"),
    ("w0", "w1", "w2"),
    ("wi_0", "wi_1", "wo"),
    ("gate_proj.linear", "up_proj.linear", "down_proj.linear"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "w12", "w3"),
    (None, "weights_in", "weights_out"),
    (None, "linear1", "linear2"),
    (None, "lin1", "lin2"),
    (None, "dense1", "dense2"),
    (None, "linear_fc1", "linear_fc2"),
    (None, "proj_in", "proj_out"),
    (None, "wi", "wo"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "up_proj", "down_proj"),
    (None, "intermediate.dense", "output.dense"),
    (None, "0", "3"),
    (None, "0", "2"),
)
log = logging.getLogger("vitrim")
NORM_NAMES = ("norm", "ffn_ln", "sub_ln", "ln")


def find_mlps(model: nn.Module, *, scope: str | None = None) -> tuple[MlpSite, ...]:
    """Find every MLP of a model, in the order of its modules.

    Args:
        model: any module; MLPs on the meta device are found but not verified by running.
        scope: dotted path of the subtree to search, such as the vision tower of a VLM.

    Returns:
        One site per MLP, each verified by a dead-unit test (once for each distinct kind of container and shape).

    Raises:
        SiteNotFoundError: the scope does not exist, or holds no MLP; if modules look like one and can't be run, the
            first is named with the reason.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)))
        >>> [site] = find_mlps(model)
        >>> site.path, site.kind, site.d_model, site.d_hidden
        ('1', 'plain', 4, 16)
    """
    prefix = scope or ""
    try:
        root = model.get_submodule(prefix)
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children())
        raise SiteNotFoundError(f"scope {prefix!r}: no such module; the top level has {children}.") from None
    found: list[MlpSite] = []
    claimed: set[str] = set()
    verdicts: dict[tuple, bool | str] = {}
    failed: list[str] = []
    split = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ExpertMlp))
    for name, module in root.named_modules(prefix=prefix):
        if name.startswith(split):  # the units of experts can't be cut without their router
            continue
        site, reasons = _confirmed(model, module, name, claimed, verdicts)
        if site is None:
            failed += reasons
        else:
            claimed.add(site.output)
            found.append(site)
    if failed and not found:
        raise SiteNotFoundError(f"no MLP confirmed in {type(model).__name__}, {len(failed)} left open: {failed[0]}")
    for said in dict.fromkeys(failed):
        log.warning("%s It is left as it is.", said)
    if not found:
        num_modules = sum(1 for _ in root.modules())
        raise SiteNotFoundError(
            f"no MLP found in {type(model).__name__} ({num_modules} modules seen); vitrim knows linear layers named "
            f"{', '.join('/'.join(part for part in names if part) for names in NAMES)}."
        )
    mlp_weights = {f"{name}.weight" for site in found for name in (site.value, site.gate, site.output) if name}
    return tuple(replace(site, block=_block_of(model, site, mlp_weights)) for site in found)


def _confirmed(
    model: nn.Module, container: nn.Module, path: str, claimed: set[str], verdicts: dict[tuple, bool | str]
) -> tuple[MlpSite | None, list[str]]:
    """Return a container's site that passes the dead-unit test, or None and why the test could not be made."""
    types, reasons = tuple(type(part) for part in container.modules()), []
    for site in _matches(container, path):
        if site.output in claimed:
            continue
        signature = (types, site.output.removeprefix(path), site.d_model, site.d_hidden)
        if signature not in verdicts:
            try:
                verdicts[signature] = verify_site(model, site)
            except ModelError as error:
                verdicts[signature] = str(error)
        verdict = verdicts[signature]
        if verdict is True:
            return site, []
        reasons += [verdict] if isinstance(verdict, str) else []
    return None, reasons


def resolve_scope(model: nn.Module, scope: str | None, encoder: str) -> tuple[str, str]:
    """Return the paths of the part of a model that is run, and of the part in which MLPs are searched.

    Args:
        model: the whole model.
        scope: the user's choice: a dotted path, or an end of one that fits one module only; None for the encoder.
        encoder: path of the part that takes the inputs, "" for the whole model.

    Returns:
        Paths of the encoder and of the scope, both from the root; a scope outside the encoder is the encoder.

    Raises:
        SiteNotFoundError: no module has that name, or several have.
    """
    if scope is None:
        return encoder, encoder
    names = [name for name, _ in model.named_modules()]
    found = [name for name in names if name == scope] or [name for name in names if name.endswith(f".{scope}")]
    if len(found) != 1:
        children = ", ".join(name for name, _ in model.named_children())
        what = f"several modules of that name ({', '.join(found[:3])})" if found else "no such module"
        raise SiteNotFoundError(f"scope {scope!r}: {what}; the top level has {children}.")
    inside = encoder in ("", found[0]) or found[0].startswith(f"{encoder}.")
    return (encoder if inside else found[0]), found[0]


def _matches(container: nn.Module, path: str) -> Iterator[MlpSite]:
    """Yield the sites that a container's linear layers may form; names alone leave several if all layers are square."""
    for gate_name, value_name, output_name in NAMES:
        names = [name for name in (gate_name, value_name, output_name) if name]
        layers = [_linear(container, name) for name in names]
        if any(layer is None for layer in layers):
            continue
        *firsts, output = [weight_of(container, name).shape for name in names]
        d_out, d_hidden = output
        if any(width != d_out for _, width in firsts) or d_hidden < 2:
            continue
        kind = _kind([height for height, _ in firsts], d_hidden)
        if kind is None or (value_name == "0" and not _is_sequential_mlp(container, output_name)):
            continue
        for name, layer in zip(names, layers, strict=True):
            _refuse_computed(layer, f"{path}.{name}".strip("."))
        full = {name: f"{path}.{name}" if path else name for name in names}
        norm = _inner_norm(container, d_hidden)
        yield MlpSite(
            path=path,
            kind=kind,
            d_model=d_out,
            d_hidden=d_hidden,
            gate=full[gate_name] if gate_name else None,
            value=full[value_name],
            output=full[output_name],
            has_bias=getattr(layers[-2], "bias", None) is not None,
            norm=None if norm is None else (f"{path}.{norm}" if path else norm),
        )


def _kind(heights: list[int], d_hidden: int) -> MlpKind | None:
    """Return the kind of an MLP from the heights of its input projections, or None."""
    if heights == [d_hidden, d_hidden]:
        return "split_gated"
    if heights == [d_hidden]:
        return "plain"
    return "packed_gated" if heights == [2 * d_hidden] else None


def _linear(container: nn.Module, name: str) -> nn.Module | None:
    """Return a linear layer below a container by name, or None.

    Its weight must be (out, in) and a parameter of its own, not a product of others.
    """
    try:
        layer = container.get_submodule(name)
    except AttributeError:
        return None
    weight, features = (
        getattr(layer, "weight", None),
        (getattr(layer, "out_features", 0), getattr(layer, "in_features", 0)),
    )
    plain = isinstance(weight, nn.Parameter) or _is_computed(layer)
    return layer if plain and weight is not None and tuple(weight.shape) == features else None


def _is_computed(layer: nn.Module) -> bool:
    """Whether a parametrization of torch, such as weight norm, makes a layer's weight out of other tensors."""
    return is_parametrized(layer, "weight") or isinstance(getattr(layer, "weight_g", None), nn.Parameter)


def _refuse_computed(layer: nn.Module | None, path: str) -> None:
    """Refuse a layer of an MLP whose weight can't be cut.

    Raises:
        ModelError: a parametrization computes its weight.
    """
    if layer is not None and _is_computed(layer):
        new = is_parametrized(layer, "weight")
        line = "parametrize.remove_parametrizations" if new else "remove_weight_norm"
        given = f'model.get_submodule("{path}")' + (', "weight"' if new else "")
        raise ModelError(
            f"{path}: its weight is computed from others (weight norm or another parametrization), so no units can be "
            f"cut out of it; make it plain first: torch.nn.utils.{line}({given})."
        )


def _is_sequential_mlp(container: nn.Module, output_name: str) -> bool:
    """Whether a numbered container is linear, activation (and dropout), linear, with no parameters in between."""
    between = [container.get_submodule(str(i)) for i in range(1, int(output_name))]
    return isinstance(container, nn.Sequential) and not any(any(True for _ in m.parameters()) for m in between)


def _inner_norm(container: nn.Module, d_hidden: int) -> str | None:
    """Return the name of the norm over the hidden units inside the MLP, or None."""
    for name in NORM_NAMES:
        shape = getattr(getattr(container, name, None), "normalized_shape", None)
        if shape is not None and tuple(shape) == (d_hidden,):
            return name
    return None


def _block_of(model: nn.Module, site: MlpSite, mlp_weights: set[str]) -> str:
    """Return the transformer block of an MLP: the nearest element of a list of modules that also holds other matrices.

    If a block holds no others (a mixer's), it is the nearest element of a list.
    """
    parts, nearest = site.path.split("."), None
    for depth in range(len(parts), 0, -1):
        path = ".".join(parts[:depth])
        parent = model.get_submodule(".".join(parts[: depth - 1]))
        if not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        nearest = nearest or path
        module = model.get_submodule(path)
        if any(p.ndim > 1 and f"{path}.{name}" not in mlp_weights for name, p in module.named_parameters()):
            return path
    return nearest or site.path
