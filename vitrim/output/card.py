"""The model card in every output: what was cut, how, with which data, how close the result is, and its licence.

It states only what was measured; the original's limits are left to the original's card. The licence is copied from the
original and never guessed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from vitrim.config.recipe import Recipe
from vitrim.methods import find_method
from vitrim.metrics.record import Metrics
from vitrim.models.origin import Origin
from vitrim.models.stock import loads_with
from vitrim.output.result import table_rows

CARD = "README.md"
HUB_NAME = re.compile(r"^(?:timm|hf)/(.+)$")


def write_card(folder: Path, origin: Origin, recipe: Recipe, metrics: Metrics, *, licence: str | None) -> None:
    """Write the card of a run into its output folder.

    Args:
        folder: the output folder.
        origin: how the original was built.
        recipe: the user's recipe.
        metrics: what was measured, as in metrics.json.
        licence: the original's, as found by `licence_of`.
    """
    about: dict[str, Any] = {
        "license": licence or "other",
        "library_name": origin.library if metrics.stock else "vitrim",
        "tags": ["vitrim", "pruning", "vision-transformer", *(step.method for step in recipe.steps)],
    }
    named = HUB_NAME.match(origin.name)
    if named and "/" in named.group(1):
        about["base_model"] = named.group(1)
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {origin.name}, made smaller with vitrim",
        _what(recipe, metrics),
        f"## Loading\n\n```python\n{_loading(metrics.stock, origin)}\n```",
        f"## Measured\n\n{_table(metrics)}\n\n{_measured_on(metrics)}",
        f"## Made with\n\n```\n{metrics.environment['command']}\n```\n\nThe whole recipe is `recipe.yaml`.",
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(recipe, metrics, licence)),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n")


def licence_of(whole: nn.Module, origin: Origin) -> str | None:
    """Return the licence named in timm's config or at the top of the card in the original's folder, or None."""
    for part in (whole, getattr(whole, "visual", None), getattr(getattr(whole, "visual", None), "trunk", None)):
        named = (getattr(part, "pretrained_cfg", None) or {}).get("license")
        if named:
            return str(named)
    card = Path(origin.folder or "") / CARD
    if origin.folder is None or not card.is_file():
        return None
    head = re.match(r"^---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(head.group(1)) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    found = said.get("license") if isinstance(said, dict) else None
    return str(found) if found and found != "other" else None


def _what(recipe: Recipe, metrics: Metrics) -> str:
    """Describe what was done to the original, in a few sentences."""
    before, after = metrics.before.parameters, metrics.after.parameters
    methods = [find_method(step.method) for step in recipe.steps]
    papers = " and ".join(f"`{m.name}` ([{m.paper}](https://arxiv.org/abs/{m.arxiv}))" for m in methods)
    said = f"{before:,} parameters became {after:,} ({after / before - 1:+.0%}) by {papers}."
    pairs = sorted({tuple(pair) for pair in metrics.widths.values()})
    if pairs:
        old, new = (sorted({pair[place] for pair in pairs}) for place in (0, 1))
        said += f" Hidden units of the {len(metrics.widths)} MLPs: {_span(old)} became {_span(new)}."
    steps = (metrics.recovery or {}).get("num_steps")
    if steps:
        said += f" Then {steps} steps of label-free distillation from the original."
    return said + (f" Only the part `{metrics.encoder}` was touched." if metrics.encoder else "")


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _loading(stock: bool, origin: Origin) -> str:
    """Return code that loads this folder from any place."""
    line = loads_with(origin, "FOLDER", stock=stock)
    found = "model, _, transform" if "transforms" in line else "model"
    return f"import {line.partition('.')[0]}\n\n{found} = {line}"


def _table(metrics: Metrics) -> str:
    """Return the before/after table in Markdown."""
    header, rows = table_rows(metrics)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _measured_on(metrics: Metrics) -> str:
    images, machine = metrics.images, metrics.environment
    where = f"Latency on {machine['machine']}, {machine['device']}, torch {machine['torch']}."
    if not images:
        return f"No images were given, so how close the features are was not measured. {where}"
    counts = ", ".join(f"{name} {count:,}" for name, count in images.items() if isinstance(count, int))
    return f"Fidelity is that of features on held-out images against the original. Images: {counts}. {where}"


def _limits(recipe: Recipe, metrics: Metrics, licence: str | None) -> list[str]:
    """Return what a user of this model should know, one sentence per line."""
    data = recipe.data or "no images"
    lines = [
        f"The cut was fitted to, and judged on, `{data}`. On other images it may be further from the original.",
        "What the original is not good at or not meant for, this is not either; its own card says so.",
        f"Licence: `{licence}`, carried over from the original."
        if licence
        else "The licence of the original was not found beside its weights. It holds for this model, too: look it up.",
    ]
    return lines + [str(note) for note in metrics.notes]
