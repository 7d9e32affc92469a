"""Which of several allocations is the best is judged by whole cuts, with all the repair that is asked for.

What was foreseen from each MLP alone leaves out what feedback and refit make good, so a gain that is foreseen can be
gone behind them. The judges are those calibration images that no fit has seen; the held-out images judge the result
alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from vitrim.calibrate import num_held_out
from vitrim.compression.allocate import EQUAL, FOUND, HALFWAY, Allocation
from vitrim.compression.curves import WORST, Measured
from vitrim.compression.cut import CutReport, cut_
from vitrim.config.recipe import Recipe
from vitrim.data import Split
from vitrim.metrics.fidelity import fidelity
from vitrim.metrics.judging import Judged, features_on_cpu, relative_error
from vitrim.storage.hashes import tensor_sha256
from vitrim.types import MlpSite

IN_WORDS = {EQUAL: "equal widths", HALFWAY: "halfway to those found", FOUND: "those found"}


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The widths that were kept, by path, how they were found, and the cut to them if a trial has just made it."""

    units: Mapping[str, int]
    about: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    cut: CutReport | None = None


@dataclass(kw_only=True)
class Trials:
    """Whole cuts of one model to widths that are tried, each judged and forgotten but for the best.

    `measured` keeps the errors, so that a run that is taken up again does not cut anew. `cuts` holds, by name, the cut
    to equal widths and the best of the others, as far as they were made here.
    """

    recipe: Recipe
    teacher: nn.Module
    sites: Sequence[MlpSite]
    split: Split
    measured: Measured
    quiet: bool = False
    cuts: dict[str, CutReport] = field(default_factory=dict)
    least: float = float("inf")

    @cached_property
    def judged(self) -> Judged:
        """The calibration images that are in no fit, with the teacher's features."""
        batches = self.split.calibration
        few = batches[-max(1, num_held_out(batches)) :]
        return [(images, features_on_cpu(self.teacher, images, "final")) for images in few]

    @property
    def num_judged(self) -> int:
        """Number of these images."""
        return sum(len(images) for images, _ in self.judged)

    @cached_property
    def made_by(self) -> str:
        """A digest of what an error depends on beside the widths and what `measured` is already kept by."""
        steps = [step.model_dump(mode="json", exclude={"allocate"}) for step in self.recipe.steps]
        digest = hashlib.sha256(json.dumps(steps, sort_keys=True).encode())
        for batch in self.split.held_out:
            digest.update(tensor_sha256(batch.images_BCHW).encode())
        return digest.hexdigest()

    def errors(self, name: str, units: Mapping[str, int]) -> Mapping[str, float]:
        """Return the errors behind a cut to these widths: of the `judged` images, and of `held_out` ones if any."""
        key = hashlib.sha256(json.dumps([self.made_by, sorted(units.items())]).encode()).hexdigest()
        if key not in self.measured.trials:
            self.measured.trials[key] = self._cut(name, units)
            self.measured.save()
        return self.measured.trials[key]

    def _cut(self, name: str, units: Mapping[str, int]) -> dict[str, float]:
        student, held_out, batches = copy.deepcopy(self.teacher), self.split.held_out, self.split.calibration
        given = {"widths": units, "quiet": self.quiet, "halves": True}
        report = cut_(student, self.teacher, self.sites, self.recipe, batches, **given)
        found = {"judged": min(WORST, relative_error(student, self.judged, "final"))}
        if held_out:
            found["held_out"] = fidelity(student, self.teacher, held_out)["relative_error"]
        if name == EQUAL:
            self.cuts[EQUAL] = report
        elif found["judged"] < self.least:
            self.least = found["judged"]
            self.cuts = {each: cut for each, cut in self.cuts.items() if each == EQUAL} | {name: report}
        return found


def settle(
    found: Allocation,
    recipe: Recipe,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    split: Split,
    *,
    least_gain: float,
    quiet: bool = False,
) -> Settled:
    """Cut to each of the candidates, and keep the widths with which the error is the smallest.

    Args:
        found: the candidates; a single one is kept untried.
        recipe: the user's recipe.
        teacher: the uncut model.
        sites: the MLPs.
        split: calibration and held-out images.
        least_gain: share of equal widths' error that others have to save, or equal ones are kept.
        quiet: show no progress.
    """
    if len(found.candidates) == 1:
        equal = found.candidates[EQUAL]
        return Settled(units=equal, about={**found.about, "kept": EQUAL, "sizes": equal}, notes=found.notes)
    given = {"recipe": recipe, "teacher": teacher, "sites": sites, "split": split}
    trials = Trials(**given, measured=found.measured, quiet=quiet)
    tried = {name: trials.errors(name, units) for name, units in found.candidates.items()}
    kept = best_of({name: errors["judged"] for name, errors in tried.items()}, least_gain)
    said = ", ".join(f"{IN_WORDS[name]} {errors['judged']:.4g}" for name, errors in tried.items())
    why = "" if kept != EQUAL else "; others save too little" if least_gain else "; no others do better"
    note = (
        f"allocate: relative error after the cut on {trials.num_judged:,} calibration images that were not fitted: "
        f"{said}; kept {IN_WORDS[kept]}{why}."
    )
    return Settled(
        units=found.candidates[kept],
        about={**found.about, "tried": tried, "kept": kept, "sizes": found.candidates[kept]},
        notes=(*found.notes, note),
        cut=trials.cuts.get(kept) if len(recipe.steps) == 1 else None,  # later steps may train, on other images
    )


def best_of(errors: Mapping[str, float], least_gain: float) -> str:
    """Return the name of the smallest error, or of equal widths' where that saves less than a share of it."""
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < (1 - least_gain) * errors[EQUAL] else EQUAL
