"""One student for several widths: its units stand in pick order, so the first K of them are the student cut to K.

All widths share everything but their output projections: what the first K columns should put out is another thing when
the others are gone. So each width but the largest gets output weights of its own, by least squares, before and after
training; in between they train with the rest, each step running the student at one of its widths. No foreign `forward`
is copied and no second model is trained. Cutting a width out of what was written is `slicing.py`'s.

Shapes: D model width, K units of a width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, walk
from vitrim.config.options import RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.errors import DAMAGED, BudgetError, CheckpointError, RecipeError
from vitrim.methods import SiteMethod, find_method
from vitrim.metrics.judging import Judged, features_on_cpu, relative_error
from vitrim.ops.least_squares import fit_output
from vitrim.storage.documents import write_json
from vitrim.surgery import KeepUnits, apply_, read_weights, submodule
from vitrim.types import FeaturesAt, MlpSite

WIDTHS, WIDTH_TENSORS, FORMAT = "elastic.json", "elastic.safetensors", "vitrim-elastic/1"
SUFFIX = "_of_width_"


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The widths of one student: its MLPs as they are, and for each ratio, the smallest first, units by site path."""

    sites: tuple[MlpSite, ...]
    units: Mapping[float, Mapping[str, int]]

    @classmethod
    def of(cls, recipe: Recipe, sites: Sequence[MlpSite]) -> Widths | None:
        """The widths that a recipe asks for, None where it asks for one alone.

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
        if len(recipe.steps) > 1 or not issubclass(find_method(recipe.steps[0].method), SiteMethod):
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
        """The ratio of the student itself."""
        return max(self.units)

    def at(self, step: int, seed: int) -> float:
        """The ratio that a step trains: each once in as many steps as there are, in an order drawn anew each time."""
        turn, place = divmod(step, len(self.units))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
        return list(self.units)[int(torch.randperm(len(self.units), generator=generator)[place])]

    def edits(self, ratio: float) -> list[KeepUnits]:
        """The cut of the student to a ratio."""
        return [first_units(site, self.units[ratio][site.path]) for site in self.sites]

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
        """Let output projections hold further parameters, which `held` reads at their ratio.

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
        """What the output projections hold for each ratio but the largest."""
        state, found = model.state_dict(), {}
        for ratio in [ratio for ratio in self.units if ratio != self.largest]:
            ours = [name for name in state if name.endswith(self._suffix(ratio))]
            found[ratio] = {name.removesuffix(self._suffix(ratio)): state[name].clone() for name in ours}
        return found

    def _suffix(self, ratio: float) -> str:
        """What tells the parameters of a ratio apart from those of the largest."""
        return f"{SUFFIX}{list(self.units).index(ratio)}"


def first_units(site: MlpSite, width: int) -> KeepUnits:
    """The edit that leaves an MLP its first units."""
    return KeepUnits(site=site, keep=tuple(range(width)))


@dataclass(kw_only=True)
class _Layer:
    """A layer whose parameters have hidden units along `dim`, in `num_groups` groups; `attribute` says how many.

    Where it holds a parameter of the same name and this suffix, that one is read instead.
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
        """Let the layer see its first units alone whenever it is called."""
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
    """The layers of an MLP that know how many hidden units it has."""
    rows = {"dim": 0, "width": width, "attribute": "out_features"}
    yield _Layer(module=submodule(model, site.value), num_groups=site.num_groups, **rows)
    if site.gate is not None:
        yield _Layer(module=submodule(model, site.gate), **rows)
    if site.norm is not None:
        yield _Layer(module=submodule(model, site.norm), dim=0, width=width, attribute="normalized_shape")
    yield _Layer(module=submodule(model, site.output), dim=1, width=width, attribute="in_features", suffix=suffix)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One width of a student: units by site path, the output tensors that are its own, and what they are worth.

    Errors are relative, on held-out images: `sliced` of the student's first units and nothing else, `trained` with the
    output weights as they were trained, `repaired` with those that are kept.
    """

    units: Mapping[str, int]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def below(self, prefix: str) -> Slice:
        """The same as seen from a module that holds the student at `prefix`."""
        units, tensors = ({f"{prefix}.{k}".strip("."): v for k, v in d.items()} for d in (self.units, self.tensors))
        return replace(self, units=units, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What output weights are fitted and judged with.

    `batches` are calibration images, all of which enter the sums; `held_out` images judge, by features read at `at`.
    `options` None fits nothing.
    """

    teacher: nn.Module
    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    options: RepairOptions | None
    at: FeaturesAt = "final"

    @cached_property
    def judged(self) -> Judged:
        """The held-out images with the teacher's features."""
        return [(batch, features_on_cpu(self.teacher, batch, self.at)) for batch in self.held_out]


@contextmanager
def serving(student: nn.Module, widths: Widths | None, fitting: Fitting) -> Iterator[dict[float, Slice]]:
    """Have a student serve its widths while it is trained in this context.

    Args:
        student: at its largest width; it ends with its own parameters alone.
        widths: what it serves; None leaves it as it is.
        fitting: how output weights are fitted.

    Yields:
        What each width has for itself, by ratio; filled when training has ended.
    """
    found: dict[float, Slice] = {}
    if widths is None:
        yield found
        return
    start = {ratio: each.tensors for ratio, each in fit_widths(student, widths, fitting).items()}
    with widths.with_own_outputs(student, start):
        yield found
        trained = widths.own_outputs(student)
    found.update(fit_widths(student, widths, fitting, start=trained))


def fit_widths(
    student: nn.Module,
    widths: Widths,
    fitting: Fitting,
    *,
    start: Mapping[float, Mapping[str, Tensor]] | None = None,
) -> dict[float, Slice]:
    """Fit output weights for each width but the largest, site after site as the cut does.

    A site's fit is taken only where it lowers the error on held-out images. So no width ends worse than the student's
    first units alone, or than it starts.

    Args:
        student: at its largest width; it is not changed.
        widths: what it serves.
        fitting: the teacher, the images and the options.
        start: by ratio, output tensors to start from where they are better than the student's own columns.

    Returns:
        By ratio, the smallest first. The largest has no tensors: the student itself is that width.
    """
    found: dict[float, Slice] = {}
    for ratio, units in widths.units.items():
        sliced = copy.deepcopy(student)
        apply_(sliced, widths.edits(ratio))
        errors = {"sliced": relative_error(sliced, fitting.judged, fitting.at)}
        if ratio != widths.largest:
            sites = [replace(site, d_hidden=units[site.path]) for site in widths.sites]
            best = _trained_(sliced, sites, (start or {}).get(ratio, {}), fitting, errors)
            errors["repaired"] = _fit_(sliced, sites, fitting, best)
            tensors = {name: t for site in sites for name, t in _output_tensors(sliced, site).items()}
            found[ratio] = Slice(units=units, tensors=tensors, errors=errors)
        else:
            found[ratio] = Slice(units=units, errors={**errors, "repaired": errors["sliced"]})
    return found


def _trained_(
    sliced: nn.Module, sites: Sequence[MlpSite], own: Mapping[str, Tensor], fitting: Fitting, errors: dict[str, float]
) -> float:
    """Give a slice output weights that were trained for it, unless it is better without; its error."""
    if not own:
        return errors["sliced"]
    before = {site.path: _output_tensors(sliced, site) for site in sites}
    for site in sites:
        _put_(sliced, site, {name: own[name] for name in before[site.path]})
    errors["trained"] = relative_error(sliced, fitting.judged, fitting.at)
    if errors["trained"] > errors["sliced"]:
        for site in sites:
            _put_(sliced, site, before[site.path])
    return min(errors["trained"], errors["sliced"])


def _fit_(sliced: nn.Module, sites: Sequence[MlpSite], fitting: Fitting, best: float) -> float:
    """Fit the output weights of one MLP after the other by least squares; the error that is left."""
    if fitting.options is None:
        return best
    feedback, ridge = fitting.options.feedback, fitting.options.ridge
    for visit in walk(fitting.teacher, sliced, sites, fitting.batches, feedback=feedback, num_held_out=0, max_tokens=0):
        before = _output_tensors(sliced, visit.site)
        _put_(sliced, visit.site, _fitted(sliced, visit, ridge))
        error = relative_error(sliced, fitting.judged, fitting.at)
        if error < best:
            best = error
        else:
            _put_(sliced, visit.site, before)
    return best


def _output_tensors(model: nn.Module, site: MlpSite) -> dict[str, Tensor]:
    """Copies of the output projection's tensors, by full name."""
    layer = submodule(model, site.output)
    return {f"{site.output}.{name}": p.detach().clone() for name, p in layer.named_parameters(recurse=False)}


def _fitted(model: nn.Module, visit: SiteVisit, ridge: float) -> dict[str, Tensor]:
    """The same by least squares on what calibration saw."""
    weights, site = read_weights(model, visit.site), visit.site
    all_units = torch.arange(site.d_hidden)
    weight_DK, bias_D = fit_output(visit.stats, all_units, weights.output_DH, weights.output_bias_D, ridge=ridge)
    fitted = {f"{site.output}.weight": weight_DK, f"{site.output}.bias": bias_D}
    return {name: tensor.to(weights.output_DH) for name, tensor in fitted.items() if tensor is not None}


def _put_(model: nn.Module, site: MlpSite, tensors: Mapping[str, Tensor]) -> None:
    """Give a site other tensors."""
    apply_(model, [replace(first_units(site, site.d_hidden), tensors=tensors)])


def save_widths(folder: Path, model: nn.Module, slices: Mapping[float, Slice]) -> None:
    """Write the widths beside a model's weights.

    Args:
        folder: the output folder.
        model: what stands in it, whole; tensors are stored in its types.
        slices: by ratio, with paths from the root of the whole model.
    """
    own = model.state_dict()
    tensors = {
        f"{ratio}/{name}": tensor.to("cpu", own[name].dtype).contiguous()
        for ratio, found in slices.items()
        for name, tensor in found.tensors.items()
    }
    (folder / WIDTH_TENSORS).write_bytes(save(tensors))
    widths = [
        {"mlp_ratio": ratio, "units": dict(found.units), "errors": dict(found.errors)}
        for ratio, found in slices.items()
    ]
    write_json(folder / WIDTHS, {"format": FORMAT, "widths": widths})


def read_widths(folder: Path) -> dict[float, Slice]:
    """What `save_widths` wrote, the smallest first; empty where a folder holds one width alone.

    Raises:
        CheckpointError: it is damaged or of another version.
    """
    if not (folder / WIDTHS).exists():
        return {}
    try:
        about = json.loads((folder / WIDTHS).read_text())
        if about["format"] != FORMAT:
            raise CheckpointError(f"{folder / WIDTHS}: format is {about['format']!r}; this version reads {FORMAT!r}.")
        tensors = load_file(folder / WIDTH_TENSORS)
        found = {}
        for entry in about["widths"]:
            ratio = float(entry["mlp_ratio"])
            own = {name.removeprefix(f"{ratio}/"): t for name, t in tensors.items() if name.startswith(f"{ratio}/")}
            found[ratio] = Slice(units=dict(entry["units"]), tensors=own, errors=dict(entry["errors"]))
    except (*DAMAGED, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its widths are damaged ({error!r:.160}); write the output again.") from None
    return found
