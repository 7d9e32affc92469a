"""One student for several widths: its units stand in pick order, so the first K of them are the student cut to K.

All widths share everything but their output projections: what the first K columns should put out is another thing when
the others are gone, so each width but the largest has output weights of its own (`elastic_fit.py`). A step runs the
student at one of its widths; no foreign `forward` is copied and no second model is trained. Cutting a width out of a
written output is done in `compression/slicing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, RecipeError
from vitrim.methods import SiteMethod
from vitrim.surgery import KeepUnits, submodule
from vitrim.types import MlpSite

# In the name of a parameter that belongs to one of several widths.
SUFFIX = "_of_width_"


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Widths that one student serves.

    Attributes:
        sites: the student's MLPs as they are, at the largest width.
        units: for each MLP ratio, the smallest first, the hidden units by site path.
    """

    sites: tuple[MlpSite, ...]
    units: Mapping[float, Mapping[str, int]]

    @classmethod
    def of(cls, recipe: Recipe, sites: Sequence[MlpSite]) -> Widths | None:
        """Return the widths that a recipe asks for; None where it asks for a single one.

        Args:
            recipe: with `recover.elastic`.
            sites: the MLPs, uncut.

        Raises:
            RecipeError: the method does not leave units in pick order, or other methods follow it.
            BudgetError: a width is outside what a site has, or two ratios come to the same widths.
        """
        ratios = None if recipe.recover is None else recipe.recover.elastic
        if ratios is None:
            return None
        step, *later = recipe.steps
        method = step.make_method()
        if later or not isinstance(method, SiteMethod) or method.cuts() != "mlp":
            raise RecipeError("recover.elastic: needs one method that picks each MLP's units in order, such as dgmr.")
        units = {}
        for ratio in ratios:
            width = replace(recipe.width(), kind="mlp_ratio", value=ratio)
            units[ratio] = {site.path: width.of(site) for site in sites}
        seen: dict[tuple[int, ...], float] = {}
        for ratio, widths in units.items():
            other = seen.setdefault(tuple(widths.values()), ratio)
            if other != ratio:
                raise BudgetError(
                    f"recover.elastic: {other:g} and {ratio:g} come to the same widths; drop one of them."
                )
        largest = units[ratios[-1]]
        return cls(sites=tuple(replace(site, d_hidden=largest[site.path]) for site in sites), units=units)

    @property
    def largest(self) -> float:
        """MLP ratio of the student itself."""
        return max(self.units)

    def at(self, step: int, seed: int) -> float:
        """Return the ratio that a step trains: each once in a round of steps, in an order drawn anew for each round."""
        turn, place = divmod(step, len(self.units))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
        return list(self.units)[int(torch.randperm(len(self.units), generator=generator)[place])]

    def edits(self, ratio: float) -> list[KeepUnits]:
        """Return the edits that cut the student to a ratio."""
        return [KeepUnits.first(site, self.units[ratio][site.path]) for site in self.sites]

    @contextmanager
    def held(self, model: nn.Module, ratio: float) -> Iterator[None]:
        """Run a live student at a ratio, forward and backward; its parameters stay as they are.

        A layer reads views of its parameters while it is called and has its own back afterwards. So whatever wraps the
        model (DDP, shards, a second forward in the backward pass) finds the parameters that it knows, and gradients
        reach them: zero for the units beyond the width. An output projection reads what `with_own_outputs` gave this
        ratio, where it did.
        """
        with ExitStack() as stack:
            for site in self.sites:
                for layer in _layers(model, site, self.units[ratio][site.path], suffix=self._suffix(ratio)):
                    stack.enter_context(layer.narrowed())
            yield

    @contextmanager
    def with_own_outputs(self, model: nn.Module, own: Mapping[float, Mapping[str, Tensor]]) -> Iterator[None]:
        """Add output weights for each width as parameters, which `held` reads at their ratio; removed at the end.

        Args:
            model: the student; afterwards it is as it was, and `own_outputs` has to be asked before.
            own: by ratio, output tensors by their full names.
        """
        outputs = {site.output: submodule(model, site.output) for site in self.sites}
        for ratio, tensors in own.items():
            for name, tensor in tensors.items():
                path, _, kind = name.rpartition(".")
                outputs[path].register_parameter(kind + self._suffix(ratio), nn.Parameter(tensor.clone()))
        try:
            yield
        finally:
            for module in outputs.values():
                for name in [name for name in module._parameters if SUFFIX in name]:
                    delattr(module, name)

    def own_outputs(self, model: nn.Module) -> dict[float, dict[str, Tensor]]:
        """Return copies of the output weights that belong to each ratio but the largest, by their full names."""
        state, found = model.state_dict(), {}
        for ratio in [ratio for ratio in self.units if ratio != self.largest]:
            ours = [name for name in state if name.endswith(self._suffix(ratio))]
            found[ratio] = {name.removesuffix(self._suffix(ratio)): state[name].clone() for name in ours}
        return found

    def _suffix(self, ratio: float) -> str:
        """Return what a ratio's own parameters have behind the name of the largest width's."""
        return f"{SUFFIX}{list(self.units).index(ratio)}"


def at_width(model: nn.Module, widths: Widths | None, ratio: float | None) -> AbstractContextManager[None]:
    """Run a live student at a ratio in this context; None for either leaves it as it is."""
    return nullcontext() if widths is None or ratio is None else widths.held(model, ratio)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One width of a student.

    Attributes:
        units: hidden units by site path.
        tensors: output tensors that belong to this width, by full name.
        errors: relative errors on held-out images: `sliced` of the student's first units and nothing else, `trained`
            with the output weights as they were trained, `repaired` with those that are kept.
    """

    units: Mapping[str, int]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def below(self, prefix: str) -> Slice:
        """Return the same slice as seen from a module that holds the student at `prefix`."""
        units, tensors = ({f"{prefix}.{k}".strip("."): v for k, v in d.items()} for d in (self.units, self.tensors))
        return replace(self, units=units, tensors=tensors)


@dataclass(kw_only=True)
class _Layer:
    """A layer with hidden units along one dimension of its parameters, which can run with the first of them alone.

    Attributes:
        module: the layer.
        dim: the dimension of its parameters that counts hidden units.
        width: how many units it runs with.
        attribute: the name under which the module keeps the number of units.
        num_groups: how many entries of `dim` belong to each unit, one group of units after the other.
        suffix: a parameter with this behind its name is read in place of the one without.
        own: the module's parameters while a call replaces them.
    """

    module: nn.Module
    dim: int
    width: int
    attribute: str
    num_groups: int = 1
    suffix: str = SUFFIX
    own: dict[str, nn.Parameter | None] = field(default_factory=dict)

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Let the layer run with its first units alone in this context."""
        size: Any = self.width * self.num_groups
        before = getattr(self.module, self.attribute, None)
        handles = [
            self.module.register_forward_pre_hook(self._narrow),
            self.module.register_forward_hook(self._restore, always_call=True),
        ]
        try:
            if before is not None:
                setattr(self.module, self.attribute, (size,) if isinstance(before, tuple) else size)
            yield
        finally:
            if before is not None:
                setattr(self.module, self.attribute, before)
            for handle in handles:
                handle.remove()

    def _narrow(self, module: nn.Module, args: Any) -> None:
        self.own = dict(module._parameters)  # FSDP2 puts others here each time, so they are looked up when it is called
        for name, tensor in self.own.items():
            other = self.own.get(name + self.suffix)
            if other is not None:
                module._parameters[name] = other
            elif tensor is not None and tensor.ndim > self.dim and SUFFIX not in name:
                grouped = tensor.unflatten(self.dim, (self.num_groups, -1))
                narrow = grouped.narrow(self.dim + 1, 0, self.width).flatten(self.dim, self.dim + 1)
                module._parameters[name] = narrow  # type: ignore[assignment]

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(self.own)


def _layers(model: nn.Module, site: MlpSite, width: int, *, suffix: str) -> Iterator[_Layer]:
    """Yield the layers of an MLP whose shapes depend on the number of hidden units."""
    rows = {"dim": 0, "width": width, "attribute": "out_features"}
    yield _Layer(module=submodule(model, site.value), num_groups=site.num_groups, **rows)
    if site.gate is not None:
        yield _Layer(module=submodule(model, site.gate), **rows)
    if site.norm is not None:
        yield _Layer(module=submodule(model, site.norm), dim=0, width=width, attribute="normalized_shape")
    yield _Layer(module=submodule(model, site.output), dim=1, width=width, attribute="in_features", suffix=suffix)
