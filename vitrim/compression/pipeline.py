"""The main job in order: open, choose widths, cut, judge, recover, judge again, write."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.checked import NOT_GIVEN, NotGiven
from vitrim.compression.job import Job, open_job
from vitrim.compression.judging import judge, judging_notes, learn
from vitrim.compression.phases import (
    beside_equal_widths,
    choose_widths,
    cut_models_,
    measure_costs,
    prepare,
    stock_notes,
    with_bytes,
)
from vitrim.compression.training import train_
from vitrim.compression.write import Finished, Place, look_at_both, put_together, write_output
from vitrim.config.effort import EFFORT, Effort
from vitrim.config.options import RecoverOptions, RepairOptions
from vitrim.config.recipe import LENGTHS, Recipe
from vitrim.config.run_context import RunContext
from vitrim.config.widths import BUDGETS
from vitrim.distributed.processes import entered_on_main, from_main, is_main, join_, on_main
from vitrim.errors import RecipeError
from vitrim.methods import Method
from vitrim.metrics.record import Metrics
from vitrim.models.stock import stock_origin
from vitrim.output.provenance import environment
from vitrim.output.result import Result
from vitrim.output.stage import check_place, staged_output
from vitrim.recover.distill import OnValidation
from vitrim.report.collect import NOTHING
from vitrim.stopping import stoppable
from vitrim.storage.training_files import Which
from vitrim.torch_state import own_torch_state


@own_torch_state()
@stoppable()
def compress(
    model: nn.Module | str,
    *,
    data: Any = NOT_GIVEN,
    method: str | Method | NotGiven = NOT_GIVEN,
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    mlp_ratio: float | None = None,
    keep_ratio: float | None = None,
    hidden_dim: int | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    effort: Effort | None = None,
    repair: RepairOptions | Mapping[str, Any] | bool | NotGiven | None = NOT_GIVEN,
    recover: RecoverOptions | Mapping[str, Any] | NotGiven | None = NOT_GIVEN,
    recover_steps: int | None = None,
    recover_epochs: float | None = None,
    out: str | Path | None = None,
    seed: int | NotGiven = NOT_GIVEN,
    device: str | NotGiven = NOT_GIVEN,
    scope: str | NotGiven | None = NOT_GIVEN,
    round_to: int | NotGiven = NOT_GIVEN,
    exact: bool | NotGiven = NOT_GIVEN,
    remote_code: bool | NotGiven = NOT_GIVEN,
    options: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    weights: Which | None = None,
    quiet: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    on_validation: OnValidation | None = None,
) -> Result:
    """Make a pretrained vision transformer smaller.

    At most one of `params_ratio`, `macs_ratio`, `mlp_ratio`, `keep_ratio` and `hidden_dim` sets the size; by default
    half of the encoder's parameters stay. Every argument that is given overrides the recipe.

    Args:
        model: a module (left unchanged), `timm/NAME`, `timm/NAME@FILE`, `hf/ORG/NAME`, `open_clip/NAME/TAG`,
            `torchvision/NAME`, `vitrim/NAME`, `local-dir:PATH`, or a folder that vitrim wrote.
        data: images to learn from, without labels: a folder, parquet, a dataset or loader, "digits"; for a text encoder
            a text file or strings. Shards behind urls and streamed Hugging Face sets (`hf-stream:ORG/NAME`) are never
            loaded as a whole. Without images nothing is repaired.
        method: name of a method, or an instance of a class in `vitrim.methods`.
        params_ratio: share of the encoder's parameters that stays.
        macs_ratio: share of the encoder's multiply-accumulates that stays.
        mlp_ratio: hidden width as a multiple of the model width, as in timm.
        keep_ratio: share of each MLP's hidden units that stays.
        hidden_dim: hidden units that stay in each MLP.
        recipe: a Recipe, a mapping of its keys, or a YAML file.
        effort: how much work is spent on keeping the features: `fast` is the closed form alone, `default` refits each
            MLP, `max` refits longer and then trains all blocks at once.
        repair: closed-form repair after the cut: True or options for yes, False for no, None for the method's default.
        recover: options of distillation; None for none.
        recover_steps: steps of distillation.
        recover_epochs: epochs of distillation, instead of steps.
        out: folder to write; it must not exist, unless `overwrite`.
        seed: random seed; equal recipes and seeds give equal results.
        device: `auto`, or a torch device.
        scope: dotted path of the part to cut, or its end; by default the image tower, or the whole model.
        round_to: round widths to multiples of this.
        exact: keep widths exactly as asked, without rounding, even if the model's own library can't load them.
        remote_code: where it can't, write a modeling file, with which transformers alone loads the folder by
            `trust_remote_code=True`.
        options: options of the method, by name.
        model_args: arguments of the architecture of `vitrim/NAME`, or of `timm/NAME@FILE` where its tensors don't fix
            them.
        weights: which weights of a training checkpoint: "auto" takes averaged ones (EMA) where there are any, "raw" the
            trained ones.
        quiet: show no progress.
        resume: continue a stopped run that was writing `out`.
        overwrite: replace an output of vitrim at `out`, at the end; without `resume`, delete a stopped run's state.
        on_validation: called at each validation of the distillation.

    Returns:
        The small model on the CPU, the plan, what was measured, and the folder.

    Raises:
        VitrimError: the input is wrong; nothing is written.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> result = vitrim.compress(digits, method="magnitude", mlp_ratio=1, quiet=True)
        >>> result
        Result(magnitude: 683,242 -> 349,738 parameters)
    """
    asked = {
        "model": _name(model),
        "data": data if data is NOT_GIVEN else _name(data),
        "method": method,
        "params_ratio": params_ratio,
        "macs_ratio": macs_ratio,
        "mlp_ratio": mlp_ratio,
        "keep_ratio": keep_ratio,
        "hidden_dim": hidden_dim,
        "effort": effort,
        "repair": repair,
        "recover": _recover(recover, recover_steps, recover_epochs),
        "seed": seed,
        "device": device,
        "scope": scope,
        "round_to": round_to,
        "exact": exact,
        "remote_code": remote_code,
        "options": NOT_GIVEN if options is None else options,
        "model_args": NOT_GIVEN if model_args is None else model_args,
        "weights": NOT_GIVEN if weights is None else weights,
    }
    chosen = Recipe.of(recipe).updated(_given(asked))
    join_(chosen.device)
    source = chosen.data if data is NOT_GIVEN else data
    place = None if out is None else Path(out)
    if place is not None:
        on_main(check_place, place, resume=resume, overwrite=overwrite)
    job = open_job(model, chosen, source, out=place)
    context = RunContext(resume=resume, quiet=quiet or not is_main(), device=chosen.device, seed=chosen.seed)
    if place is None:
        return _run(job, context, None, on_validation)
    with entered_on_main(staged_output(place, resume=resume, overwrite=overwrite)) as (folder, work):
        return _run(job, replace(context, work=work), Place(folder=folder, out=place), on_validation)


def _run(job: Job, context: RunContext, place: Place | None, on_validation: OnValidation | None) -> Result:
    """Run all phases: cut, judge, recover, judge again, write. Models are encoders until `put_together`."""
    started = time.monotonic()
    models = prepare(job, context)
    widths = choose_widths(job, models, context)
    cut = cut_models_(models, job, widths, context)
    learning = learn(models, cut)
    after_cut, wide = on_main(judge, models, job, cut.plan, context)
    trained = train_(models, job, widths.elastic, context, on_validation)
    after_recovery, wide = on_main(judge, models, job, cut.plan, context) if trained.anything else (None, wide)
    before, after = on_main(measure_costs, models, job, context, after_recovery or after_cut)
    plan = cut.plan.below(job.origin.encoder)
    stock = stock_origin(job.origin, plan.edits)
    seen = look_at_both(models, job, context) if place is not None else NOTHING
    whole = put_together(job, models, stock, widened=wide is not None)
    with_labels = job.recipe.recover is not None and job.recipe.recover.loss == "labels"
    said = judging_notes(after_cut, after_recovery, learning, with_labels=with_labels)
    why = [*([] if wide is None else [wide]), *stock_notes(job.origin, plan.edits, stock)]
    metrics = Metrics(
        model=job.origin.name,
        method=plan.method,
        encoder=job.origin.encoder,
        before=with_bytes(before, job.encoder),
        after=with_bytes(after, models.student),
        after_cut=after_cut,
        after_recovery=after_recovery,
        images=models.counts,
        cut_errors=cut.errors,
        learning=learning and learning.describe(),
        allocation=beside_equal_widths(widths, after_cut),
        stock=stock is not None,
        notes=(*job.notes, *models.notes, *widths.notes, *cut.notes, *trained.notes, *said, *why),
        environment=environment(),
        seconds=round(time.monotonic() - started, 1),
        **plan.describe(),
        **trained.describe(),
    )
    if place is None:
        return Result(model=whole, plan=plan, metrics=from_main(metrics), out=None)
    done = {"cut": cut, "plan": plan, "metrics": metrics, "trained": trained, "seen": seen}
    written = write_output(Finished(job=job, models=models, whole=whole, **done), place, context)
    return Result(model=whole, plan=plan, metrics=written, out=place.out)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that were given; None means "not given" for a budget or effort, else a value."""
    return {
        key: value
        for key, value in values.items()
        if value is not NOT_GIVEN and not (value is None and key in (*BUDGETS, EFFORT, "model"))
    }


def _recover(options: Any, steps: int | None, epochs: float | None) -> Any:
    """Return the options of recovery, combined with a length that was given separately."""
    length = {name: value for name, value in (("steps", steps), ("epochs", epochs)) if value is not None}
    if not length:
        return options
    if options is None:
        raise RecipeError(f"recover_{next(iter(length))}: recover=None asks for no distillation; drop one of the two.")
    if options is NOT_GIVEN:
        return length
    base = options.model_dump(exclude_unset=True) if isinstance(options, RecoverOptions) else dict(options)
    return {**{key: value for key, value in base.items() if key not in LENGTHS}, **length}


def _name(value: Any) -> str | None:
    """Return how a recipe names a model or data source: strings and paths as they are, objects by their class."""
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    return f"<{type(value).__name__}>"
