"""How a run goes on, apart from what it computes. Nothing here is part of a recipe, and nothing imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitrim.errors import RecipeError


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

    def __post_init__(self) -> None:
        """Refuse a seed that torch would not take, before anything is done with it.

        Raises:
            RecipeError: the seed is no integer of 32 bits.
        """
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed: is {self.seed!r:.80}; give an integer from 0 to {2**32 - 1}.")
