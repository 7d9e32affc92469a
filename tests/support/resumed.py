"""Stopped runs, and what comes of going on from them when a bit of what they left has flipped."""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import vitrim
from tests.support.faults import Scene
from vitrim.compression import selection
from vitrim.config.recipe import Recipe
from vitrim.errors import VitrimError
from vitrim.output.load import load
from vitrim.output.verify import Check, checking_with

FEW = {"calibrate": {"num_images": 12, "batch_size": 8}, "mlp_ratio": 1}
CUT = Recipe.parse({**FEW, "repair": {"refit_steps": 2}})
TRAINED = Recipe.parse(
    {
        **FEW,
        "repair": {"refit": False},
        "blockwise": {"num_images": 8, "batch_size": 4, "steps": 2},
        "recover": {"steps": 4, "batch_size": 4, "lr": 1e-5, "num_validations": 4, "cache_teacher": True},
    }
)
LEFT_ALONE = ("lock", "recovery.jsonl")  # nothing is read back from the lock; the log is for people


class Job:
    """A job in a place of its own, stopped in the middle once; every copy of what it left can be gone on from.

    Args:
        name: compress or prune-checkpoint.
        scene: where source and images are.
        root: an empty folder.
    """

    def __init__(self, name: str, scene: Scene, root: Path) -> None:
        self.name, self.scene, self.stopped = name, scene, root / "stopped"
        self.whole = self.result(self.run(root / "whole", resume=False))
        with contextlib.suppress(KeyboardInterrupt), _stopping():
            self.run(self.stopped, resume=False, on_validation=_stop_at_3)
        assert (self.stopped / ".out.partial").is_dir() and not (self.stopped / "out").exists()

    def run(self, place: Path, *, resume: bool, on_validation: Callable[[Any], None] | None = None) -> Path:
        """Run into `out` of a place, or go on there."""
        given = {"data": self.scene.root / "images", "out": place / "out", "resume": resume, "quiet": True}
        place.mkdir(exist_ok=True)
        with checking_with(_loads), _without_plots():
            if self.name == "compress":
                vitrim.compress(str(self.scene.source), recipe=TRAINED, on_validation=on_validation, **given)
            else:
                vitrim.prune_checkpoint(str(self.scene.source), recipe=CUT, **given)
        return place / "out"

    def result(self, out: Path) -> dict[str, bytes]:
        """The bytes of weights and plan."""
        return {name: (out / name).read_bytes() for name in ("model.safetensors", "vitrim.json")}

    def files(self) -> list[Path]:
        """What the stopped run left and may read back."""
        found = (path for path in sorted((self.stopped / ".out.partial").rglob("*")) if path.is_file())
        return [path for path in found if path.stat().st_size and not path.name.endswith(LEFT_ALONE)]

    def flipped(self, rng: random.Random, file: Path | None = None) -> str | None:
        """Flip a bit of a file, go on, and return what is wrong with that: None for the same result or one line."""
        file = file or rng.choice(self.files())
        with tempfile.TemporaryDirectory(dir=self.stopped.parent) as scratch:
            place = Path(shutil.copytree(self.stopped, Path(scratch) / "place"))
            path = place / file.relative_to(self.stopped)
            data = bytearray(path.read_bytes())
            at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 400))
            data[at] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            said = f"{path.name}, byte {at} of {len(data)}: "
            try:
                found = self.result(self.run(place, resume=True))
            except VitrimError as error:
                return None if path.name in str(error) else f"{said}refused without its name: {error}"
            except Exception as error:
                return f"{said}{type(error).__name__}: {error}"
            return None if found == self.whole else f"{said}another result"


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Stop a job file to file in the middle of its second MLP."""
    write, calls = selection.Journal.add, []

    def add(self: Any, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, *given)

    selection.Journal.add = add  # type: ignore[method-assign]
    try:
        yield
    finally:
        selection.Journal.add = write  # type: ignore[method-assign]


def _stop_at_3(found: Any) -> None:
    if found.step == 3:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _without_plots() -> Iterator[None]:
    """Leave out what takes time; the tests of this process that come later see their pages."""
    import vitrim.report.page

    write = vitrim.report.page.write_report
    vitrim.report.page.write_report = lambda path, *_: path.write_text("the page")
    try:
        yield
    finally:
        vitrim.report.page.write_report = write


def _loads(check: Check) -> float:
    """The check in a fresh process, but in this one and of nothing more than that the output loads."""
    load(check.folder)
    return 0.0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "scene").mkdir()
        job = Job(sys.argv[1], Scene(Path(scratch) / "scene"), Path(scratch))
        print([str(path.relative_to(job.stopped)) for path in job.files()])
        for seed in range(int(sys.argv[2])):
            print(seed, job.flipped(random.Random(seed)), flush=True)
