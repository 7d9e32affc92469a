"""The model card in every output: what was cut, how, with which data, how close the result is, and its licence.

It states only what was measured; the original's limits are left to the original's card. The licence is copied from the
original and never guessed. What comes from outside (names, notes, the command) is text here: it can't add a heading, a
link, HTML or a key of the front matter.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrim.config.recipe import Recipe
from vitrim.config.yaml_files import MAX_BYTES, read_yaml, write_yaml
from vitrim.errors import RecipeError
from vitrim.methods import METHODS
from vitrim.metrics.record import Metrics
from vitrim.models.origin import Origin
from vitrim.models.remote_code import FILE
from vitrim.models.stock import loads_with
from vitrim.output.result import table_rows
from vitrim.recover.result import Recovery

CARD = "README.md"
HUB_NAME = re.compile(r"^(?:timm|hf)/([\w.-]+/[\w.-]+)$")
MARKUP = re.compile(r"([\\`*_\[\]<>&|~#$!])")
MAX_LICENCE = 80
FOREIGN_CODE = f"""This line runs code of this repository, since no config of transformers can say these widths: with
`trust_remote_code=True`, `{FILE}` may do on your machine whatever you may. It is short: read it first. From the hub,
pin what you have read with `revision=COMMIT`; else the file may be another one tomorrow. `vitrim.load("FOLDER")` loads
the same model without running it."""
log = logging.getLogger("vitrim")


def write_card(folder: Path, origin: Origin, recipe: Recipe | None, metrics: Metrics) -> None:
    """Write the card of a run into its output folder.

    Args:
        folder: the output folder.
        origin: how the original was built.
        recipe: the user's recipe; None for what has none (a slice, a tuned text tower).
        metrics: what was measured, as in metrics.json.
    """
    licence, methods = licence_of(origin), [name for name in metrics.method.split("+") if name in METHODS]
    about: dict[str, Any] = {
        "license": licence or "other",
        "library_name": "transformers" if metrics.remote_code else origin.library if metrics.stock else "vitrim",
        "tags": ["vitrim", *(["pruning"] if methods else []), "vision-transformer", *methods],
    }
    named = HUB_NAME.match(origin.name)
    if named:
        about["base_model"] = named.group(1)
    parts = [
        f"---\n{write_yaml(about)}---",
        f"# {plain(origin.name)}, {'made smaller' if methods else 'tuned'} with vitrim",
        _what(methods, metrics),
        f"## Loading\n\n{block(_loading(metrics, origin), 'python')}",
        *([FOREIGN_CODE] if metrics.remote_code else []),
        f"## Measured\n\n{_table(metrics)}\n\n{_measured_on(metrics)}",
        f"## Made with\n\n{block(metrics.environment['command'])}",
        *([] if recipe is None else ["The whole recipe is `recipe.yaml`."]),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(recipe, metrics, licence)),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def licence_of(origin: Origin) -> str | None:
    """Return the licence named in timm's config or at the top of the card in the original's folder, or None."""
    named = origin.config.get("pretrained_cfg", {}).get("license")
    if named:
        return _one_line(named)[:MAX_LICENCE]
    card = Path(origin.folder or "") / CARD
    if origin.folder is None or not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        head = re.match(r"^---\n(.*?)\n---", file.read(MAX_BYTES), re.DOTALL)
    try:
        said = read_yaml(head.group(1), where=str(card)) if head else None
    except RecipeError as error:
        log.warning("%s The licence in it is not carried over.", error)
        return None
    found = said.get("license") if isinstance(said, dict) else None
    return _one_line(found)[:MAX_LICENCE] if isinstance(found, str) and found != "other" else None


def _one_line(text: Any) -> str:
    """Return text without line breaks and control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def plain(text: Any) -> str:
    """Return text for a sentence or a heading, in which nothing is markup."""
    return MARKUP.sub(r"\\\1", _one_line(text))


def code(text: Any) -> str:
    """Return text as code within a sentence, between more backticks than it holds."""
    line = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line or ' '}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """Return text as a block of code, between more backticks than it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _what(methods: Sequence[str], metrics: Metrics) -> str:
    """Describe what was done to the original, in a few sentences."""
    before, after = metrics.before.parameters, metrics.after.parameters
    found = [METHODS[name] for name in methods]
    papers = " and ".join(f"`{m.name}` ([{m.paper}](https://arxiv.org/abs/{m.arxiv}))" for m in found)
    if metrics.text_tuning is None:
        said = f"{before:,} parameters became {after:,} ({after / before - 1:+.0%}) by {papers}."
    else:
        start, best = metrics.text_tuning["curve"][0]["held_out_loss"], metrics.text_tuning["best_loss"]
        said = (
            f"The text tower was tuned to the image tower. Loss on held-out pairs was {start:.4g}, and is {best:.4g}."
        )
        said += f" The pair had been cut by {papers}." if papers else ""
    if metrics.sliced_from is not None:
        said += f" This is a slice of {code(metrics.sliced_from)}, which has the {before:,}."
    pairs = sorted({tuple(pair) for pair in metrics.widths.values()})
    if pairs:
        old, new = (sorted({pair[place] for pair in pairs}) for place in (0, 1))
        said += f" Hidden units of the {len(metrics.widths)} MLPs: {_span(old)} became {_span(new)}."
    if metrics.recovery is not None:
        recovery = Recovery(**metrics.recovery)
        said += f" Then label-free distillation from the original ({recovery.cost()})"
        said += "." if recovery.improved else ", which did not improve on the cut: this is the model before it."
    only_cut = metrics.encoder and metrics.text_tuning is None
    return said + (f" Only the part {code(metrics.encoder)} was touched." if only_cut else "")


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _loading(metrics: Metrics, origin: Origin) -> str:
    """Return code that loads this folder from any place."""
    line = loads_with(origin, "FOLDER", stock=metrics.stock, remote_code=metrics.remote_code)
    found = "model, _, transform" if "transforms" in line else "model"
    return f"import {line.partition('.')[0]}\n\n{found} = {line}"


def _table(metrics: Metrics) -> str:
    """Return the before/after table in Markdown."""
    header, rows = table_rows(metrics)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _measured_on(metrics: Metrics) -> str:
    images, machine = metrics.images, metrics.environment
    what = "Latency" if metrics.after.latency else "The run was"
    where = f"{what} on {plain(machine['machine'])}, {plain(machine['device'])}, torch {machine['torch']}."
    if not images:
        return f"{metrics.judged_on} {where}"
    counts = ", ".join(f"{name} {count:,}" for name, count in images.items() if isinstance(count, int))
    against = " It is that of the features against the original's." if metrics.closeness is not None else ""
    return f"{metrics.judged_on}{against} Images: {counts}. {where}"


def _fitted(recipe: Recipe | None, metrics: Metrics) -> str:
    """Return what the model was fitted to, and judged on."""
    if metrics.sliced_from is not None:
        return "Nothing was fitted or judged when this was sliced; how the wider output was, its own card says."
    if metrics.text_tuning is not None:
        return "The text tower was tuned to, and judged on, captions of the kind that it was given."
    data = None if recipe is None else recipe.data
    given = code(data) if data else "the images that were given" if metrics.images else None
    if given is None:
        return "The cut was made on weights alone."
    judged = ", and judged on," if metrics.closeness is not None else ""
    return f"The cut was fitted to{judged} {given}. On other images it may be further from the original."


def _limits(recipe: Recipe | None, metrics: Metrics, licence: str | None) -> list[str]:
    """Return what a user of this model should know, one sentence per line."""
    lines = [
        _fitted(recipe, metrics),
        "What the original is not good at or not meant for, this is not either; its own card says so.",
        f"Licence: {code(licence)}, carried over from the original."
        if licence
        else "The licence of the original was not found beside its weights. It holds for this model, too: look it up.",
    ]
    return lines + [plain(note) for note in metrics.notes]
