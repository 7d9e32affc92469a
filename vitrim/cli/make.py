"""Commands that write a model: compress, prune-checkpoint, slice, tune-text, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from vitrim.cli.app import Json, app, hush
from vitrim.cli.console import number, print_json, print_notes, print_table, say
from vitrim.cli.options import RECIPE, BudgetOptions, CutOptions, SourceOptions, TrainOptions
from vitrim.errors import RecipeError

if TYPE_CHECKING:
    from vitrim.config.recipe import Recipe
    from vitrim.output.result import Result

Overwrite = Annotated[
    bool,
    Parameter(negative="", help="replace an output of vitrim; without --resume, also delete a stopped run's state."),
]
RemoteCode = Annotated[bool | None, Parameter(negative="", help=RECIPE["remote_code"])]
NO_BUDGET, NO_CUT, NO_TRAINING, AS_NAMED = BudgetOptions(), CutOptions(), TrainOptions(), SourceOptions()


@app.command
def compress(
    model: str | None = None,
    *,
    out: Path,
    data: str | None = None,
    budget: BudgetOptions = NO_BUDGET,
    cut: CutOptions = NO_CUT,
    reading: SourceOptions = AS_NAMED,
    train: TrainOptions = NO_TRAINING,
    remote_code: RemoteCode = None,
    resume: bool = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller and write it to a folder.

    Example: vitrim compress timm/vit_base_patch14_dinov2.lvd142m --data photos/ --out small --recover-epochs 2

    Args:
        model: timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME, vitrim/NAME, or a model folder; or named in
            the recipe.
        out: folder to write; it must not exist, unless with --overwrite.
        data: folder of images, parquet, saved dataset, tar shards ("pipe:COMMAND" and "hf-stream:NAME" too) or
            "digits", all without labels; texts for a text encoder, and recordings for a model of skeletons.
        resume: continue a stopped run that was writing this folder.
        quiet: show no progress.
    """
    from vitrim.compression.pipeline import compress as run
    from vitrim.distributed.processes import is_main

    asked = recipe_of(
        cut,
        {"model": model, "data": data, "remote_code": remote_code}
        | {**reading.given(), **budget.given(), **cut.given(), **train.given()},
    )
    if asked.model is None:
        raise RecipeError("model: none given; name one on the command line or in the recipe.")
    result = run(asked.model, recipe=asked, out=out, resume=resume, overwrite=overwrite, quiet=hush(quiet or as_json))
    if not is_main():
        return
    if not _said_as_json(result, as_json):
        _say_written(result, "Written and verified by loading it in a fresh process")
        say(f"Report: {out / 'report.html'}")


@app.command
def prune_checkpoint(
    source: str,
    out: Path,
    *,
    data: str | None = None,
    budget: BudgetOptions = NO_BUDGET,
    cut: CutOptions = NO_CUT,
    reading: SourceOptions = AS_NAMED,
    memory_budget: str | None = None,
    shard_size: str = "2GB",
    resume: bool = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint file to file, one layer in memory at a time.

    Example: vitrim prune-checkpoint EVA-CLIP-E/ EVA-CLIP-E-small/ --mlp-ratio 1

    Args:
        source: a model folder, timm/NAME@FILE, or hf/ORG/NAME.
        out: folder to write; it must not exist, unless with --overwrite.
        data: images for selection and repair; by default units are picked from weights alone.
        memory_budget: memory that calibration may use, such as 4GB; the rest goes to disk.
        shard_size: largest size of a file, for libraries that read shards.
        resume: continue a killed run that was writing this folder.
        quiet: show no progress.
    """
    from vitrim.compression.file_to_file import prune_checkpoint as prune

    result = prune(
        source,
        out,
        recipe=recipe_of(cut, {"model": source, "data": data, **reading.given(), **budget.given(), **cut.given()}),
        memory_budget=memory_budget,
        shard_size=shard_size,
        resume=resume,
        overwrite=overwrite,
        quiet=hush(quiet or as_json),
    )
    if _said_as_json(result, as_json):
        return
    before, after = result.metrics.before, result.metrics.after
    rows = [
        ("parameters", number(before.parameters), number(after.parameters)),
        ("bytes", number(before.num_bytes), number(after.num_bytes)),
    ]
    print_table(("", "before", "after"), rows)
    say(result.metrics.judged_on)
    print_notes(result.metrics.notes)
    say(f"Written and read back: {result.metrics.loads_with}")


@app.command(name="slice")
def slice_(source: Path, *, mlp_ratio: float, out: Path, overwrite: Overwrite = False, as_json: Json = False) -> None:
    """Cut an output of vitrim to a smaller width, without data.

    Example: vitrim slice small --mlp-ratio 0.5 --out smaller

    Args:
        source: a folder that vitrim wrote, ideally with --elastic, which trains it for several widths.
        mlp_ratio: hidden width as a multiple of the model width.
        out: folder to write; it must not exist, unless with --overwrite.
    """
    from vitrim.compression.slicing import slice_output

    result = slice_output(source, out, mlp_ratio=mlp_ratio, overwrite=overwrite)
    if not _said_as_json(result, as_json):
        _say_written(result, "Written and verified by loading it in a fresh process")


@app.command
def tune_text(
    model: str,
    *,
    pairs: str,
    out: Path,
    steps: int | None = None,
    epochs: float | None = None,
    schedule: Literal["published"] | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    image_folder: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: Overwrite = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Tune the text tower of a CLIP model to fit its image tower, which is not changed.

    Example: vitrim tune-text small --pairs flickr30k.parquet --out tuned --epochs 20

    Args:
        model: an image-text pair: a folder that vitrim or its library wrote, or a name.
        pairs: images with captions: tar shards, parquet, or JSON in COCO's format.
        out: folder to write; it must not exist, unless with --overwrite.
        steps: length in steps; one epoch if neither steps nor epochs is given.
        epochs: length in epochs.
        schedule: `published` takes length, rate and weight decay from the DGMR paper's EVA-CLIP-E, where not given.
        lr: learning rate (default 1e-6, the paper's for EVA-CLIP-E; small towers need more).
        batch_size: captions compared in one step (default 320).
        image_folder: folder with the images that a JSON file names.
        seed: random seed; equal seeds give equal results.
        device: auto, cpu, cuda or mps.
        resume: continue a stopped run that was writing this folder.
        quiet: show no progress.
    """
    from vitrim.clip.tasks import tune_text as tune
    from vitrim.distributed.processes import is_main

    asked = {"schedule": schedule, "steps": steps, "epochs": epochs, "lr": lr, "batch_size": batch_size}
    given = {key: value for key, value in asked.items() if value is not None}
    has_length = not given.keys().isdisjoint(("schedule", "steps", "epochs"))
    result = tune(
        model,
        pairs,
        options=given if has_length else {**given, "epochs": 1.0},
        image_folder=image_folder,
        out=out,
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
        quiet=hush(quiet or as_json),
    )
    if not is_main() or _said_as_json(result, as_json):
        return
    tuned = result.metrics.text_tuning
    assert tuned is not None
    names = ("step", "held_out_loss")
    print_table(names, [tuple(f"{point[name]:.4g}" for name in names) for point in tuned["curve"]])
    say(result.metrics.judged_on)
    say(f"Written to {out}")


@app.command
def demo(
    *,
    out: Path = Path("vitrim-demo"),
    recover_steps: int = 200,
    resume: bool = False,
    overwrite: Overwrite = False,
) -> None:
    """Cut a small ViT that comes with vitrim to half its size, on scikit-learn's digits; offline, takes a few minutes.

    Example: vitrim demo --out my-first

    Args:
        out: folder to write; it must not exist, unless with --overwrite.
        recover_steps: steps of distillation.
        resume: continue a stopped demo that was writing this folder.
    """
    from vitrim.demo import run_demo

    header, rows = run_demo(out, recover_steps=recover_steps, say=say, resume=resume, overwrite=overwrite)
    print_table(header, rows, title="Before and after")
    say(f"Open {out / 'report.html'} for the pictures.")


def recipe_of(cut: CutOptions, given: dict[str, Any]) -> Recipe:
    """Return the recipe from a file, or an empty one, updated with the command line's values."""
    from vitrim.config.recipe import Recipe

    return Recipe.of(cut.recipe).updated({name: value for name, value in given.items() if value is not None})


def _said_as_json(result: Result, as_json: bool) -> bool:
    """Print a result as one JSON document if `as_json`; return `as_json`."""
    if as_json:
        print_json({"out": str(result.out), **result.metrics.to_json()})
    return as_json


def _say_written(result: Result, how: str) -> None:
    """Print a run's final table, its notes and the line that loads the result."""
    print_table(*result.table())
    say(result.metrics.judged_on)
    print_notes(result.metrics.notes)
    say(f"{how}: {result.metrics.loads_with}")
