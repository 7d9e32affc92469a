"""Compress, disturb it at random, go on, and see whether anything is lost: for half an hour, on one and two processes.

A folder of digits, some files of it broken, is compressed with distillation behind the cut, each time with a command
line of its own. At a random moment the run is killed (all of it, or under torchrun one worker), stopped by Ctrl-C or
SIGTERM, or its disk is full from some change on; then it goes on with `--resume`, also with another number of
processes, until it is done. A run is lost if it ends in anything but its result, one line, or its death, or if weights
or plan differ from those of a run that was left alone: bit for bit, or to 1e-5 of the largest weight where two
processes took part. Linux alone; needs a C compiler.

    python benchmarks/soak.py                 # half an hour; writes docs/reliability.md
    python benchmarks/soak.py --minutes 2 --out soak.json
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from rows import ROOT, results
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- table: python benchmarks/soak.py -->\n", "<!-- end of table -->"
MODEL = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
RECIPE = """
mlp_ratio: 1
calibrate: {num_images: 64, batch_size: 16}
repair: {refit_steps: 40}
recover: {steps: 40, batch_size: 8, num_validations: 4, save_every: 3}
"""
DISTURBANCES = ("kill", "kill one worker", "Ctrl-C", "SIGTERM", "disk full")
SIGNALS = {
    "kill": signal.SIGKILL,
    "kill one worker": signal.SIGKILL,
    "Ctrl-C": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
}
SETTLED = (0, 2, 130)
TORCHRUN = (1, *SETTLED)  # torchrun ends with 1 for whatever ended a worker, with a trace of its own
PATIENCE = 300  # seconds that an undisturbed run may take
TWO_PROCESSES = 1e-5  # of the largest weight


@dataclass
class Soak:
    """A place to work in, what undisturbed runs gave, and what was counted."""

    root: Path
    draw: random.Random
    whole: dict[str, Any] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Write the images and the recipe, and take the runs that nothing disturbs."""
        from PIL import Image
        from sklearn.datasets import load_digits

        from tests.support.disk_faults import build_library

        build_library(self.root)
        (self.root / "images").mkdir()
        (self.root / "recipe.yaml").write_text(RECIPE)
        for number, digit in enumerate(load_digits().images[:160]):
            Image.fromarray((digit * 15).astype("uint8")).resize((32, 32)).save(
                self.root / "images" / f"{number:03}.png"
            )
        whole = (self.root / "images" / "000.png").read_bytes()
        broken = {
            "empty.png": b"",
            "cut.png": whole[: len(whole) // 2],
            "text.png": b"not an image",
            "nul.png": bytes(999),
        }
        for name, data in broken.items():
            (self.root / "images" / name).write_bytes(data)
        for processes in (1, 2):
            started, out = time.monotonic(), self.root / f"whole-{processes}"
            code, said = self.wait(self.start(out, processes), PATIENCE)
            if code:
                raise SystemExit(f"an undisturbed run on {processes} processes ended with {code}: {said[-2000:]}")
            self.seconds[processes] = time.monotonic() - started
        self.whole = weights_of(self.root / "whole-1")
        if (wrong := self.differs(self.root / "whole-2", two=True)) is not None:
            raise SystemExit(f"undisturbed, two processes differ from one: {wrong}")

    def start(self, out: Path, processes: int, **more: str) -> subprocess.Popen[bytes]:
        """Start a run, or go on with it, in a group of its own."""
        command = ["-m", "vitrim", "compress", MODEL, "--data", str(self.root / "images"), "--out", str(out)]
        command += ["--recipe", str(self.root / "recipe.yaml"), "--quiet", "--resume", "--device", "cpu"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        started = [sys.executable, *(torchrun if processes > 1 else []), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with (self.root / "said.txt").open("wb") as said:
            return subprocess.Popen(
                started, env={**environment, **more}, stdout=said, stderr=said, start_new_session=True
            )

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> tuple[int | None, str]:
        """Wait for a run and whatever it started; exit code (None: it hung, and was killed), and what it said."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return code, (self.root / "said.txt").read_text(errors="replace")

    def disturb(self, out: Path, processes: int, what: str) -> str | None:
        """Start a run and disturb it: what was wrong with how it ended, if anything."""
        more: dict[str, str] = {}
        if what == "disk full":
            where = {"FAULTS_BELOW": f"{self.root}/.{out.name}", "FAULTS_ERRNO": str(errno.ENOSPC)}
            more = {**where, "FAULTS_AT": str(self.draw.randint(1, 300)), "LD_PRELOAD": str(self.root / "faults.so")}
        process = self.start(out, processes, **more)
        if what != "disk full":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.draw.uniform(0.1, 1.0) * self.seconds[processes])
            struck = [process.pid, *children(process.pid)]
            victim = self.draw.choice(struck[1:] or struck) if what == "kill one worker" else process.pid
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if what == "kill" else os.kill)(victim, SIGNALS[what])
        code, said = self.wait(process, PATIENCE)
        killed = SIGNALS.get(what) is signal.SIGKILL and code in (-signal.SIGKILL, 1)
        if code is None:
            return f"hung after {what}: {said[-1000:]}"
        well = code in TORCHRUN if processes > 1 else code in SETTLED and "Traceback" not in said
        if not killed and not well:
            return f"ended with {code} after {what}: {said[-1000:]}"
        return None

    def round(self, number: int) -> str | None:
        """Disturb one job a few times, then let it end: what was wrong, if anything."""
        out, two, tale = self.root / f"out-{number}", False, []
        wanted = self.draw.choice((1, 2))
        for _ in range(self.draw.choice((1, 1, 2, 3))):
            processes = wanted if self.draw.random() < 0.8 else 3 - wanted
            what = self.draw.choice([each for each in DISTURBANCES if processes > 1 or each != "kill one worker"])
            self.counts[f"{what}, {processes}"] += 1
            tale.append(f"{what} on {processes}")
            two |= processes > 1
            if (wrong := self.disturb(out, processes, what)) is not None:
                return f"{', '.join(tale)}: {wrong}"
            if out.exists():
                break
        if not out.exists():
            code, said = self.wait(self.start(out, wanted), PATIENCE)
            two |= wanted > 1
            if code:
                return f"{', '.join(tale)}; can't go on ({code}): {said[-1000:]}"
        wrong = self.differs(out, two=two)
        left = [path.name for path in self.root.glob(f".out-{number}*")]
        wrong = wrong or (f"left {left}" if left else None)
        shutil.rmtree(out)
        return None if wrong is None else f"{', '.join(tale)}: {wrong}"

    def differs(self, out: Path, *, two: bool) -> str | None:
        """Say how an output differs from that of the undisturbed run."""
        found = weights_of(out)
        if found["plan"] != self.whole["plan"]:
            return "another plan"
        for name, whole in self.whole["weights"].items():
            most = float((found["weights"][name] - whole).abs().max())
            if most > (TWO_PROCESSES * float(whole.abs().max()) if two else 0.0):
                return f"{name} differs by {most:.3g}"
        return None


def weights_of(out: Path) -> dict[str, Any]:
    """Weights of an output, and what its plan keeps."""
    edits = json.loads((out / "vitrim.json").read_text())["plan"]["edits"]
    return {"weights": load_file(out / "model.safetensors"), "plan": [edit["keep"] for edit in edits]}


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def markdown(found: dict[str, Any]) -> str:
    """How often each disturbance was tried, on one and on two processes, and what was lost."""
    lines = ["| Disturbance | on 1 process | on 2 processes |", "|---|---:|---:|"]
    for what in DISTURBANCES:
        cells = [found["counts"].get(f"{what}, {processes}") for processes in (1, 2)]
        lines.append(f"| {what} | {' | '.join('-' if cell is None else str(cell) for cell in cells)} |")
    jobs, minutes, lost = found["jobs"], found["minutes"], len(found["lost"])
    return "\n".join([*lines, "", f"{jobs} jobs in {minutes:.0f} minutes, {lost} lost."])


def main() -> None:
    """Disturb jobs until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=results("soak"))
    asked = parser.parse_args()
    from vitrim.output.provenance import environment

    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder).resolve(), random.Random(asked.seed))
        soak.prepare()
        started, number = time.monotonic(), 0
        while (passed := (time.monotonic() - started) / 60) < asked.minutes:
            number += 1
            if (wrong := soak.round(number)) is not None:
                soak.lost.append(wrong)
                shutil.rmtree(soak.root / f"out-{number}", ignore_errors=True)
            print(f"{passed:.1f} min, job {number}: {wrong or 'as if nothing had been'}", flush=True)
        minutes = (time.monotonic() - started) / 60
    found = {"jobs": number, "minutes": minutes, "counts": dict(soak.counts), "lost": soak.lost, "seed": asked.seed}
    asked.out.write_text(json.dumps({**found, "environment": environment()}, indent=1) + "\n")
    print(markdown(found))
    if asked.out == results("soak"):
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}{markdown(found)}\n{END}{rest.partition(END)[2]}")
    sys.exit(bool(soak.lost))


if __name__ == "__main__":
    main()
