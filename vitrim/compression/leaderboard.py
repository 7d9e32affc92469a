"""The leaderboard: every method at the same size, on the same images, with the same recovery, one row per run.

A row is one run of `compress`. The width that brings a method to the common size is found by trial: no method is known
here by name, so every registered one takes part. Methods that select units have two rows, without and with our repair,
so that selection and repair are judged apart. Rows are saved one by one, and a failed one stops no other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.compression.pipeline import compress
from vitrim.compression.share import NUM_IMAGES, Counted, Trials
from vitrim.config.recipe import Recipe
from vitrim.data import ImageStream, first_images
from vitrim.data.inputs import check_repeatable, open_inputs, random_inputs
from vitrim.distributed.devices import resolve_device
from vitrim.errors import DAMAGED, CheckpointError, Interrupted, OutputError, RecipeError
from vitrim.methods import METHODS, find_method
from vitrim.metrics.record import Closeness, ModelCost
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.progress import progress
from vitrim.report.leaderboard import markdown, verdict
from vitrim.stopping import stoppable
from vitrim.storage.sealed import read_sealed, write_sealed
from vitrim.torch_state import own_torch_state

# What has to stay within a budget of parameters or of MACs: masks are no parameters, but a file holds them.
SIZES: Mapping[str, Sequence[Counted]] = {"params": ("params", "bytes"), "macs": ("macs",)}
FORMAT, REPORT = "vitrim-leaderboard/1", "leaderboard.json"


@own_torch_state()
@stoppable()
def leaderboard(
    model: nn.Module | str | None = None,
    *,
    data: Any = "digits",
    methods: Sequence[str] = (),
    params_ratio: float | None = None,
    macs_ratio: float | None = None,
    recover_steps: int = 0,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    baselines: Sequence[str] = ("random", "magnitude"),
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run methods at one size and compare them.

    Args:
        model: as for `compress`; None is the digits ViT that comes with vitrim.
        data: images, as for `compress`; with labels and a classifier head, top-1 is measured too.
        methods: names of methods; by default all that are registered.
        params_ratio: share of the model's parameters that stays, and of its bytes, 0..1; 0.5 if neither ratio is given.
            A method that can't save them is run at the same share of MACs, or else at that keep_ratio; its row says so.
        macs_ratio: share of the model's multiply-accumulates that stays, instead of parameters.
        recover_steps: distillation steps for every row; 0 for none.
        recipe: calibration, repair, recovery, scope and rounding of every row, instead of the defaults.
        baselines: methods to compare the others with; the verdict names those that do worse.
        out: folder for `leaderboard.json` and `leaderboard.md`; rows already there are kept, except failed ones.
        seed: random seed of every row.
        device: `auto`, or a torch device.
        quiet: show no progress.

    Returns:
        The contents of `leaderboard.json`, without its digest.

    Raises:
        RecipeError: a method is unknown, or the budget is not between 0 and 1.
        OutputError: `out` holds rows of another comparison.

    Example:
        >>> import vitrim
        >>> from PIL import Image
        >>> images = [(Image.new("L", (28, 28), 25 * label), label) for label in range(10)]
        >>> quick = {"repair": {"refit": False}}
        >>> found = vitrim.leaderboard(data=images, methods=["magnitude"], recipe=quick, quiet=True)
        >>> for row in found["rows"]:
        ...     print(row["method"], row["repair"])
        magnitude none
        magnitude ours
    """
    counted, budget = _budget(params_ratio, macs_ratio)
    out = None if out is None else Path(out)
    names = [find_method(name).name for name in methods or METHODS]
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}" if model is None else model
    base = _shared(Recipe.of(recipe), recover_steps, seed, device)
    asked = {
        "model": model if isinstance(model, str) else type(model).__name__,
        "data": str(data) if isinstance(data, str | Path) else type(data).__name__,
        f"{counted}_ratio": budget,
        "baselines": list(baselines),
        "recipe": base.model_dump(mode="json", exclude={"model", "data", "device"}),
    }
    report = _opened(out, asked)
    runner = _Runner.of(model, data, base, budget, counted)
    with progress("leaderboard", len(names), quiet=quiet) as bar:
        for name in names:
            bar.advance(0, name)
            kept = [row for row in report["rows"] if row["method"] == name and row["error"] is None]
            rows = [row for row in report["rows"] if row["method"] != name]
            for row in runner.rows(name, kept):
                rows.append(row)
                report |= {"rows": rows, "original": runner.original or report["original"]}
                report["verdict"] = verdict(rows, baselines)
                _write(out, report)
            bar.advance(1, name)
    return report


def _budget(params_ratio: float | None, macs_ratio: float | None) -> tuple[Counted, float]:
    """Return what is counted (parameters or MACs) and the share that stays.

    Raises:
        RecipeError: both ratios are given, or one is not between 0 and 1.
    """
    if params_ratio is not None and macs_ratio is not None:
        raise RecipeError("leaderboard: give one of params_ratio and macs_ratio.")
    counted: Counted = "params" if macs_ratio is None else "macs"
    ratio = macs_ratio if params_ratio is None else params_ratio
    ratio = 0.5 if ratio is None else ratio
    if not 0 < ratio < 1:
        raise RecipeError(f"{counted}_ratio: {ratio:g} is no share of the model; use a number between 0 and 1.")
    return counted, ratio


def _shared(recipe: Recipe, recover_steps: int, seed: int, device: str) -> Recipe:
    """Return the part of a recipe that every row uses: all but method, options and budget; widths are kept exactly."""
    step = recipe.steps[0].model_dump(exclude_unset=True, include={"repair", "round_to"})
    kept = recipe.model_dump(
        exclude_unset=True, include={"calibrate", "blockwise", "at_once", "recover", "scope", "model_args", "weights"}
    )
    base = Recipe.parse({**kept, **step, "exact": True, "seed": seed, "device": device})
    return base.updated({"recover": {"steps": recover_steps}}) if recover_steps else base


@dataclass(kw_only=True)
class _Runner:
    """Everything that the rows share: the model, the images, the recipe, and a teacher for trial cuts."""

    model: nn.Module | str
    data: Any
    base: Recipe
    budget: float
    counted: Counted
    trials: Trials
    original: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: nn.Module | str, data: Any, base: Recipe, budget: float, counted: Counted) -> _Runner:
        """Open the model and a few images."""
        whole, origin = open_model(model, base.reading())
        encoder, scope = resolve_scope(whole, base.scope, origin.encoder)
        teacher = copy.deepcopy(whole.get_submodule(encoder)).to(resolve_device(base.device)).float().eval()
        check_repeatable(teacher, origin, random_inputs(origin, 2))
        source = open_inputs(data, replace(origin, encoder=encoder))
        if isinstance(source, ImageStream):
            source = source.take(NUM_IMAGES, seed=base.seed)[0]
        batches, _ = first_images(source, NUM_IMAGES, seed=base.seed, batch_size=NUM_IMAGES)
        source.tell()
        sites = find_mlps(teacher, scope=scope.removeprefix(encoder).removeprefix("."))
        trials = Trials(teacher=teacher, sites=sites, images_BCHW=batches[0], base=base)
        return cls(model=model, data=data, base=base, budget=budget, counted=counted, trials=trials)

    def rows(self, name: str, kept: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the rows of a method: those that exist already, and new ones as they are finished."""
        known = {row["repair"]: row for row in kept}
        try:
            fitted = kept[0]["fitted"] if kept else self.fit(name)
        except Exception as error:  # no error may stop the other methods
            yield _failed(name, "none", error)
            return
        for repair in ("none", "ours") if fitted["repairable"] else ("none",):
            yield known.get(repair) or self.row(name, repair, fitted)

    def row(self, name: str, repair: str, fitted: dict[str, Any]) -> dict[str, Any]:
        """Run `compress` once and return its row, or a row with its error."""
        budget = {} if find_method(name).takes == "nothing" else {"keep_ratio": fitted["keep_ratio"]}
        recipe = self.base.updated({"method": name, "repair": {} if repair == "ours" else False, **budget})
        try:
            metrics = compress(self.model, data=self.data, recipe=recipe, quiet=True).metrics
            if self.original is None:
                self.original = {**_costs(metrics.before), "top1": metrics.before.top1}
        except Interrupted:
            raise
        except Exception as error:  # no error may stop the other rows
            return _failed(name, repair, error, fitted)
        return {
            "method": name,
            "repair": repair,
            "error": None,
            "fitted": fitted,
            **_costs(metrics.after),
            "latency": {str(size): dict(row) for size, row in metrics.after.latency.items()},
            "after_cut": _quality(metrics.after_cut),
            "after_recovery": _quality(metrics.after_recovery),
            "seconds": metrics.seconds,
            "notes": list(metrics.notes),
        }

    def fit(self, name: str) -> dict[str, Any]:
        """Find the keep_ratio at which a method leaves the budget's share, by trial cuts on a few images."""
        units = ("macs",) if self.counted == "macs" else ("params", "macs")
        met = (
            (ratio, unit) for unit in units if (ratio := self.trials.meet(name, SIZES[unit], self.budget)) is not None
        )
        ratio, counted = next(met, (self.budget, None))
        return {"keep_ratio": ratio, "counted": counted, "repairable": self.trials.at(name, ratio).repairable}


def _costs(cost: ModelCost) -> dict[str, Any]:
    """Return the sizes of one model."""
    return {"parameters": cost.parameters, "bytes": cost.num_bytes, "macs": cost.macs}


def _quality(judged: Closeness | None) -> dict[str, Any] | None:
    """Return how close a student is on the held-out images, or None if it was not measured."""
    if judged is None:
        return None
    found = judged.fidelity
    scores = {"relative_error": found["relative_error"], "cosine": found["cosine"], "top1": judged.top1}
    return {**scores, "num_images": judged.num_images, "num_labelled": judged.num_labelled}


def _failed(name: str, repair: str, error: Exception, fitted: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the row of a run that failed."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return {"method": name, "repair": repair, "error": line, "fitted": fitted}


def _opened(out: Path | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report to continue, or an empty one.

    Raises:
        OutputError: the report there belongs to another comparison, or is damaged.
    """
    empty = {
        "format": FORMAT,
        "asked": asked,
        "environment": environment(),
        "original": None,
        "rows": [],
        "verdict": [],
    }
    if out is None or not (out / REPORT).exists():
        return empty
    try:
        kept = read_sealed(out / REPORT, {"asked": dict, "rows": list})
        differ = [name for name in asked if kept["asked"].get(name) != asked[name]]
        report = {**empty, "rows": kept["rows"], "original": kept["original"]}
    except CheckpointError as error:
        raise OutputError(f"{error} Choose another folder.") from None
    except DAMAGED as error:
        raise OutputError(f"{out / REPORT}: can't be read ({error!r:.100}); choose another folder.") from None
    if differ:
        raise OutputError(f"{out / REPORT}: rows of another comparison ({', '.join(differ)}); choose another folder.")
    return report


def _write(out: Path | None, report: Mapping[str, Any]) -> None:
    """Write the report so far, and its table."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_sealed(out / REPORT, report)
    (out / "leaderboard.md").write_text(markdown(report), encoding="utf-8")
