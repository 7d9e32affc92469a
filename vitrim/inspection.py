"""Looks at a model before anything is cut: its MLPs, where its parameters are, and how small it would get.

For a checkpoint that is on this machine it also says what pruning it file to file will need. No weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vitrim.calibrate.activity import Activity, measure_activity
from vitrim.compression.estimate import RunEstimate, estimate_run
from vitrim.compression.source import check_tensors, has_files, open_job
from vitrim.config.recipe import Recipe
from vitrim.cost.count import num_parameters, site_parameters
from vitrim.data import first_images
from vitrim.data.inputs import check_inputs, open_set
from vitrim.errors import BudgetError, CheckpointError
from vitrim.models.load import load_model, origin_of
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.output.load import is_output, open_model
from vitrim.types import MlpSite

MLP_RATIOS = (2.0, 1.0, 0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found; `parameters` by part of the model, `predicted` by MLP ratio.

    `checkpoint` is what `prune_checkpoint` will need at MLP ratio 1, None where the weights are not on this machine;
    `notes` say why it can't be run on those that are. `activity` is one row an MLP, where images were given.
    """

    model: str
    sites: tuple[MlpSite, ...]
    parameters: dict[str, int]
    predicted: dict[float, int]
    checkpoint: RunEstimate | None = None
    notes: tuple[str, ...] = ()
    activity: tuple[Activity, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description."""
        predicted = [{"mlp_ratio": ratio, "parameters": count} for ratio, count in self.predicted.items()]
        sites = [{**asdict(site), "parameters": site_parameters(site, site.d_hidden)} for site in self.sites]
        return {
            "model": self.model,
            "parameters": self.parameters,
            "predicted": predicted,
            "checkpoint": None if self.checkpoint is None else self.checkpoint.to_json(),
            "notes": list(self.notes),
            "activity": [asdict(row) for row in self.activity],
            "sites": sites,
        }


def inspect(model: nn.Module | str, *, scope: str | None = None, activity: Any = None, limit: int = 256) -> Inspection:
    """Find a model's MLPs and say how small it would get, without running it unless activity is asked for.

    Args:
        model: a module, or a name or folder as for `compress`; of a name only the architecture is built, no weights.
        scope: dotted path of the subtree to look at.
        activity: images, as for `compress`, on which to count active hidden units; this loads the weights.
        limit: at most this many of them.

    Returns:
        Sites, widths, parameters by part, the parameters left at several MLP ratios, and for a checkpoint on this
        machine the memory, disk and time that pruning it will need.

    Raises:
        ModelError: no such model.
        SiteNotFoundError: it has no MLP that vitrim knows.
    """
    checkpoint, notes = None, ()
    if isinstance(model, str):
        checkpoint, notes = _checkpoint(model, scope)
        name = model
        whole = activity is not None or is_output(model)
        model, origin = open_model(model) if whole else load_model(model, weights=False)
    else:
        origin = origin_of(model)
        name = origin.name
    _, part = resolve_scope(model, scope, origin.encoder)
    sites = find_mlps(model, scope=part)
    total, mlp = num_parameters(model), sum(site_parameters(site, site.d_hidden) for site in sites)
    predicted = {
        ratio: predict_parameters(total, sites, Recipe(model=name, mlp_ratio=ratio))
        for ratio in MLP_RATIOS
        if all(ratio * site.d_model <= site.d_hidden for site in sites)
    }
    return Inspection(
        model=name,
        sites=sites,
        parameters={"total": total, "mlp": mlp, "other": total - mlp},
        predicted=predicted,
        checkpoint=checkpoint,
        notes=notes,
        activity=() if activity is None else _activity(model, sites, origin, activity, limit),
    )


def _activity(
    model: nn.Module, sites: Sequence[MlpSite], origin: Origin, data: Any, limit: int
) -> tuple[Activity, ...]:
    """Count active units of a model's encoder."""
    encoder = model.get_submodule(origin.encoder).float()
    images = open_set(data, origin, split="train", limit=limit)
    batches, _ = first_images(images, limit, seed=0)
    check_inputs(encoder, origin, batches)
    own = [site.within(origin.encoder) if origin.encoder else site for site in sites]
    return tuple(measure_activity(encoder, own, batches))


def _checkpoint(source: str, scope: str | None) -> tuple[RunEstimate | None, tuple[str, ...]]:
    """What pruning the files of a source will need, or why they can't be pruned file to file."""
    if is_output(source.removeprefix("local-dir:")) or not has_files(source):
        return None, ()
    recipe = Recipe(model=source, scope=scope, mlp_ratio=1.0)
    try:
        job = open_job(source, recipe)
        check_tensors(job)
        return estimate_run(job, recipe), ()
    except (BudgetError, CheckpointError) as error:
        return None, (f"prune-checkpoint: {error}",)


def predict_parameters(total: int, sites: Sequence[MlpSite], recipe: Recipe) -> int:
    """Parameters left after a recipe's cut."""
    cut = (site_parameters(site, site.d_hidden) - site_parameters(site, recipe.width_of(site)) for site in sites)
    return total - sum(cut)
