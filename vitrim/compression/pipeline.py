"""The main job, told in order: load, find the MLPs, cut, recover, measure, save, report."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.clip.embedding_space import embedding_space_of
from vitrim.compression.allocate import allocate, beside_uniform
from vitrim.compression.cut import CutReport, cut_, resume_cut_, save_cut, with_stock_width
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.memory import check_memory
from vitrim.data import ImageSet, ImageStream, Split, augment_for, split_images
from vitrim.data.inputs import check_inputs, open_inputs, random_inputs
from vitrim.distributed.devices import resolve_device
from vitrim.distributed.processes import entered_on_main, from_main, is_main, join_, on_main, plan_from_main
from vitrim.errors import RecipeError
from vitrim.evaluation import compare, measure, own_top1
from vitrim.metrics.fidelity import block_fidelity
from vitrim.models.features import device_of
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.models.stock import loads_with, stock_origin, why_not_stock
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.output.save import save
from vitrim.output.stage import staged_output
from vitrim.output.verify import verify
from vitrim.recover.distill import recover_
from vitrim.recover.elastic import Widths
from vitrim.recover.elastic_files import save_widths
from vitrim.recover.elastic_fit import Fitting, serving
from vitrim.recover.files import RECOVERY_LOG, TRACKER_LOGS
from vitrim.recover.losses import EmbeddingSpace
from vitrim.recover.result import Recovery
from vitrim.recover.sampler import check_stream
from vitrim.recover.trackers import check_trackers
from vitrim.repair.blockwise import follow_cut_
from vitrim.report.collect import collect, look
from vitrim.storage.documents import write_json
from vitrim.surgery import Plan
from vitrim.types import MlpSite


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `compress` gives back; `out` is None where nothing was written."""

    model: nn.Module
    plan: Plan
    metrics: Mapping[str, Any]
    out: Path | None


def compress(
    model: nn.Module | str,
    *,
    data: Any = None,
    method: str = "dgmr",
    mlp_ratio: float | None = None,
    keep_ratio: float | None = None,
    width: int | None = None,
    recipe: Recipe | str | Path | None = None,
    recover: int | Mapping[str, Any] | RecoverOptions | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    scope: str | None = None,
    stock: bool = False,
    options: Mapping[str, Any] | None = None,
    quiet: bool = False,
    resume: bool = False,
) -> Result:
    """Make a pretrained vision transformer smaller.

    Args:
        model: a module (left unchanged), `timm/NAME`, `hf/ORG/NAME`, `open_clip/NAME/TAG`, `torchvision/NAME`,
            `local-dir:PATH`, or a folder that vitrim wrote.
        data: images to learn from, no labels: a folder, parquet, a dataset or loader, "digits"; for a text encoder a
            text file or strings. Shards behind urls and streamed Hugging Face sets (`hf-stream:ORG/NAME`) are never
            collected. None: no repair.
        method: name of a registered method; `vitrim methods` lists them.
        mlp_ratio: hidden width as a multiple of the model width (the paper's r); 1.0 where no budget is given.
        keep_ratio: share of each MLP's units to keep.
        width: units to keep in each MLP.
        recipe: a Recipe or a YAML file; other arguments that are given win over it.
        recover: None, a number of distillation steps, or options as in a recipe.
        out: folder to write; it must not exist.
        seed: makes two runs equal.
        device: `auto`, or a torch device.
        scope: dotted path of the subtree to cut, or the end of one; without, the image tower or the whole model.
        stock: take the nearest width that the model's own library can load by itself.
        options: the method's own options.
        quiet: show no progress.
        resume: continue a run into `out` that was stopped.

    Returns:
        The small model on the CPU, the plan, the metrics and the folder.

    Raises:
        VitrimError: the input is wrong; nothing is written.
    """
    given = {
        "model": _name(model),
        "data": _name(data),
        "method": method if recipe is None or method != "dgmr" else None,
        "mlp_ratio": mlp_ratio,
        "keep_ratio": keep_ratio,
        "width": width,
        "recover": _as_recover(recover),
        "seed": seed or None,
        "device": device if device != "auto" else None,
        "scope": scope,
        "stock": stock or None,
        "options": options,
    }
    base = recipe if isinstance(recipe, Recipe) else Recipe() if recipe is None else Recipe.load(recipe)
    chosen = base.updated(given)
    join_(chosen.device)
    whole, origin = open_model(model)
    encoder, scope = resolve_scope(whole, chosen.scope, origin.encoder)
    if encoder != origin.encoder:  # what is known of the inputs was known of another part
        origin = replace(origin, encoder=encoder, preprocessing={})
    space = None if chosen.recover is None else embedding_space_of(whole, origin, chosen.recover)
    job = _Job(whole=whole, origin=origin, scope=scope, recipe=chosen, quiet=quiet or not is_main(), space=space)
    source = data if data is not None else chosen.data
    images = None if source is None else open_inputs(source, origin)
    if images is None and (chosen.recover or chosen.blockwise):
        raise RecipeError("recover, blockwise: distillation needs images; pass data.")
    if chosen.recover is not None:  # what would fail once the student is cut
        check_trackers(chosen.recover.report_to, folder=None if out is None else Path(out))
        if isinstance(images, ImageStream):
            check_stream(images, chosen.recover)
    if out is None:
        return _run(job, images, folder=None, work=None, resume=False)
    out = Path(out)
    with entered_on_main(staged_output(out, resume=resume)) as (folder, work):
        result = _run(job, images, folder=folder, work=work, resume=resume)
    loads = on_main(lambda: loads_with(origin, out, stock=result.metrics["stock"]))
    return replace(result, out=out, metrics={**result.metrics, "loads_with": loads})


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is cut: the whole model, how it was built (with the path of its encoder), and the part to look at."""

    whole: nn.Module
    origin: Origin
    scope: str
    recipe: Recipe
    quiet: bool
    space: EmbeddingSpace | None


def _run(
    job: _Job, images: ImageSet | ImageStream | None, *, folder: Path | None, work: Path | None, resume: bool
) -> Result:
    """The story: cut, judge, recover, judge again, write. Models here are encoders; the whole comes back at the end."""
    started, recipe, origin = time.monotonic(), job.recipe, job.origin
    original, device = job.whole.get_submodule(origin.encoder), resolve_device(recipe.device)
    student = copy.deepcopy(original).to(device).float().eval()  # moments and small steps need more than bf16
    teacher = copy.deepcopy(student).requires_grad_(False)
    sites = find_mlps(teacher, scope=job.scope.removeprefix(origin.encoder).removeprefix("."))
    recipe = with_stock_width(recipe, origin, [site.below(origin.encoder) for site in sites])
    widths = Widths.of(recipe, sites)
    context = RunContext(work=work, resume=resume, quiet=job.quiet, device=recipe.device, seed=recipe.seed)
    seen = work if work is not None and work.is_dir() else None  # another machine may not have it
    split = None if images is None else split_images(images, recipe, work=seen)
    check_inputs(teacher, origin, split.calibration if split else [])
    batches = split and split.calibration
    check_memory(teacher, sites, recipe, batches, quiet=job.quiet)
    allocation = on_main(lambda: allocate(recipe, teacher, sites, batches, work=work, quiet=job.quiet))
    asked, recipe = recipe, allocation.recipe
    cut = _cut_(student, teacher, sites, recipe, split, work, resume=resume, quiet=job.quiet)
    stages = [on_main(lambda: _judge(student, teacher, split, sites))]
    allocation = on_main(lambda: beside_uniform(allocation, asked, stages[0], teacher, sites, split))
    blocks = follow_cut_(student, teacher, sites, recipe, split, context=context)
    recovery, slices = None, {}
    if split is not None and recipe.recover is not None:
        with serving(student, widths, _fitting(teacher, recipe, recipe.recover, split)) as slices:
            recovery = _recover_(student, teacher, job, split, recipe.recover, widths, context)
    if blocks or recovery:
        stages.append(on_main(lambda: _judge(student, teacher, split, sites)))
    plan = cut.plan.below(origin.encoder)
    stock = stock_origin(origin, plan.edits)
    metrics = {
        **on_main(lambda: _measured(job, teacher, student, split)),
        "after_cut": stages[0],
        "after_recovery": stages[1] if blocks or recovery else None,
        **plan.describe(),
        "allocation": allocation.about,
        "cut_errors": {path: dict(errors) for path, errors in cut.errors.items()},
        "blockwise": None if blocks is None else dict(blocks.__dict__),
        "recovery": None if recovery is None else dict(recovery.__dict__),
        "elastic": {f"{ratio:g}": dict(found.errors) for ratio, found in slices.items()} or None,
        "stock": stock is not None,
        "notes": [
            *allocation.notes,
            *cut.notes,
            *(note for step in (blocks, recovery) if step for note in step.notes),
            *([] if stock else [why_not_stock(origin, plan.edits)]),
        ],
    }
    seen_by_both: dict[str, Any] = {}  # on the device, and on the main process alone
    if folder is not None:
        on_main(lambda: seen_by_both.update(look(teacher, student, origin, split and split.held_out)))
    teacher, student = teacher.cpu(), _typed_as(original, student.cpu())
    whole = _with_encoder(job.whole, original, student)
    backend = backend_of(origin.library)
    if stock is not None and backend is not None:
        backend.describe_(whole, stock)

    def write(folder: Path) -> None:
        _write(folder, whole, origin, plan, metrics, split)
        if slices:
            save_widths(folder, whole, {ratio: found.below(origin.encoder) for ratio, found in slices.items()})
        if recovery is not None and work is not None:
            _move_logs(work, folder)
        _write_report(folder, teacher, origin, cut.plan, recipe, metrics, seen_by_both)
        _write_card(folder, job, recipe, metrics)

    if folder is not None:
        on_main(lambda: write(folder))
    metrics = from_main({**metrics, "seconds": round(time.monotonic() - started, 1)})
    return Result(model=whole, plan=plan, metrics=metrics, out=folder)


def _cut_(
    student: nn.Module,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    recipe: Recipe,
    split: Split | None,
    work: Path | None,
    *,
    resume: bool,
    quiet: bool,
) -> CutReport:
    """Cut the student, or take up the cut of a run that was stopped; one that a recovery follows is kept."""
    kept: list[CutReport | None] = []
    if resume and work is not None:
        on_main(lambda: kept.append(resume_cut_(student, recipe, work)))
        student.to(device_of(teacher))  # what was kept comes from a file
    cut = _from_main(kept[0] if kept else None, student)
    if cut is None:
        cut = cut_(student, teacher, sites, recipe, split and split.calibration, quiet=quiet)
        cut = _from_main(cut, student) or cut
        if work is not None and (recipe.recover or recipe.blockwise):
            on_main(lambda: save_cut(student, cut, recipe, work))
    return cut


def _from_main(cut: CutReport | None, student: nn.Module) -> CutReport | None:
    """The main process's cut and student on every process, so that all go on from the same bits; None: it has none."""
    plan = plan_from_main(None if cut is None else cut.plan, student)
    errors, notes = from_main(({}, ()) if cut is None else (cut.errors, cut.notes))
    return None if plan is None else CutReport(plan=plan, errors=errors, notes=notes)


def _measured(job: _Job, teacher: nn.Module, student: nn.Module, split: Split | None) -> dict[str, Any]:
    """What was run, on what, and what the models cost before and after."""
    return {
        "model": job.origin.name,
        "encoder": job.origin.encoder,
        "method": job.recipe.method,
        "images": split.counts if split else {},
        "before": measure(teacher, job.origin, split and split.sample, split and split.held_out),
        "after": measure(student, job.origin, split and split.sample, split and split.held_out),
        "environment": environment(),
    }


def _move_logs(work: Path, folder: Path) -> None:
    """The log of distillation, and what trackers wrote, to the output."""
    shutil.move(work / RECOVERY_LOG, folder / RECOVERY_LOG)
    if (work / TRACKER_LOGS).exists():
        shutil.move(work / TRACKER_LOGS, folder / TRACKER_LOGS)


def _typed_as(original: nn.Module, student: nn.Module) -> nn.Module:
    """The student with each tensor in the type that it has in the original: a bf16 model may keep float32 buffers.

    What an edit has put there takes the type of the original's parameters, if it is of floating point.
    """
    types = {name: t.dtype for name, t in (*original.named_parameters(), *original.named_buffers())}
    usual = next((p.dtype for p in original.parameters()), torch.float32)
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        if tensor.is_floating_point():  # what an edit has made an integer is one
            tensor.data = tensor.data.to(types.get(name, usual))
    return student


def _with_encoder(whole: nn.Module, original: nn.Module, student: nn.Module) -> nn.Module:
    """A copy of a model with the student in place of its encoder; the copy of the encoder itself is never made."""
    return student if whole is original else copy.deepcopy(whole, {id(original): student})


def _recover_(
    student: nn.Module,
    teacher: nn.Module,
    job: _Job,
    split: Split,
    options: RecoverOptions,
    widths: Widths | None,
    context: RunContext,
) -> Recovery:
    """Distil on the training images, augmented for the model's own preprocessing; tensors are taken as they are."""
    known = job.origin.preprocessing
    augment = augment_for(known, options.augment, flip=options.flip) if "mean" in known else None
    return recover_(
        student,
        teacher,
        split.train.augmented(augment, job.recipe.seed),
        held_out=[batch.images_BCHW for batch in split.held_out],
        options=options,
        context=context,
        widths=widths,
        space=job.space,
    )


def _fitting(teacher: nn.Module, recipe: Recipe, options: RecoverOptions, split: Split) -> Fitting:
    """What the output weights of several widths are fitted with."""
    held_out = [batch.images_BCHW for batch in split.held_out]
    repair, at = recipe.repair_options(), options.features_at
    return Fitting(teacher=teacher, batches=split.calibration, held_out=held_out, options=repair, at=at)


def _judge(
    student: nn.Module, teacher: nn.Module, split: Split | None, sites: Sequence[MlpSite]
) -> dict[str, Any] | None:
    """How close the student is on held-out images, as a whole and block by block."""
    if split is None:
        return None
    found, outputs, _ = compare(student, teacher, split.held_out)
    return {
        "fidelity": found,
        "blocks": block_fidelity(student, teacher, split.held_out, list(dict.fromkeys(site.block for site in sites))),
        **own_top1(student, outputs),
    }


def _write(
    folder: Path, whole: nn.Module, origin: Origin, plan: Plan, metrics: dict[str, Any], split: Split | None
) -> None:
    """Weights and plan, loaded back in a fresh process before this returns."""
    stock = save(folder, whole, origin=origin, plan=plan)
    if origin.library is not None:
        probe = split.sample if split is not None else random_inputs(origin)
        if probe is not None:
            metrics["reload_difference"] = verify(folder, whole, probe[:4], origin=origin, stock=stock)


def _write_report(
    folder: Path,
    teacher: nn.Module,
    origin: Origin,
    plan: Plan,
    recipe: Recipe,
    metrics: dict[str, Any],
    seen: Mapping[str, Any],
) -> None:
    """Recipe, metrics and the page."""
    from vitrim.report.page import write_report  # draws with matplotlib, which is slow to import

    (folder / "recipe.yaml").write_text(recipe.dump())
    write_json(folder / "metrics.json", metrics)
    write_report(folder / "report.html", collect(teacher, origin, plan, recipe, metrics, seen))


def _write_card(folder: Path, job: _Job, recipe: Recipe, metrics: dict[str, Any]) -> None:
    """What stands beside the model on a hub."""
    from vitrim.output.card import licence_of, write_card  # its numbers are written as the page's are

    write_card(folder, job.origin, recipe, metrics, licence=licence_of(job.whole, job.origin))


def _as_recover(recover: int | Mapping[str, Any] | RecoverOptions | None) -> Any:
    """Options of recovery; a number means steps."""
    return {"steps": recover} if isinstance(recover, int) else recover


def _name(value: Any) -> str | None:
    """How a recipe names a model or a data source: strings and paths as they are, objects by their kind."""
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    return f"<{type(value).__name__}>"
