"""One student for several widths: its units stand in pick order, so the first K of them are the student cut to K.

While it trains, each step runs it at one of its widths; at the end each width but the largest gets output weights of
its own, by least squares. No foreign `forward` is copied and no second model is trained. Cutting a width out of what
was written is `slicing.py`'s.

Shapes: D model width, K units of a width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vitrim.calibrate import SiteVisit, walk
from vitrim.checkpoint import write_json
from vitrim.errors import BudgetError, CheckpointError
from vitrim.models.taps import FeaturesAt
from vitrim.ops.least_squares import fit_output
from vitrim.recipe import Recipe, RepairOptions
from vitrim.recover.losses import Judged, relative_error
from vitrim.surgery import KeepUnits, apply_, read_weights, submodule
from vitrim.types import MlpSite

WIDTHS, WIDTH_TENSORS, FORMAT = "elastic.json", "elastic.safetensors", "vitrim-elastic/1"


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
            BudgetError: a width is outside what a site has, or two ratios come to the same widths.
        """
        ratios = None if recipe.recover is None else recipe.recover.elastic
        if ratios is None:
            return None
        units = {ratio: {site.path: recipe.width_of(site, width_ratio=ratio) for site in sites} for ratio in ratios}
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
        reach them: zero for the units beyond the width.
        """
        with ExitStack() as stack:
            for site in self.sites:
                for layer in _layers(model, site, self.units[ratio][site.path]):
                    stack.enter_context(layer.narrowed())
            yield


def first_units(site: MlpSite, width: int) -> KeepUnits:
    """The edit that leaves an MLP its first units."""
    return KeepUnits(site=site, keep=tuple(range(width)))


@dataclass(kw_only=True)
class _Layer:
    """A layer whose parameters have hidden units along `dim`, in `num_groups` groups; `attribute` says how many."""

    module: nn.Module
    dim: int
    width: int
    attribute: str
    num_groups: int = 1
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
            if tensor is not None and tensor.ndim > self.dim:
                grouped = tensor.unflatten(self.dim, (self.num_groups, -1))
                module._parameters[name] = grouped.narrow(self.dim + 1, 0, self.width).flatten(self.dim, self.dim + 1)  # type: ignore[assignment]

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(self.own)


def _layers(model: nn.Module, site: MlpSite, width: int) -> Iterator[_Layer]:
    """The layers of an MLP that know how many hidden units it has."""
    rows = {"dim": 0, "width": width, "attribute": "out_features"}
    yield _Layer(module=submodule(model, site.value), num_groups=site.num_groups, **rows)
    if site.gate is not None:
        yield _Layer(module=submodule(model, site.gate), **rows)
    if site.norm is not None:
        yield _Layer(module=submodule(model, site.norm), dim=0, width=width, attribute="normalized_shape")
    yield _Layer(module=submodule(model, site.output), dim=1, width=width, attribute="in_features")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One width of a student: units by site path, the output tensors that are its own, and its error with and without.

    `tensors` are those of the sites that least squares made better. Errors are relative, on held-out images.
    """

    units: Mapping[str, int]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def below(self, prefix: str) -> Slice:
        """The same as seen from a module that holds the student at `prefix`."""
        units, tensors = ({f"{prefix}.{k}".strip("."): v for k, v in d.items()} for d in (self.units, self.tensors))
        return replace(self, units=units, tensors=tensors)


def repair_widths(
    student: nn.Module,
    teacher: nn.Module,
    widths: Widths,
    batches: Sequence[Tensor],
    *,
    judged: Judged,
    options: RepairOptions | None,
    at: FeaturesAt = "final",
) -> dict[float, Slice]:
    """Fit output weights of its own for each width but the largest, site after site as the cut does.

    Args:
        student: the trained student at its largest width; it is not changed.
        teacher: the original.
        widths: what the student serves.
        batches: calibration images (B, C, H, W); all of them enter the sums.
        judged: held-out images with the teacher's features: a site's fit is taken only where it lowers their error, so
            no width ends worse than its plain prefix.
        options: ridge and feedback; None repairs nothing.
        at: where the features are read.

    Returns:
        By ratio, the smallest first. The largest has no tensors: the student itself is that width.
    """
    found: dict[float, Slice] = {}
    for ratio, units in widths.units.items():
        sliced = copy.deepcopy(student)
        apply_(sliced, widths.edits(ratio))
        error = start = relative_error(sliced, judged, at)
        tensors: dict[str, Tensor] = {}
        if options is not None and ratio != widths.largest:
            sites = [replace(site, d_hidden=units[site.path]) for site in widths.sites]
            for visit in walk(teacher, sliced, sites, batches, feedback=options.feedback, num_held_out=0, max_tokens=0):
                before, fitted = _output_tensors(sliced, visit.site), _fitted(sliced, visit, options.ridge)
                _put_(sliced, visit.site, fitted)
                now = relative_error(sliced, judged, at)
                if now < error:
                    error, tensors = now, {**tensors, **fitted}
                else:
                    _put_(sliced, visit.site, before)
        found[ratio] = Slice(units=units, tensors=tensors, errors={"sliced": start, "repaired": error})
    return found


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
        {"width_ratio": ratio, "units": dict(found.units), "errors": dict(found.errors)}
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
            ratio = float(entry["width_ratio"])
            own = {name.removeprefix(f"{ratio}/"): t for name, t in tensors.items() if name.startswith(f"{ratio}/")}
            found[ratio] = Slice(units=dict(entry["units"]), tensors=own, errors=dict(entry["errors"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its widths are damaged ({error!r:.160}); write the output again.") from None
    return found
