"""How a run goes on, as opposed to what it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """How a run goes on: where its state is kept, whether it resumes, what it shows, on which device and seed."""

    work: Path | None = None
    """Folder for what a stopped run needs to go on; None keeps nothing."""
    resume: bool = False
    """Go on from what an earlier run left in `work`."""
    quiet: bool = False
    """Show no progress."""
    device: str = "auto"
    """`auto`, or a torch device."""
    seed: int = 0
    """Makes two runs equal."""
