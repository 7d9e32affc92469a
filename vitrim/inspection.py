"""Looks at a model before anything is cut: its MLPs, where its parameters are, and how small it would get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vitrim.checkpoint import is_output, open_model
from vitrim.cost import num_parameters
from vitrim.models.load import load_model, origin_of
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.recipe import Recipe
from vitrim.types import MlpSite

WIDTH_RATIOS = (2.0, 1.0, 0.5, 0.25)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found; `parameters` by part of the model, `predicted` by width ratio."""

    model: str
    sites: tuple[MlpSite, ...]
    parameters: dict[str, int]
    predicted: dict[float, int]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready description."""
        predicted = [{"width_ratio": ratio, "parameters": count} for ratio, count in self.predicted.items()]
        sites = [{**asdict(site), "parameters": site_parameters(site, site.d_hidden)} for site in self.sites]
        return {"model": self.model, "parameters": self.parameters, "predicted": predicted, "sites": sites}


def inspect(model: nn.Module | str, *, scope: str | None = None) -> Inspection:
    """Find a model's MLPs and say how small it would get, without running it.

    Args:
        model: a module, or a name or folder as for `compress`; of a name only the architecture is built, no weights.
        scope: dotted path of the subtree to look at.

    Returns:
        Sites, widths, parameters by part, and the parameters left at several width ratios.

    Raises:
        ModelError: no such model.
        SiteNotFoundError: it has no MLP that vitrim knows.
    """
    if isinstance(model, str):
        name = model
        model, origin = open_model(model) if is_output(model) else load_model(model, weights=False)
    else:
        origin = origin_of(model)
        name = origin.name
    _, part = resolve_scope(model, scope, origin.encoder)
    sites = find_mlps(model, scope=part)
    total, mlp = num_parameters(model), sum(site_parameters(site, site.d_hidden) for site in sites)
    predicted = {
        ratio: predict_parameters(total, sites, Recipe(model=name, width_ratio=ratio))
        for ratio in WIDTH_RATIOS
        if all(ratio * site.d_model <= site.d_hidden for site in sites)
    }
    return Inspection(
        model=name,
        sites=sites,
        parameters={"total": total, "mlp": mlp, "other": total - mlp},
        predicted=predicted,
    )


def predict_parameters(total: int, sites: Sequence[MlpSite], recipe: Recipe) -> int:
    """Parameters left after a recipe's cut."""
    cut = (site_parameters(site, site.d_hidden) - site_parameters(site, recipe.width_of(site)) for site in sites)
    return total - sum(cut)


def site_parameters(site: MlpSite, width: int) -> int:
    """Parameters of a site's hidden units at a width: input rows with their biases, output columns, inner norm."""
    num_inputs = 1 if site.kind == "plain" else 2
    per_unit = num_inputs * (site.d_model + int(site.has_bias)) + site.d_model + (2 if site.norm else 0)
    return per_unit * width
