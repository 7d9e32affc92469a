"""Find the MLPs of a model by naming or by structure, and verify each by a dead-unit test.

Foreign classes are never named: an MLP is a pair (or triple) of linear layers whose shapes fit. Known names are the
quick way; layers of other names are found by what feeds what. Whether they behave like an MLP is checked by running it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from vitrim.errors import ModelError, SiteNotFoundError, reason_of
from vitrim.layers.moefication import ExpertMlp
from vitrim.models.structure import Found, containers, is_computed, is_norm_over, linear_at, traced
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
# Names of what stands behind an encoder: its MLPs are left alone, unless there are no others or the scope is in there.
OUTSIDE = re.compile(
    r"(\w+_)?(decoder|predictor|merger|projector|classifier)s?|merger_list|\w+_(merger_list|head|heads|embed)"
)
log = logging.getLogger("vitrim")
NORM_NAMES = ("norm", "ffn_ln", "sub_ln", "ln", "grn")


def find_mlps(model: nn.Module, *, scope: str | None = None) -> tuple[MlpSite, ...]:
    """Find every MLP of a model, in the order of its modules.

    Args:
        model: any module; MLPs on the meta device are found but not verified by running.
        scope: dotted path of the subtree to search, such as the vision tower of a VLM.

    Returns:
        One site per MLP, each verified by a dead-unit test (once for each distinct kind of container and shape). Those
        behind the encoder (`OUTSIDE`) are only there if the scope is in such a part, or if there are no others.

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
    search = _Search(model, root, prefix)
    search.by_name_()
    search.by_structure_()
    found, failed = search.in_order(), list(search.failed.values())
    if failed and not found:
        raise SiteNotFoundError(f"no MLP confirmed in {type(model).__name__}, {len(failed)} left open: {failed[0]}")
    for said in dict.fromkeys(failed):
        log.warning("%s It is left as it is.", said)
    if not found:
        raise SiteNotFoundError(f"no MLP found in {type(model).__name__} {_why_none(root, search.not_run)}")
    mlp_weights = {f"{name}.weight" for site in found for name in (site.value, site.gate, site.output) if name}
    return tuple(replace(site, block=_block_of(model, site, mlp_weights)) for site in found)


class _Search:
    """What is found below a module of a model: sites by path, and why MLPs were left open, by their last layer."""

    def __init__(self, model: nn.Module, root: nn.Module, prefix: str) -> None:
        self.model, self.root, self.prefix = model, root, prefix
        self.found: dict[str, MlpSite] = {}
        self.failed: dict[str, str] = {}
        self.not_run: dict[str, str] = {}
        self._verdicts: dict[tuple, bool | str] = {}
        self._split = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ExpertMlp))

    def in_order(self) -> list[MlpSite]:
        """Return the sites in the order of the model's modules, without those behind the encoder."""
        found = [self.found[name] for name, _ in self.root.named_modules(prefix=self.prefix) if name in self.found]
        inside = [site for site in found if not any(map(OUTSIDE.fullmatch, self._local(site.path).split(".")))]
        return inside or found

    def by_name_(self) -> None:
        """Find linear layers of known names."""
        for path, container in self.root.named_modules(prefix=self.prefix):
            claimed = {site.output for site in self.found.values()}
            for site in [] if path.startswith(self._split) else _matches(container, path):
                if site.output not in claimed and self._confirmed_(container, site):
                    break

    def by_structure_(self) -> None:
        """Find linear layers that feed each other, among those that no site has yet."""
        claimed = [path for site in self.found.values() for path in (site.value, site.gate, site.output) if path]
        results: dict[tuple, list[Found] | str] = {}
        for local, layers, outputs in containers(self.root, [self._local(path) for path in claimed]):
            container, path = self.root.get_submodule(local), f"{self.prefix}.{local}".strip(".")
            if f"{path}.".startswith(self._split):  # the units of experts can't be cut without their router
                continue
            shapes = tuple((name, tuple(weight_of(container, name).shape)) for name in layers)
            signature = (tuple(type(part) for part in container.modules()), shapes, tuple(outputs))
            if signature not in results:
                try:
                    results[signature] = traced(container, layers, outputs)
                except Exception as error:  # foreign code that wants more than tokens may raise anything
                    results[signature] = f"{type(error).__name__}: {reason_of(error)}"
            result = results[signature]
            if isinstance(result, str):
                self.not_run[path] = result
                continue
            for found in result:
                self._take_(container, path, found)

    def _take_(self, container: nn.Module, path: str, found: Found) -> None:
        """Confirm what was traced in a container; of several MLPs in one, only the first can be told by its path."""
        gate, value, output, norm = found
        site = _site(container, path, (gate, value, output), norm)
        if path in self.found:
            self.failed[site.output] = f"{site.output}: is the end of one more MLP in {path or 'the model'}."
        elif self._confirmed_(container, site):
            self.failed.pop(site.output, None)

    def _local(self, path: str) -> str:
        return path if not self.prefix else path.removeprefix(f"{self.prefix}.")

    def _confirmed_(self, container: nn.Module, site: MlpSite) -> bool:
        """Keep a site if it passes the dead-unit test; note why if that could not be made."""
        types = tuple(type(part) for part in container.modules())
        names = (self._within(site, site.output), self._within(site, site.norm), site.kind)
        signature = (types, *names, site.d_model, site.d_hidden)
        if signature not in self._verdicts:
            try:
                self._verdicts[signature] = verify_site(self.model, site)
            except ModelError as error:
                self._verdicts[signature] = str(error)
        verdict = self._verdicts[signature]
        if verdict is True:
            self.found[site.path] = site
        elif isinstance(verdict, str):
            self.failed.setdefault(site.output, verdict)
        return verdict is True

    def _within(self, site: MlpSite, path: str | None) -> str:
        return (path or "").removeprefix(site.path)


def _why_none(root: nn.Module, not_run: Mapping[str, str]) -> str:
    """Return in words why a module holds no MLP: it is convolutional, or no linear layers form one."""
    kernels = sum(p.numel() for p in root.parameters() if p.ndim > 3)
    matrices = sum(p.numel() for p in root.parameters() if p.ndim == 2)
    said = f"({sum(1 for _ in root.modules())} modules seen)"
    if kernels > matrices:
        share = kernels / (kernels + matrices)
        said += (
            f": it is convolutional ({share:.0%} of its weights), and MLPs are cut in linear layers and 1 x 1 "
            "convolutions alone, where one feeds another through a function of single units. The method lortsar makes "
            "convolutions smaller, too (--method lortsar)."
        )
    elif ours := sorted({type(module).__name__ for module in root.modules() if _of_vitrim(module)}):
        said += (
            f": an earlier cut has replaced its linear layers ({', '.join(ours)}). Cut widths and tokens before it, "
            "with both as steps of one recipe."
        )
    else:
        said += ": no linear layer feeds another, of fitting shape, through a function of single units."
    if not_run:
        path, reason = next(iter(not_run.items()))
        parts = f"{len(not_run)} of its parts with linear layers"
        said += f" {parts} can't be run on noise alone, such as {path} ({reason:.150})."
    return said


def _of_vitrim(module: nn.Module) -> bool:
    """Return whether a module is one that edits of vitrim put in the place of a linear layer."""
    return type(module).__module__.startswith("vitrim.layers.") and hasattr(module, "in_features")


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
        layers = [linear_at(container, name) for name in names]
        if any(layer is None or isinstance(layer, nn.Conv2d) for layer in layers):
            continue  # convolutions are told by what they do alone: squeeze-and-excitation has the names of an MLP
        *firsts, output = [weight_of(container, name).shape for name in names]
        d_out, d_hidden = output
        if any(width != d_out for _, width in firsts) or d_hidden < 2:
            continue
        kind = _kind([height for height, _ in firsts], d_hidden)
        if kind is None or (value_name == "0" and not _is_sequential_mlp(container, output_name)):
            continue
        yield _site(container, path, (gate_name, value_name, output_name), _inner_norm(container, d_hidden))


def _site(container: nn.Module, path: str, names: tuple[str | None, str, str], norm: str | None) -> MlpSite:
    """Return the site of linear layers whose shapes fit, by their names (gate, value, output) within a container."""
    gate, value, output = names
    for name in [name for name in names if name]:
        _refuse_computed(linear_at(container, name), f"{path}.{name}".strip("."))
    heights = [weight_of(container, name).shape[0] for name in names[:2] if name]
    d_model, d_hidden = weight_of(container, output).shape
    kind = _kind(heights, d_hidden)
    assert kind is not None
    return MlpSite(
        path="",
        kind=kind,
        d_model=d_model,
        d_hidden=d_hidden,
        gate=gate,
        value=value,
        output=output,
        has_bias=getattr(linear_at(container, value), "bias", None) is not None,
        norm=norm,
    ).below(path)


def _kind(heights: list[int], d_hidden: int) -> MlpKind | None:
    """Return the kind of an MLP from the heights of its input projections, or None."""
    if heights == [d_hidden, d_hidden]:
        return "split_gated"
    if heights == [d_hidden]:
        return "plain"
    return "packed_gated" if heights == [2 * d_hidden] else None


def _refuse_computed(layer: nn.Module | None, path: str) -> None:
    """Refuse a layer of an MLP whose weight can't be cut.

    Raises:
        ModelError: a parametrization computes its weight.
    """
    if layer is not None and is_computed(layer):
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
        if is_norm_over(getattr(container, name, None), d_hidden):
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
        module = model.get_submodule(path)
        if not isinstance(parent, nn.ModuleList | nn.Sequential) or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue  # a list in a list is not run
        nearest = nearest or path
        if any(p.ndim > 1 and f"{path}.{name}" not in mlp_weights for name, p in module.named_parameters()):
            return path
    return nearest or site.path
