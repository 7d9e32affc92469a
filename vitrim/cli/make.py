"""Commands that write a model: compress, prune-checkpoint, slice, tune-text, demo."""

from __future__ import annotations

from pathlib import Path

from vitrim.cli.app import Json, app, console, number, print_json, print_notes, print_summary, print_table
from vitrim.cli.options import CutOptions, RecoverOptions
from vitrim.errors import RecipeError

NO_CUT, NO_RECOVERY = CutOptions(), RecoverOptions()


@app.command
def compress(
    model: str | None = None,
    *,
    out: Path,
    data: str | None = None,
    cut: CutOptions = NO_CUT,
    recover: RecoverOptions = NO_RECOVERY,
    resume: bool = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller and write it to a folder.

    Example: vitrim compress timm/vit_base_patch14_dinov2.lvd142m --data photos/ --out small --epochs 2

    Args:
        model: timm/NAME, hf/ORG/NAME, open_clip/NAME/TAG, torchvision/NAME, or a model folder; may stand in the recipe.
        out: folder to write; it must not exist.
        data: folder of images, parquet, saved dataset, tar shards ("pipe:COMMAND" and "hf-stream:NAME" too) or
            "digits", all without labels; texts for a text encoder.
        resume: go on with a run into this folder that was stopped.
        quiet: no progress.
    """
    from vitrim.compression.pipeline import compress as run
    from vitrim.config.recipe import Recipe
    from vitrim.distributed.processes import is_main
    from vitrim.report.collect import summarise

    given = {"model": model, "data": data, **cut.given(), **recover.given()}
    asked = (Recipe() if cut.recipe is None else Recipe.load(cut.recipe)).updated(given)
    if asked.model is None:
        raise RecipeError("model: none given; name one on the command line or in the recipe.")
    result = run(asked.model, recipe=asked, out=out, resume=resume, quiet=quiet or as_json)
    if not is_main():
        return
    if as_json:
        return print_json({"out": str(out), **result.metrics})
    print_summary(summarise(result.metrics))
    print_notes(result.metrics["notes"])
    how = result.metrics["loads_with"]
    console.print(f"Written and verified by loading it in a fresh process: {how}\nReport: {out / 'report.html'}")


@app.command
def prune_checkpoint(
    source: str,
    out: Path,
    *,
    data: str | None = None,
    cut: CutOptions = NO_CUT,
    memory_budget: str | None = None,
    shard_size: str = "2GB",
    resume: bool = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Prune a checkpoint file to file, one layer in memory at a time.

    Example: vitrim prune-checkpoint EVA-CLIP-E/ EVA-CLIP-E-small/ --mlp-ratio 1

    Args:
        source: a model folder, timm/NAME@FILE, or hf/ORG/NAME.
        out: folder to write; it must not exist.
        data: images for selection and repair; without, units are picked on weights alone.
        memory_budget: such as 4GB; what calibration needs above it goes to disk.
        shard_size: largest size of a file, for libraries that read shards.
        resume: go on with a run into this folder that was killed.
        quiet: no progress.
    """
    from vitrim.compression.file_to_file import prune_checkpoint as prune
    from vitrim.config.recipe import Recipe

    given = {"model": source, "data": data, **cut.given()}
    asked = (Recipe() if cut.recipe is None else Recipe.load(cut.recipe)).updated(given)
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
        return print_json({"out": str(out), **found.metrics})
    rows = [(name, *map(number, found.metrics[name])) for name in ("parameters", "bytes")]
    print_table(("", "before", "after"), rows)
    print_notes(found.metrics["notes"])
    console.print(f"Written and read back: {found.metrics['loads_with']}")


@app.command(name="slice")
def slice_(source: Path, *, mlp_ratio: float, out: Path, as_json: Json = False) -> None:
    """Cut an output of vitrim to one of its smaller widths, without data.

    Example: vitrim slice small --mlp-ratio 0.5 --out smaller

    Args:
        source: a folder that vitrim wrote; best one with --elastic, which was trained for its widths.
        mlp_ratio: hidden width as a multiple of the model width.
        out: folder to write; it must not exist.
    """
    from vitrim.compression.slicing import slice_output

    found = slice_output(source, out, mlp_ratio=mlp_ratio)
    if as_json:
        return print_json({"out": str(out), **found.metrics})
    print_notes(found.metrics["notes"])
    console.print(f"Written and verified by loading it in a fresh process: {found.metrics['loads_with']}")


@app.command
def tune_text(
    model: str,
    *,
    pairs: str,
    out: Path,
    steps: int | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    image_folder: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    quiet: bool = False,
    as_json: Json = False,
) -> None:
    """Tune the text tower of a CLIP model to its image tower, which stays as it is.

    Example: vitrim tune-text small --pairs flickr30k.parquet --out tuned --epochs 20

    Args:
        model: a pair: a folder that vitrim or its library wrote, or a name.
        pairs: images with captions: tar shards, parquet, or JSON as COCO has it.
        out: folder to write; it must not exist.
        steps: steps; one epoch without steps or epochs.
        epochs: epochs.
        lr: rate (default 1e-6, the paper's for EVA-CLIP-E; small towers want more).
        batch_size: captions that a step compares (default 320).
        image_folder: where the images that a JSON names are.
        seed: makes two runs equal.
        device: auto, cpu, cuda, mps.
        resume: go on with a run into this folder that was stopped.
        quiet: no progress.
    """
    from vitrim.clip.tasks import tune_text as tune
    from vitrim.distributed.processes import is_main

    length = {"epochs": 1.0} if steps is None and epochs is None else {"steps": steps, "epochs": epochs}
    given = {**length, "lr": lr, "batch_size": batch_size}
    found = tune(
        model,
        pairs,
        options={key: value for key, value in given.items() if value is not None},
        image_folder=image_folder,
        out=out,
        seed=seed,
        device=device,
        resume=resume,
        quiet=quiet or as_json,
    )
    if not is_main():
        return
    if as_json:
        return print_json({"out": str(out), **found.metrics})
    curve = found.metrics["text_tuning"]["curve"]
    names = ("step", "held_out_loss")
    print_table(names, [tuple(f"{point[name]:.4g}" for name in names) for point in curve])
    console.print(f"Written to {out}")


@app.command
def demo(*, out: Path = Path("vitrim-demo"), steps: int = 200) -> None:
    """Cut a small ViT that comes with vitrim to half its size, on scikit-learn's digits: no network, a few minutes.

    Example: vitrim demo --out my-first

    Args:
        out: folder to write; it must not exist.
        steps: distillation steps.
    """
    from vitrim.demo import run_demo

    run_demo(out, steps=steps, console=console)
