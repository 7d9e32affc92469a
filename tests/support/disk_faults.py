"""Runs vitrim on a disk that fails at its n-th change, for n after n, and says what came of it: one JSON line a trial.

Started by tests/test_faults.py and benchmarks/faults.py through `sweep`, with the library made of faults.c preloaded;
each trial is a fork of this process. What takes time and writes nothing is left out of the runs: latencies, plots, and
the check in a fresh process, in place of which the output is loaded here. Not covered: power cuts.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.faults import Outcome, Scene, in_child
from tests.support.processes import environment
from vitrim.output.load import load
from vitrim.output.stage import has_state
from vitrim.output.verify import Check, checking_with

KILL = 0
# errno (0: SIGKILL), and whether every later change fails, too.
FAULTS = {
    "disk full": (errno.ENOSPC, 1),
    "no permission": (errno.EACCES, 0),
    "read-only": (errno.EROFS, 1),
    "killed": (KILL, 0),
}
RECIPE = "calibrate: {num_images: 12, batch_size: 8}\nmlp_ratio: 1\nrepair: {refit: false}\n"
RECOVER = "recover: {steps: 2, batch_size: 4, lr: 1.0e-5, num_validations: 1}\n"


def build_library(folder: Path) -> Path:
    """The library to preload, compiled."""
    library, source = folder / "faults.so", Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def _first(folder: Path, variable: str) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get(variable))))


def sweep(job: str, scene: Scene, *, every: dict[str, int]) -> list[dict[str, Any]]:
    """Try faults, each at every n-th change of a job; for each trial what was wrong (None: nothing) and where."""
    with tempfile.TemporaryDirectory() as scratch:
        library = build_library(Path(scratch))  # preloaded by its name: a list of paths is split at spaces
        preloaded = environment(LD_PRELOAD=library.name, LD_LIBRARY_PATH=_first(library.parent, "LD_LIBRARY_PATH"))
        faults = [f"{fault}={number}" for fault, number in every.items()]
        command = [sys.executable, "-m", "tests.support.disk_faults", job, str(scene.root), *faults]
        done = subprocess.run(command, env=preloaded, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


class Bench:
    """One job on copies of one place: beside its output lie its source and an output that was there before."""

    def __init__(self, job: str, scene: Scene, root: Path) -> None:
        self.job, self.scene, self.here = job, scene, root / "start"
        self.out = "out.pt2" if job == "export" else "out"
        self.library: Any = ctypes.CDLL(None)
        self.library.faults_calls.restype = ctypes.c_long
        _leave_out_what_takes_time()
        self.here.mkdir()
        shutil.copytree(self.scene.output, self.here / "previous")
        (self.here / "recipe.yaml").write_text(RECIPE + (RECOVER if job == "resume" else ""))
        if job == "resume":
            self._stop()
        whole = self._copy(root / "whole")
        with contextlib.redirect_stdout(sys.stderr):
            assert self.run(whole) == 0  # in this process, so that its forks find everything imported
        self.whole = self._weights(whole)
        assert not [path for path in whole.iterdir() if path.name.startswith(".")]

    def _stop(self) -> None:
        """Leave what a run leaves that was killed when its output was to get its final name."""

        def work() -> int:
            Path.rename = lambda *_: os._exit(9)  # type: ignore[method-assign, assignment, return-value]
            return self.run(self.here, resume=False)

        assert in_child(work).code == 9 and (self.here / ".out.partial" / "cut.json").exists()

    def _copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.here, to, symlinks=True))

    def command(self, place: Path, *, resume: bool) -> list[str]:
        """The command line of the job."""
        out, recipe = str(place / self.out), ["--recipe", str(place / "recipe.yaml"), "--quiet"]
        going_on = ["--resume"] if resume else []
        if self.job == "slice":
            return ["slice", str(place / "previous"), "--mlp-ratio", "0.5", "--out", out]
        if self.job == "export":
            return ["export", str(place / "previous"), "--to", "torch", "--out", out]
        source = str(self.scene.source)
        if self.job == "prune-checkpoint":
            return ["prune-checkpoint", source, out, *recipe, *going_on]
        return ["compress", source, "--data", str(self.scene.root / "images"), "--out", out, *recipe, *going_on]

    def run(self, place: Path, *, resume: bool | None = None) -> int:
        """Run the job as the command line does."""
        from vitrim.cli.app import run

        return run(self.command(place, resume=self.job == "resume" if resume is None else resume))

    def trial(self, number: int, fault: str, root: Path) -> tuple[str | None, bool]:
        """Let a change fail: what is wrong with what is left (None: nothing), and whether it got that far."""
        error, lasting = FAULTS[fault]
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            place = self._copy(Path(scratch) / "place")
            counted = Path(scratch) / "calls"

            def work() -> int:
                self.library.faults_arm(os.fsencode(f"{place}/"), number, error, lasting)
                code = self.run(place)
                struck = self.library.faults_calls() >= number
                self.library.faults_arm(b"", 0, 0, 0)
                counted.write_text(str(int(struck)))
                return code

            outcome = in_child(work)
            struck = not counted.exists() or counted.read_text() == "1"
            killed = struck and error == KILL
            return self._judge(place, outcome, killed=killed, again=killed or number % 5 == 1), struck

    def _judge(self, place: Path, outcome: Outcome, *, killed: bool, again: bool) -> str | None:
        """What is wrong after a fault, and after one more run, without a fault."""
        if not (outcome.code == -9 if killed else outcome.survived):
            return f"ended with {outcome.code}: {outcome.said[-600:]}"
        if (wrong := self._left(place)) is not None:
            return wrong
        done = os.path.lexists(place / self.out)
        if outcome.code == 0 and not done:
            return "says that it is done, and there is no output"
        if not killed and not done and self.job in ("slice", "export") and (extra := self._extra(place)):
            return f"left {extra}"
        if done or not again:
            return None
        state = has_state(place / ".out.partial")
        second = in_child(lambda: self.run(place, resume=killed or state or None))
        if second.code != 0:
            return f"can't be run again: {second.said[-600:]}"
        return self._left(place) or (None if os.path.lexists(place / self.out) else "no output after a second run")

    def _extra(self, place: Path) -> list[str]:
        known = {path.name for path in self.here.iterdir()} | {self.out}
        return sorted(path.name for path in place.iterdir() if path.name not in known)

    def _left(self, place: Path) -> str | None:
        """What is wrong with the files: an output is whole or not there, and all others are as they were."""
        if os.path.lexists(place / self.out) and self._weights(place) != self.whole:
            return "an output that is not whole"
        for file in (self.here / "previous").rglob("*"):
            if file.is_file() and (place / file.relative_to(self.here)).read_bytes() != file.read_bytes():
                return f"changed {file.name} of an earlier output"
        return None

    def _weights(self, place: Path) -> dict[str, Any]:
        """An output's weights and plan by their bytes, and the names of its files; of an exported file its size."""
        out = place / self.out
        if not out.is_dir():
            return {"size": out.stat().st_size}
        files = [file for file in (out / "model.safetensors", out / "vitrim.json") if file.exists()]
        kept = {file.name: file.read_bytes() for file in files}
        return {**kept, "files": sorted(str(path.relative_to(out)) for path in out.rglob("*"))}


def _leave_out_what_takes_time() -> None:
    """Timing and plots."""
    import vitrim.evaluation
    import vitrim.output.export
    import vitrim.report.page

    def latency(models: Any, *_: Any, batch_sizes: Any = (1,), **__: Any) -> list[dict[int, dict[str, Any]]]:
        row = {"median_ms": 1.0, "iqr_ms": 0.0, "ratio": 1.0, "ratio_quartiles": (1.0, 1.0)}
        return [dict.fromkeys(batch_sizes, row) for _ in models]

    vitrim.output.export.measure_latency = vitrim.evaluation.measure_latency = latency
    vitrim.report.page.write_report = lambda path, *_: path.write_text("the page")


def loads(check: Check) -> float:
    """The check in a fresh process, but in this one and of nothing more than that the output loads."""
    load(check.folder)
    return 0.0


def trials(bench: Bench, fault: str, root: Path, *, every: int) -> Iterator[dict[str, Any]]:
    """Trial after trial, until a run does not come to the change that was to fail."""
    number, struck = 1, True
    while struck:
        wrong, struck = bench.trial(number, fault, root)
        if struck:
            yield {"job": bench.job, "fault": fault, "change": number, "wrong": wrong}
        number += every


def main() -> None:
    """One job and its faults, as the arguments say."""
    job, scene, *faults = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch, checking_with(loads):
        bench = Bench(job, Scene(Path(scene)), Path(scratch))
        for fault, every in (given.split("=") for given in faults):
            for found in trials(bench, fault, Path(scratch), every=int(every)):
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
