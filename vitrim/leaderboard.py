"""The leaderboard: every method at the same size, on the same images, with the same recovery, one row after another.

A row is one run of `compress`. Which width brings a method to the common size is found by trying: no method is known
here by name, so one that is registered is in. Those that select units have two rows, as they are and under our repair,
so that selection and repair are judged apart. Rows are kept as they are made, and a failed one stops no other.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.compression.pipeline import compress
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs, num_parameters
from vitrim.data import ImageStream, first_images
from vitrim.data.inputs import open_inputs
from vitrim.distributed.devices import resolve_device
from vitrim.errors import DAMAGED, Interrupted, OutputError, RecipeError
from vitrim.methods import METHODS, SiteMethod, find_method
from vitrim.models.origin import Origin
from vitrim.models.sites import find_mlps, resolve_scope
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.output.save import save
from vitrim.progress import progress
from vitrim.report.leaderboard import markdown, verdict
from vitrim.storage.documents import write_json
from vitrim.surgery import KeepUnits, Plan, apply_
from vitrim.types import MlpSite

Unit = Literal["params", "macs"]
FORMAT, REPORT = "vitrim-leaderboard/1", "leaderboard.json"
SHARED = {"calibrate", "repair", "blockwise", "recover", "scope", "round_to"}  # what rows take of a recipe
NUM_TRIAL_IMAGES = 32
SMALLEST, TOLERANCE, MAX_TRIALS = 0.05, 0.01, 6  # of keep_ratio, and of a share of the model


def leaderboard(
    model: nn.Module | str | None = None,
    *,
    data: Any = "digits",
    methods: Sequence[str] = (),
    budget: float = 0.5,
    budget_in: Unit = "params",
    recover_steps: int = 0,
    recipe: Recipe | None = None,
    baselines: Sequence[str] = ("random", "magnitude"),
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run methods at one size and compare them.

    Args:
        model: as for `compress`; None is the digits ViT that comes with vitrim.
        data: images, as for `compress`; with labels and a head, top-1 is measured, too.
        methods: names; none for all that are registered.
        budget: share of the model's parameters or MACs that stays, 0..1.
        budget_in: what the share is of. A method that can't save it is run at the same share of MACs, or else at that
            keep_ratio, and its row says so.
        recover_steps: distillation steps for every row; 0 for none.
        recipe: calibration, repair, recovery, scope and rounding of every row, in place of the defaults.
        baselines: methods that the others are told to have lost to, where they have.
        out: folder for `leaderboard.json` and `leaderboard.md`; rows that it has already are kept, but for failed ones.
        seed: of every row.
        device: `auto`, or a torch device.
        quiet: show no progress.

    Returns:
        What stands in `leaderboard.json`.

    Raises:
        RecipeError: a method is unknown, or the budget is not a share.
        OutputError: `out` holds rows of another comparison.
    """
    if not 0 < budget < 1:
        raise RecipeError(f"budget: {budget:g} is no share of the model; use a number between 0 and 1.")
    names = [find_method(name).name for name in methods or METHODS]
    model = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}" if model is None else model
    given = {"recover": {"steps": recover_steps} if recover_steps else None, "seed": seed or None, "device": device}
    shared = (recipe or Recipe()).model_dump(exclude_unset=True, include=SHARED)
    base = Recipe.parse(shared).updated(given)
    asked = {
        "model": model if isinstance(model, str) else type(model).__name__,
        "data": str(data) if isinstance(data, str | Path) else type(data).__name__,
        "budget": budget,
        "budget_in": budget_in,
        "baselines": list(baselines),
        "recipe": base.model_dump(mode="json", include={*SHARED, "seed"}),
    }
    report = _opened(out, asked)
    runner = _Runner.of(model, data, base, budget, budget_in)
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


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What a cut left of a model, as shares; `repairable`: it cut hidden units and brought no tensors along."""

    shares: Mapping[Unit, float]
    repairable: bool


@dataclass(kw_only=True)
class _Runner:
    """What every row shares: the model, the images, the recipe, and a teacher to try cuts on."""

    model: nn.Module | str
    data: Any
    base: Recipe
    budget: float
    unit: Unit
    origin: Origin
    teacher: nn.Module
    sites: Sequence[MlpSite]
    images_BCHW: Tensor
    original: dict[str, Any] | None = None
    tried: dict[tuple[str, float], _Trial] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module | str, data: Any, base: Recipe, budget: float, unit: Unit) -> _Runner:
        """Open the model and a few images."""
        whole, origin = open_model(model)
        encoder, scope = resolve_scope(whole, base.scope, origin.encoder)
        teacher = copy.deepcopy(whole.get_submodule(encoder)).to(resolve_device(base.device)).float().eval()
        source = open_inputs(data, replace(origin, encoder=encoder))
        if isinstance(source, ImageStream):
            source = source.take(NUM_TRIAL_IMAGES, seed=base.seed)[0]
        batches, _ = first_images(source, NUM_TRIAL_IMAGES, seed=base.seed, batch_size=NUM_TRIAL_IMAGES)
        sites = find_mlps(teacher, scope=scope.removeprefix(encoder).removeprefix("."))
        return cls(
            model=model,
            data=data,
            base=base,
            budget=budget,
            unit=unit,
            origin=origin,
            teacher=teacher,
            sites=sites,
            images_BCHW=batches[0],
        )

    def rows(self, name: str, kept: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of a method: those that are there already, and new ones, each when it is done."""
        known = {row["repair"]: row for row in kept}
        try:
            fitted = kept[0]["fitted"] if kept else self.fit(name)
        except Exception as error:  # whatever it is, the other methods shall run
            yield _failed(name, "none", error)
            return
        for repair in ("none", "ours") if fitted["repairable"] else ("none",):
            yield known.get(repair) or self.row(name, repair, fitted)

    def row(self, name: str, repair: str, fitted: dict[str, Any]) -> dict[str, Any]:
        """One run of `compress`, or what it failed with."""
        recipe = self.base.updated(
            {"method": name, "keep_ratio": fitted["keep_ratio"], "repair": {} if repair == "ours" else False}
        )
        try:
            found = compress(self.model, data=self.data, recipe=recipe, quiet=True)
            metrics = found.metrics
            if self.original is None:
                whole, _ = open_model(self.model)
                uncut = _size_on_disk(whole, self.origin, Plan(edits=(), method="none"))
                self.original = {**_costs(metrics["before"]), "bytes": uncut, "top1": metrics["before"].get("top1")}
            size = _size_on_disk(found.model, self.origin, found.plan)
        except Interrupted:
            raise
        except Exception as error:  # whatever it is, the other rows shall run
            return _failed(name, repair, error, fitted)
        return {
            "method": name,
            "repair": repair,
            "error": None,
            "fitted": fitted,
            **_costs(metrics["after"]),
            "speedup": _speedup(metrics["before"]["latency"], metrics["after"]["latency"]),
            "bytes": size,
            "after_cut": _quality(metrics["after_cut"]),
            "after_recovery": metrics["after_recovery"] and _quality(metrics["after_recovery"]),
            "seconds": metrics["seconds"],
            "notes": metrics["notes"],
        }

    def fit(self, name: str) -> dict[str, Any]:
        """The keep_ratio at which a method leaves the budget's share, by trying cuts on a few images."""
        units: list[Unit] = [self.unit] if self.unit == "macs" else ["params", "macs"]
        met = ((ratio, unit) for unit in units if (ratio := self._meet(name, unit)) is not None)
        ratio, counted = next(met, (self.budget, None))
        return {"keep_ratio": ratio, "counted": counted, "repairable": self._try(name, ratio).repairable}

    def _meet(self, name: str, unit: Unit) -> float | None:
        """The largest keep_ratio found at which at most the budget stays; None where no width saves that much."""
        low, high = (SMALLEST, self._try(name, SMALLEST).shares[unit]), (1.0, 1.0)
        if low[1] > self.budget:
            return None
        for number in range(MAX_TRIALS):
            if low[1] >= self.budget - TOLERANCE:
                break
            slope = (high[0] - low[0]) / max(high[1] - low[1], 1e-9)
            straight = low[0] + slope * (self.budget - TOLERANCE / 2 - low[1])
            # Where sizes come in steps, such as experts, a straight line may stand still: every other trial halves.
            ratio = (low[0] + high[0]) / 2 if number % 2 else straight
            share = self._try(name, ratio).shares[unit]
            low, high = (low, (ratio, share)) if share > self.budget else ((ratio, share), high)
        return low[0]

    def _try(self, name: str, keep_ratio: float) -> _Trial:
        """A cut on a few images, or for a method that is asked MLP by MLP, one to its widths alone."""
        if (name, keep_ratio) not in self.tried:
            student, method = copy.deepcopy(self.teacher), find_method(name)
            recipe = self.base.updated({"method": name, "keep_ratio": keep_ratio, "repair": False})
            if not issubclass(method, SiteMethod):
                cut = cut_(student, self.teacher, self.sites, recipe, [self.images_BCHW], quiet=True)
                edits = cut.plan.edits
            else:
                edits = [KeepUnits(site=site, keep=tuple(range(recipe.width_of(site)))) for site in self.sites]
                apply_(student, edits)
            one = self.images_BCHW[:1]
            shares: dict[Unit, float] = {
                "params": num_parameters(student) / num_parameters(self.teacher),
                "macs": count_macs(student, one) / count_macs(self.teacher, one),
            }
            repairable = any(isinstance(edit, KeepUnits) and not edit.tensors for edit in edits)
            self.tried[name, keep_ratio] = _Trial(shares=shares, repairable=repairable)
        return self.tried[name, keep_ratio]


def _costs(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and times of one model."""
    latency = {str(size): found["median_ms"] for size, found in measured["latency"].items()}
    return {"parameters": measured["parameters"], "macs": measured["macs"], "latency_ms": latency}


def _speedup(before: Mapping[int, Any], after: Mapping[int, Any]) -> dict[str, float]:
    """How many times as fast as the original, by batch size: the two were timed in one run, one after the other."""
    return {str(size): before[size]["median_ms"] / after[size]["median_ms"] for size in after}


def _quality(judged: Mapping[str, Any]) -> dict[str, Any]:
    """How good a student is on the held-out images."""
    found = judged["fidelity"]
    return {
        "relative_error": found["relative_error"],
        "cosine": found["cosine"],
        "top1": judged.get("top1"),
    }


def _failed(name: str, repair: str, error: Exception, fitted: dict[str, Any] | None = None) -> dict[str, Any]:
    """The row of a run that did not come to its end."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return {"method": name, "repair": repair, "error": line, "fitted": fitted}


def _size_on_disk(model: nn.Module, origin: Origin, plan: Plan) -> int:
    """Bytes of a model's weights file."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), model, origin=origin, plan=plan)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def _opened(out: Path | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The report that is to be gone on with, or an empty one.

    Raises:
        OutputError: what stands there is of another comparison, or damaged.
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
        kept = json.loads((out / REPORT).read_text())
        differ = [name for name in asked if kept["asked"].get(name) != asked[name]]
        report = {**empty, "rows": kept["rows"], "original": kept["original"]}
    except DAMAGED as error:
        raise OutputError(f"{out / REPORT}: can't be read ({error!r:.100}); choose another folder.") from None
    if differ:
        raise OutputError(f"{out / REPORT}: rows of another comparison ({', '.join(differ)}); choose another folder.")
    return report


def _write(out: Path | None, report: Mapping[str, Any]) -> None:
    """The report so far, and its table."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{REPORT}.new", report)
    (out / f"{REPORT}.new").replace(out / REPORT)
    (out / "leaderboard.md").write_text(markdown(report))
