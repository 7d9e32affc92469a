"""Cuts an output folder to a smaller width, without images: units are stored in pick order, so the first ones stay.

A width that the output was trained for (`recover.elastic`) gets the output weights that were saved for it. Nothing is
trained or measured here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from vitrim.config.widths import Width
from vitrim.cost.count import model_size
from vitrim.data.inputs import random_inputs
from vitrim.errors import BudgetError, CheckpointError
from vitrim.metrics.record import Metrics, ModelCost
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin, in_one_line
from vitrim.models.remote_code import has_remote_code
from vitrim.models.stock import loads_with, stock_origin, why_not_stock
from vitrim.output.card import write_card
from vitrim.output.load import load, local_folder, read_about
from vitrim.output.provenance import environment
from vitrim.output.result import Result
from vitrim.output.save import save_checked
from vitrim.output.stage import check_place, staged_output
from vitrim.recover.elastic import Slice
from vitrim.recover.elastic_files import read_widths
from vitrim.storage.documents import write_json
from vitrim.surgery import KeepUnits, Plan, apply_
from vitrim.torch_state import own_torch_state


@own_torch_state()
def slice_output(
    source: str | Path,
    out: str | Path,
    *,
    mlp_ratio: float,
    model: nn.Module | None = None,
    overwrite: bool = False,
) -> Result:
    """Cut an output of vitrim to a smaller width, without images.

    Args:
        source: a folder that vitrim wrote, ideally with `recover.elastic`, which trains it for several widths.
        out: folder to write; it must not exist, unless `overwrite`.
        mlp_ratio: hidden width as a multiple of the model width; at most that of the output.
        model: the uncut model, needed if no library can build it; it is reshaped in place.
        overwrite: replace an output of vitrim at `out`, at the end.

    Returns:
        The small model, the plan that turns the original into it, what was measured, and the folder.

    Raises:
        BudgetError: the ratio is above the output's own width, or not above 0.
        CheckpointError: vitrim did not write the source, it is damaged, or it holds more than cuts of hidden units.
        OutputError: `out` can't be written, or does not load back.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> wide = vitrim.compress(digits, method="magnitude", mlp_ratio=1, out=folder / "wide", quiet=True)
        >>> vitrim.slice(wide.out, folder / "narrow", mlp_ratio=0.5).metrics.after.parameters
        294154
    """
    started = time.monotonic()
    if not isinstance(mlp_ratio, int | float) or not 0 < mlp_ratio < math.inf:
        raise BudgetError(f"mlp_ratio is {mlp_ratio!r}; give a multiple of the model width above 0.")
    source, out = local_folder(source), Path(out)
    check_place(out, overwrite=overwrite)
    about = read_about(source)
    origin, plan = Origin.from_json(about["origin"]).placed_at(str(source)), Plan.from_json(about["plan"])
    cuts, found = _last_cuts(plan, source), read_widths(source).get(mlp_ratio)
    chosen = _prefix(cuts, mlp_ratio) if found is None else _checked(found, cuts, source)
    whole = load(source, model=model)
    before = _cost(whole)
    with in_one_line(str(source)):
        apply_(whole, [_second_cut(edit, chosen) for edit in cuts])
    narrowed = {id(edit): _narrowed(edit, chosen) for edit in cuts}
    plan = replace(plan, edits=tuple(narrowed.get(id(edit), edit) for edit in plan.edits))
    note = f"MLP ratio {mlp_ratio:g} was not trained or repaired for: these are the first units of {source}."
    metrics = Metrics(
        model=origin.name,
        method=plan.method,
        encoder=origin.encoder,
        before=before,
        after=_cost(whole),
        sliced_from=str(source),
        elastic={f"{mlp_ratio:g}": dict(chosen.errors)} if chosen.errors else None,
        notes=(note,) if found is None else (),
        environment=environment(),
        **plan.describe(),
    )
    with staged_output(out, overwrite=overwrite) as (folder, _):
        metrics = _write(folder, whole, origin, plan, metrics, out, started, has_remote_code(source))
    return Result(model=whole, plan=plan.without_tensors(), metrics=metrics, out=out)


def _cost(model: nn.Module) -> ModelCost:
    """Return the size of a model."""
    size = model_size(model)
    return ModelCost(parameters=size["num_parameters"], num_bytes=size["num_bytes"])


def _last_cuts(plan: Plan, source: Path) -> list[KeepUnits]:
    """Return the last cut of each MLP.

    Raises:
        CheckpointError: there is no such cut, or another edit changed the same tensors.
    """
    cuts = {edit.site.path: edit for edit in plan.edits if isinstance(edit, KeepUnits)}
    names = {name for edit in cuts.values() for name in edit.affected_tensors()}
    others = [edit for edit in plan.edits if not isinstance(edit, KeepUnits)]
    bad = next(
        (edit for edit in others if edit.ORDER > KeepUnits.ORDER or not names.isdisjoint(edit.affected_tensors())), None
    )
    if bad is not None or not cuts:
        what = "no cut of hidden units" if bad is None else f"{bad.describe()} at {bad.where}"
        raise CheckpointError(f"{source}: holds {what}, so its units can't be sliced; compress the original instead.")
    return list(cuts.values())


def _prefix(cuts: Sequence[KeepUnits], mlp_ratio: float) -> Slice:
    """Return the units of each MLP at a width that the output was not trained for."""
    width = Width(kind="mlp_ratio", value=mlp_ratio)
    sites = [replace(edit.site, d_hidden=edit.width) for edit in cuts]
    return Slice(units={site.path: width.of(site) for site in sites})


def _checked(found: Slice, cuts: Sequence[KeepUnits], source: Path) -> Slice:
    """Return the units and tensors of a trained width, after checking that they fit the model.

    Raises:
        CheckpointError: they do not fit this model.
    """
    widths = {edit.site.path: edit.width for edit in cuts}
    if found.units.keys() != widths.keys() or not all(
        isinstance(count, int) and 1 <= count <= widths[path] for path, count in found.units.items()
    ):
        raise CheckpointError(f"{source}: its widths are not those of its model; write the output again.")
    return found


def _second_cut(edit: KeepUnits, chosen: Slice) -> KeepUnits:
    """Return the edit that cuts the model in the folder."""
    site = replace(edit.site, d_hidden=edit.width)
    return replace(KeepUnits.first(site, chosen.units[site.path]), tensors=_own_tensors(edit, chosen))


def _narrowed(edit: KeepUnits, chosen: Slice) -> KeepUnits:
    """Return the edit for the plan: it keeps the first of the units that were kept before."""
    return replace(edit, keep=edit.keep[: chosen.units[edit.site.path]], tensors=_own_tensors(edit, chosen))


def _own_tensors(edit: KeepUnits, chosen: Slice) -> dict[str, Tensor]:
    """Return the tensors that a trained width has for one MLP."""
    return {name: tensor for name, tensor in chosen.tensors.items() if name.startswith(f"{edit.site.output}.")}


def _write(
    folder: Path,
    whole: nn.Module,
    origin: Origin,
    plan: Plan,
    metrics: Metrics,
    out: Path,
    started: float,
    remote_code: bool,
) -> Metrics:
    """Write a normal output folder, verify it in a fresh process, and return the finished metrics."""
    stock, backend = stock_origin(origin, plan.edits), backend_of(origin.library)
    notes = metrics.notes
    if stock is None:
        notes = (*notes, why_not_stock(origin, plan.edits))
    elif backend is not None:
        backend.describe_(whole, stock)
    form = {"inputs": random_inputs(origin, 4), "remote_code": remote_code}
    saved = save_checked(folder, whole, origin=origin, plan=plan, **form)
    metrics = replace(
        metrics,
        stock=saved.stock,
        remote_code=saved.remote_code,
        notes=(*notes, *saved.notes),
        loads_with=loads_with(saved.origin, out, stock=saved.stock, remote_code=saved.remote_code),
        reload_difference=saved.difference,
        seconds=round(time.monotonic() - started, 1),
    )
    write_json(folder / "metrics.json", metrics.to_json())
    write_card(folder, saved.origin, None, metrics)
    return metrics
