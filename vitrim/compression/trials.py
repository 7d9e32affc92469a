"""Which of several allocations is the best is judged by whole cuts, with all the repair that is asked for.

What was foreseen from each MLP alone leaves out what feedback and refit make good, so a gain that is foreseen can be
gone behind them. The judges are those calibration images that no fit has seen; the held-out images judge the result
alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from torch import nn

from vitrim.compression.allocate import EQUAL, FOUND, HALFWAY, LEAST_GAIN, Allocation
from vitrim.compression.curves import WORST, Measured
from vitrim.compression.cut import CutReport, cut_
from vitrim.compression.depth import Candidate, Shallower
from vitrim.compression.judging import choosing_images
from vitrim.config.recipe import Recipe
from vitrim.data import Split
from vitrim.inputs import numbers
from vitrim.metrics.fidelity import fidelity
from vitrim.metrics.judging import Judged, features_on_cpu, relative_error
from vitrim.storage.hashes import tensor_sha256
from vitrim.surgery import DropBlocks
from vitrim.types import MlpSite

IN_WORDS = {EQUAL: "equal widths", HALFWAY: "halfway to those found", FOUND: "those found"}


def in_words(name: str) -> str:
    """Return what a candidate is, for people: the last part of a name may say how many blocks are taken out."""
    kind, _, number = name.partition("-")
    return IN_WORDS[kind] + (f" without {number} block{'s' if number != '1' else ''}" if number else "")


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The widths that were kept, by path, how they were found, and the cut to them if a trial has just made it.

    `run` are blocks that are taken out; paths are those without them.
    """

    units: Mapping[str, int]
    run: DropBlocks | None = None
    about: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    cut: CutReport | None = None


@dataclass(kw_only=True)
class Trials:
    """Whole cuts of one model to widths that are tried, each judged and forgotten but for the best.

    `measured` keeps the errors, so that a run that is taken up again does not cut anew. `cuts` holds, by name, the best
    cut that a library can say and the best of the others, as far as they were made here, each with its error and name.
    """

    recipe: Recipe
    teacher: nn.Module
    sites: Sequence[MlpSite]
    split: Split
    measured: Measured
    quiet: bool = False
    cuts: dict[bool, tuple[float, str, CutReport]] = field(default_factory=dict)

    @cached_property
    def judged(self) -> Judged:
        """The calibration images that are in no fit, with the teacher's features."""
        return [(images, features_on_cpu(self.teacher, images, "final")) for images in choosing_images(self.split)]

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
            digest.update(tensor_sha256(numbers(batch.images_BCHW)).encode())
        return digest.hexdigest()

    def errors(self, name: str, tried: Candidate) -> Mapping[str, float]:
        """Return the errors behind a cut: of the `judged` images, and of `held_out` ones if any."""
        gone = [] if tried.run is None else [tried.run.run.path, tried.run.run.start, tried.num_gone]
        about = [self.made_by, sorted(tried.units.items()), *gone]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        if key not in self.measured.trials:
            self.measured.trials[key] = self._cut(name, tried)
            self.measured.save()
        return self.measured.trials[key]

    def _cut(self, name: str, tried: Candidate) -> dict[str, float]:
        student, held_out, batches = copy.deepcopy(self.teacher), self.split.held_out, self.split.calibration
        given = {"widths": tried.units, "run": tried.run, "quiet": self.quiet, "halves": True}
        report = cut_(student, self.teacher, self.sites, self.recipe, batches, **given)
        found = {"judged": min(WORST, relative_error(student, self.judged, "final"))}
        if held_out:
            found["held_out"] = fidelity(student, self.teacher, held_out)["relative_error"]
        if tried.stock not in self.cuts or found["judged"] < self.cuts[tried.stock][0]:
            self.cuts[tried.stock] = (found["judged"], name, report)
        return found

    def cut_of(self, name: str) -> CutReport | None:
        """Return the cut of this name, None if it was not made here or was forgotten."""
        return next((report for _, kept, report in self.cuts.values() if kept == name), None)


def settle(
    found: Allocation,
    recipe: Recipe,
    teacher: nn.Module,
    sites: Sequence[MlpSite],
    split: Split,
    *,
    least_gain: float,
    shallower: Shallower | None = None,
    quiet: bool = False,
) -> Settled:
    """Cut to each of the candidates, and keep the one with which the error is the smallest.

    Args:
        found: the candidates with all blocks; a single one is kept untried if there are no others.
        recipe: the user's recipe.
        teacher: the uncut model.
        sites: the MLPs.
        split: calibration and held-out images.
        least_gain: share of equal widths' error that others have to save, or equal ones are kept.
        shallower: candidates with fewer blocks, None for none.
        quiet: show no progress.
    """
    full = {n: Candidate(units=units, stock=n == EQUAL and least_gain > 0) for n, units in found.candidates.items()}
    if len(full) == 1 and shallower is None:
        equal = found.candidates[EQUAL]
        return Settled(units=equal, about={**found.about, "kept": EQUAL, "sizes": equal}, notes=found.notes)
    given = {"recipe": recipe, "teacher": teacher, "sites": sites, "split": split}
    trials = Trials(**given, measured=found.measured, quiet=quiet)
    every, tried = _until_worse(trials, chain([full], () if shallower is None else shallower.each()))
    simple = [name for name, candidate in every.items() if candidate.stock]
    gain = LEAST_GAIN if simple else 0.0
    kept = best_of({name: errors["judged"] for name, errors in tried.items()}, gain, simple or [EQUAL])
    said = ", ".join(f"{in_words(name)} {errors['judged']:.4g}" for name, errors in tried.items())
    why = "" if kept not in (simple or [EQUAL]) else "; others save too little" if simple else "; no others do better"
    note = (
        f"allocate: relative error after the cut on {trials.num_judged:,} calibration images that were not fitted: "
        f"{said}; kept {in_words(kept)}{why}."
    )
    chosen = every[kept]
    return Settled(
        units=chosen.units,
        run=chosen.run,
        about={**found.about, "tried": tried, "kept": kept, "sizes": chosen.units, "blocks_out": chosen.num_gone},
        notes=(*found.notes, note),
        cut=trials.cut_of(kept) if len(recipe.steps) == 1 else None,  # later steps may train, on other images
    )


def _until_worse(
    trials: Trials, groups: Iterable[Mapping[str, Candidate]]
) -> tuple[dict[str, Candidate], dict[str, Mapping[str, float]]]:
    """Try groups of candidates until the best of one is no better than that of the group before; return all tried."""
    every: dict[str, Candidate] = {}
    tried: dict[str, Mapping[str, float]] = {}
    least = float("inf")
    for group in groups:
        errors = {name: trials.errors(name, candidate) for name, candidate in group.items()}
        every, tried = {**every, **group}, {**tried, **errors}
        best = min(each["judged"] for each in errors.values())
        if best >= least:
            break
        least = best
    return every, tried


def best_of(errors: Mapping[str, float], least_gain: float, simple: Sequence[str] = (EQUAL,)) -> str:
    """Return the name of the smallest error, or of the smallest of `simple` ones where that saves too little of it."""
    best, plain = min(errors, key=errors.__getitem__), min(simple, key=errors.__getitem__)
    return best if errors[best] < (1 - least_gain) * errors[plain] else plain
