"""The command line: the same recipe as the Python API, tables for people, one JSON document with --json.

Wrong input ends in one line on standard error and exit code 2; a run stopped by Ctrl-C exits with 130.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table

from vitrim.errors import Interrupted, RecipeError, VitrimError

app = App(name="vitrim", help="Make pretrained Vision Transformers smaller and keep their features.")
console = Console()

SelectOn = Literal["weights", "activations", "outputs"]
Json = Annotated[bool, Parameter(name="--json", negative="", help="print one JSON document and nothing else")]


def main() -> None:
    """Entry point of the `vitrim` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; its exit code."""
    try:
        app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except Interrupted as error:
        return _fail(error, 130)
    except KeyboardInterrupt:
        return _fail("stopped; --resume goes on from the last state that was kept, if there is one", 130)
    except CycloptsError as error:
        return _fail(str(error).strip().split("\n")[0], 2)
    except VitrimError as error:
        return _fail(f"{type(error).__name__}: {error}", 2)
    return 0


@app.command
def inspect(model: str, *, scope: str | None = None, as_json: Json = False) -> None:
    """Show a model's MLPs, how small it would get, and what pruning its files would need.

    Example: vitrim inspect timm/vit_small_patch14_dinov2.lvd142m

    Args:
        model: timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME, timm/NAME@FILE, or a model folder.
        scope: dotted path of the subtree to look at.
    """
    from vitrim.inspection import inspect as look

    found = look(model, scope=scope)
    if as_json:
        return _print_json(found.to_json())
    total = found.parameters["total"]
    console.print(f"{found.model}: {total:,} parameters, {found.parameters['mlp'] / total:.0%} of them in MLPs")
    rows = _grouped([(site.label, site.d_model, site.d_hidden) for site in found.sites])
    _print_table(("MLPs", "kind", "model width", "hidden units"), [(count, *key) for key, count in rows.items()])
    predicted = [(f"{r:g}", f"{n:,}", f"{n / total - 1:+.1%}") for r, n in found.predicted.items()]
    _print_table(("width ratio", "parameters", "change"), predicted)
    if found.checkpoint is not None:
        _print_table(("prune-checkpoint at width ratio 1", ""), found.checkpoint.rows())
    for note in found.notes:
        console.print(f"note: {note}")


@app.command
def compress(
    model: str | None = None,
    *,
    out: Path,
    data: str | None = None,
    recipe: Path | None = None,
    method: str | None = None,
    width_ratio: float | None = None,
    keep_ratio: float | None = None,
    width: int | None = None,
    select_on: SelectOn | None = None,
    repair: bool | None = None,
    refit: bool | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    scope: str | None = None,
    stock: bool | None = None,
    resume: bool = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller and write it to a folder.

    Example: vitrim compress timm/vit_base_patch14_dinov2.lvd142m --data photos/ --out small --epochs 2

    Args:
        model: timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME, or a model folder; may stand in the recipe.
        out: folder to write; it must not exist.
        data: folder of images, parquet, saved dataset, or "digits", without labels; for a text encoder a text file.
        recipe: YAML file; options given here win over it.
        method: one of `vitrim methods` (default dgmr).
        width_ratio: hidden width as a multiple of the model width (default 1).
        keep_ratio: share of each MLP's units to keep.
        width: units to keep in each MLP.
        select_on: what dgmr tells units apart by; outputs where there are images, else weights.
        repair: closed-form repair after the cut.
        refit: the local refit that follows the repair.
        steps: distillation steps; none without steps or epochs.
        epochs: distillation epochs.
        lr: distillation rate; found by a range test if not given.
        batch_size: images a distillation step.
        seed: makes two runs equal.
        device: auto, cpu, cuda, mps.
        scope: dotted path of the subtree to cut.
        stock: take the nearest width that the model's own library can load.
        resume: go on with a run into this folder that was stopped.
        quiet: no progress.
    """
    from vitrim.pipeline import compress as cut
    from vitrim.recipe import Recipe
    from vitrim.report.collect import summarise

    given = {
        "model": model,
        "data": data,
        "method": method,
        "width_ratio": width_ratio,
        "keep_ratio": keep_ratio,
        "width": width,
        "options": None if select_on is None else {"select_on": select_on},
        "repair": _repair(repair, refit),
        "recover": _recover(steps=steps, epochs=epochs, lr=lr, batch_size=batch_size),
        "seed": seed,
        "device": device,
        "scope": scope,
        "stock": stock,
    }
    asked = (Recipe() if recipe is None else Recipe.load(recipe)).updated(given)
    if asked.model is None:
        raise RecipeError("model: none given; name one on the command line or in the recipe.")
    result = cut(asked.model, recipe=asked, out=out, resume=resume, quiet=quiet or as_json)
    if as_json:
        return _print_json({"out": str(out), **result.metrics})
    _print_summary(summarise(result.metrics))
    for note in result.metrics["notes"]:
        console.print(f"note: {note}")
    how = result.metrics["loads_with"]
    console.print(f"Written and verified by loading it in a fresh process: {how}\nReport: {out / 'report.html'}")


@app.command
def prune_checkpoint(
    source: str,
    out: Path,
    *,
    data: str | None = None,
    recipe: Path | None = None,
    method: str | None = None,
    width_ratio: float | None = None,
    keep_ratio: float | None = None,
    width: int | None = None,
    select_on: SelectOn | None = None,
    repair: bool | None = None,
    refit: bool | None = None,
    memory_budget: str | None = None,
    shard_size: str = "2GB",
    seed: int | None = None,
    device: str | None = None,
    scope: str | None = None,
    stock: bool | None = None,
    resume: bool = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint file to file, one layer in memory at a time.

    Example: vitrim prune-checkpoint EVA-CLIP-E/ EVA-CLIP-E-small/ --width-ratio 1

    Args:
        source: a model folder, timm/NAME@FILE, or hf/ORG/NAME.
        out: folder to write; it must not exist.
        data: images for selection and repair; without, units are picked on weights alone.
        recipe: YAML file; options given here win over it.
        method: one of `vitrim methods` (default dgmr).
        width_ratio: hidden width as a multiple of the model width (default 1).
        keep_ratio: share of each MLP's units to keep.
        width: units to keep in each MLP.
        select_on: what dgmr tells units apart by; outputs where there are images, else weights.
        repair: closed-form repair after the cut.
        refit: the local refit that follows the repair.
        memory_budget: such as 4GB; what calibration needs above it goes to disk.
        shard_size: largest size of a file, for libraries that read shards.
        seed: makes two runs equal.
        device: auto, cpu, cuda, mps.
        scope: dotted path of the subtree to cut.
        stock: take the nearest width that the model's own library can load.
        resume: go on with a run into this folder that was killed.
        quiet: no progress.
    """
    from vitrim.recipe import Recipe
    from vitrim.streaming import prune_checkpoint as prune

    given = {
        "model": source,
        "data": data,
        "method": method,
        "width_ratio": width_ratio,
        "keep_ratio": keep_ratio,
        "width": width,
        "options": None if select_on is None else {"select_on": select_on},
        "repair": _repair(repair, refit),
        "seed": seed,
        "device": device,
        "scope": scope,
        "stock": stock,
    }
    asked = (Recipe() if recipe is None else Recipe.load(recipe)).updated(given)
    found = prune(
        source,
        out,
        recipe=asked,
        memory_budget=memory_budget,
        shard_size=shard_size,
        resume=resume,
        quiet=quiet or as_json,
    )
    if as_json:
        return _print_json({"out": str(out), **found.metrics})
    rows = [(name, *map(_number, found.metrics[name])) for name in ("parameters", "bytes")]
    _print_table(("", "before", "after"), rows)
    for note in found.metrics["notes"]:
        console.print(f"note: {note}")
    console.print(f"Written and read back: {found.metrics['loads_with']}")


@app.command
def evaluate(
    student: str,
    *,
    against: str,
    data: str,
    index: str | None = None,
    limit: int | None = None,
    split: str = "test",
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model beside the one it was made from.

    Example: vitrim evaluate small --against timm/vit_base_patch14_dinov2.lvd142m --data photos/

    Args:
        student: the small model.
        against: the model to compare with.
        data: images to judge on; with labels, kNN, linear probe and top-1 are measured, too.
        index: labelled images for kNN and the probe to learn from; without, 80% of data.
        limit: at most this many images.
        split: which part of a data source that has parts.
        device: auto, cpu, cuda, mps.
    """
    from vitrim.evaluation import evaluate as measure

    found = measure(student, against, data, index=index, limit=limit, split=split, device=device)
    if as_json:
        return _print_json(found)
    rows = [(name, f"{value:.4g}") for name, value in found["fidelity"].items()]
    _print_table(("features against the original", "value"), rows)
    names = [name for name in found["teacher"] if name != "latency"]
    rows = [(n, _number(found["teacher"][n]), _number(found["student"][n])) for n in names]
    for size in found["teacher"].get("latency", {}):
        times = [found[who]["latency"][size] for who in ("teacher", "student")]
        shown = [f"{t['median_ms']:.2f} ({t['iqr_ms']:.2f})" for t in times]
        rows.append((f"latency batch {size} (ms, IQR)", shown[0], shown[1]))
    _print_table(("measure", "original", "small"), rows)


@app.command
def methods(*, as_json: Json = False) -> None:
    """List the methods: paper, what each needs, what it does."""
    from vitrim.methods import METHODS

    fields = ("name", "arxiv", "needs", "edit", "summary", "paper")
    rows = [tuple(str(getattr(method, field)) for field in fields) for method in METHODS.values()]
    if as_json:
        return _print_json([dict(zip(fields, row, strict=True)) for row in rows])
    _print_table(fields[:-1], [row[:-1] for row in rows])


@app.command
def demo(*, out: Path = Path("vitrim-demo"), steps: int = 200) -> None:
    """Cut a small ViT that comes with vitrim to half its size, on scikit-learn's digits: no network, a few minutes.

    Args:
        out: folder to write; it must not exist.
        steps: distillation steps.
    """
    from vitrim.demo import run_demo

    run_demo(out, steps=steps, console=console)


def _repair(repair: bool | None, refit: bool | None) -> Any:
    """The recipe's repair from two switches; `{}` stands for its defaults."""
    if repair is False:
        return False
    return {"refit": refit} if refit is not None else ({} if repair else None)


def _recover(**values: Any) -> dict[str, Any] | None:
    """The recipe's recovery from what was given of it."""
    return {key: value for key, value in values.items() if value is not None} or None


def _grouped(keys: Sequence[tuple]) -> dict[tuple, int]:
    """How often each key occurs, in order of first sight."""
    return {key: list(keys).count(key) for key in dict.fromkeys(keys)}


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _print_summary(rows: Mapping[str, Mapping[str, float | None]]) -> None:
    """The closing table."""
    from vitrim.report.figures import format_number

    cells = [
        (
            name,
            *(
                "-" if row[when] is None else format_number(row[when], name=name)
                for when in ("before", "after_cut", "after")
            ),
        )
        for name, row in rows.items()
    ]
    _print_table(("", "original", "after the cut", "after recovery"), cells)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(*header)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _fail(message: Any, code: int) -> int:
    """One line on standard error."""
    print(f"vitrim: {' '.join(str(message).split())}", file=sys.stderr)
    return code
