"""Looks at a model before anything is cut: its MLPs, where its parameters are, and how small it would get.

For a checkpoint on this machine it also estimates what pruning it file to file will need. No weights are read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vitrim.calibrate.activity import Activity, measure_activity
from vitrim.compression.budget import near_stock, solve_widths
from vitrim.compression.estimate import RunEstimate, estimate_run
from vitrim.compression.file_to_file import checkpoint_widths
from vitrim.compression.source import check_tensors, has_files, open_checkpoint
from vitrim.config.recipe import Recipe
from vitrim.config.widths import BudgetKind
from vitrim.cost.count import num_parameters, site_parameters
from vitrim.data import first_images
from vitrim.data.inputs import check_inputs, open_set, random_inputs
from vitrim.errors import BudgetError, CheckpointError, reason_of
from vitrim.models.features import device_of, evaluating, features, inputs_for
from vitrim.models.given import check_weights, unwrapped, with_values
from vitrim.models.load import load_model, origin_of
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.output.load import is_output, open_model
from vitrim.output.result import aligned, html_table
from vitrim.storage.training_files import Which
from vitrim.torch_state import own_torch_state
from vitrim.types import MlpSite

# Budgets to predict for if none is given.
USUAL: tuple[tuple[BudgetKind, float], ...] = (
    ("params_ratio", 0.75),
    ("params_ratio", 0.5),
    ("params_ratio", 0.25),
    ("mlp_ratio", 2.0),
    ("mlp_ratio", 1.0),
    ("mlp_ratio", 0.5),
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of a budget: hidden units of each MLP by path, and parameters of the whole model."""

    budget: str
    value: float
    hidden_dims: Mapping[str, int]
    parameters: int

    @property
    def widths(self) -> str:
        """Hidden units as text: one number if all MLPs have the same, else the range."""
        units = sorted(set(self.hidden_dims.values()))
        return str(units[0]) if len(units) == 1 else f"{units[0]} to {units[-1]}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection:
    """The result of `inspect`.

    Attributes:
        model: name of the model.
        sites: its MLPs.
        parameters: counts: `total`, those in MLPs (`mlp`), and all `other`.
        predicted: how small the model would get, one row per budget.
        checkpoint: what `prune_checkpoint` will need at the requested budget; None if no weights are on this machine.
        notes: notes for the user, such as why the files can't be pruned.
        activity: one row per MLP, if images were given.
        features: where in the model the pooled vector and the patch tokens are read, in words.
    """

    model: str
    sites: tuple[MlpSite, ...]
    parameters: dict[str, int]
    predicted: tuple[Prediction, ...]
    checkpoint: RunEstimate | None = None
    notes: tuple[str, ...] = ()
    activity: tuple[Activity, ...] = ()
    features: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        sites = [{**asdict(site), "parameters": site_parameters(site, site.d_hidden)} for site in self.sites]
        return {
            "model": self.model,
            "parameters": self.parameters,
            "features": self.features,
            "predicted": [
                {row.budget: row.value, "parameters": row.parameters, "hidden_dims": dict(row.hidden_dims)}
                for row in self.predicted
            ],
            "checkpoint": None if self.checkpoint is None else self.checkpoint.to_json(),
            "notes": list(self.notes),
            "activity": [asdict(row) for row in self.activity],
            "sites": sites,
        }

    @property
    def headline(self) -> str:
        """One sentence: the number of parameters, and the share of them in MLPs."""
        total = self.parameters["total"]
        return f"{self.model}: {total:,} parameters, {self.parameters['mlp'] / total:.0%} of them in MLPs"

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return budget, hidden units, parameters and change as text, one row per prediction."""
        total = self.parameters["total"]
        return [
            (f"{row.budget} {row.value:g}", row.widths, f"{row.parameters:,}", f"{row.parameters / total - 1:+.1%}")
            for row in self.predicted
        ]

    def summary(self) -> str:
        """Return the headline and the table as text."""
        return f"{self.headline}\n{self.features}\n{aligned(HEADER, self.rows())}"

    def __repr__(self) -> str:
        return f"Inspection({self.headline}, {len(self.sites)} MLPs)"

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return html_table(HEADER, self.rows())


HEADER = ("budget", "hidden units", "parameters", "change")


@own_torch_state()
def inspect(
    model: nn.Module | str,
    *,
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    mlp_ratio: float | None = None,
    keep_ratio: float | None = None,
    hidden_dim: int | None = None,
    round_to: int = 16,
    exact: bool = False,
    scope: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: Which = "auto",
    activity: Any = None,
    limit: int = 256,
) -> Inspection:
    """Find a model's MLPs and predict how small it would get; it is run once on noise, without weights where it can be.

    Args:
        model: a module, or a name or folder as for `compress`; a name loads only the architecture, no weights.
        params_ratio: predict for this share of the encoder's parameters; without any budget, several are predicted.
        macs_ratio: predict for this share of the encoder's multiply-accumulates.
        mlp_ratio: predict for this hidden width, as a multiple of the model width.
        keep_ratio: predict for this share of each MLP's hidden units.
        hidden_dim: predict for this many hidden units in each MLP.
        round_to: round widths to multiples of this.
        exact: predict for widths exactly as asked, even if the model's own library can't load them.
        scope: dotted path of the part to look at.
        model_args: arguments of the architecture of `timm/NAME@FILE`, as for `compress`.
        weights: which weights of a training checkpoint, as for `compress`.
        activity: images, as for `compress`, on which to count active hidden units; this loads the weights.
        limit: use at most this many images.

    Returns:
        MLPs, parameters by part, the parameters left for each budget, and for a checkpoint on this machine the memory,
        disk and time that pruning it will need.

    Raises:
        ModelError: there is no such model.
        SiteNotFoundError: the model has no MLP that vitrim knows.
        BudgetError: the MLPs can't meet the budget.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> found = vitrim.inspect(digits, mlp_ratio=1)
        >>> found.predicted[0].widths, found.predicted[0].parameters
        ('96', 349738)
    """
    given = {
        "params_ratio": params_ratio,
        "macs_ratio": macs_ratio,
        "mlp_ratio": mlp_ratio,
        "keep_ratio": keep_ratio,
        "hidden_dim": hidden_dim,
    }
    budget = {name: value for name, value in given.items() if value is not None}
    rest = {"round_to": round_to, "exact": exact, "scope": scope, "model_args": model_args or {}, "weights": weights}
    asked = Recipe.parse({**budget, **rest})
    checkpoint, notes, reading = None, (), asked.reading()
    if not isinstance(model, nn.Module):
        model = str(model)  # `out` of a result is a Path
        checkpoint, notes = _checkpoint(model, asked)
        name, whole = model, activity is not None or is_output(model)
        model, origin = open_model(model, reading) if whole else load_model(model, weights=False, reading=reading)
    else:
        reading.refuse_model_args(type(model).__name__)
        model = unwrapped(model) if activity is None else with_values(unwrapped(model))
        origin = origin_of(model)
        check_weights(model, origin.name)
        name = origin.name
    _, part = resolve_scope(model, scope, origin.encoder)
    sites = find_mlps(model, scope=part)
    total, mlp = num_parameters(model), sum(site_parameters(site, site.d_hidden) for site in sites)
    return Inspection(
        model=name,
        sites=sites,
        parameters={"total": total, "mlp": mlp, "other": total - mlp},
        predicted=(_predict(model, origin, sites, asked),) if budget else _usual(model, origin, sites, asked),
        checkpoint=checkpoint,
        notes=(*origin.notes, *notes),
        activity=() if activity is None else _activity(model, sites, origin, activity, limit),
        features=_read_at(model.get_submodule(origin.encoder), origin),
    )


def _read_at(encoder: nn.Module, origin: Origin) -> str:
    """Return in words where a model's features are read, by reading them once on noise."""
    noise = random_inputs(origin, 1)
    if noise is None:
        return "features: the size of the model's inputs is not known"
    if any(tensor.is_meta for tensor in encoder.parameters()):
        encoder = copy.deepcopy(encoder).to("meta")
    try:
        with evaluating(encoder):
            return f"features: {features(encoder, inputs_for(encoder, noise)).taken}"
    except Exception as error:  # foreign code says in its own ways what it does not take
        return f"features: can't be read on noise ({reason_of(error)})"


def _usual(model: nn.Module, origin: Origin, sites: Sequence[MlpSite], asked: Recipe) -> tuple[Prediction, ...]:
    """Predict for the usual budgets, except those that the MLPs can't meet."""
    found = []
    for kind, value in USUAL:
        try:
            found.append(_predict(model, origin, sites, asked.updated({kind: value, "exact": asked.steps[0].exact})))
        except BudgetError:
            continue
    return tuple(found)


def _predict(model: nn.Module, origin: Origin, sites: Sequence[MlpSite], recipe: Recipe) -> Prediction:
    """Return the result of a recipe's budget, as `compress` would cut."""
    step, encoder = recipe.steps[0], model.get_submodule(origin.encoder)
    own = [site.within(origin.encoder) for site in sites]
    inputs = random_inputs(origin, 1)
    inputs = None if inputs is None else inputs.to(device_of(encoder))
    units: Mapping[str, int] = solve_widths(recipe.width(), own, encoder, inputs)
    if not step.exact:
        units, _ = near_stock(recipe.width(), units, origin, own)
    widths = {site.path: units[inner.path] for site, inner in zip(sites, own, strict=True)}
    cut = sum(site_parameters(site, site.d_hidden) - site_parameters(site, widths[site.path]) for site in sites)
    kind = recipe.width().kind
    return Prediction(
        budget=kind, value=recipe.width().value, hidden_dims=widths, parameters=num_parameters(model) - cut
    )


def _activity(
    model: nn.Module, sites: Sequence[MlpSite], origin: Origin, data: Any, limit: int
) -> tuple[Activity, ...]:
    """Count the active hidden units of a model's encoder on images."""
    encoder = model.get_submodule(origin.encoder).float()
    images = open_set(data, origin, limit=limit)
    batches, _ = first_images(images, limit, seed=0)
    images.tell()
    check_inputs(encoder, origin, batches)
    own = [site.within(origin.encoder) if origin.encoder else site for site in sites]
    return tuple(measure_activity(encoder, own, batches))


def _checkpoint(source: str, recipe: Recipe) -> tuple[RunEstimate | None, tuple[str, ...]]:
    """Return what pruning a source's files will need, or a note on why they can't be pruned file to file."""
    if is_output(source.removeprefix("local-dir:")) or not has_files(source):
        return None, ()
    try:
        job = open_checkpoint(source, recipe.updated({"model": source}))
        check_tensors(job)
        widths, notes = checkpoint_widths(job, recipe)
        return estimate_run(job, recipe, widths), notes
    except (BudgetError, CheckpointError) as error:
        return None, (f"prune-checkpoint: {error}",)
