"""How a run goes on, apart from what it computes. Nothing here is part of a recipe, and nothing imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """How a run goes on: where its state is kept, whether it resumes, what it shows, on which device, from which seed.

    Attributes:
        work: folder for resumable state, logs and other files of the run; None keeps none.
        resume: continue from what an earlier run left in `work`; without it, that is discarded.
        quiet: show no progress.
        device: `auto`, or the name of a torch device.
        seed: of everything random; two runs with one seed are equal.
    """

    work: Path | None = None
    resume: bool = False
    quiet: bool = False
    device: str = "auto"
    seed: int = 0
