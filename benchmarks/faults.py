"""Faults and hostile files, many of each kind, and the table of docs/reliability.md. `make faults` runs it.

The files, the failing disk and the coverage-guided searches are those of faults.py, disk_faults.py and doors.py in
tests/support/, of which the ordinary tests try a few. Needs Linux, a C compiler, and atheris for the searches.
Every case is seeded; a case that is lost is printed, and is a bug.

    python benchmarks/faults.py [--files 60] [--runs 2000] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULT, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "reliability.md"
FILES = ("recipe", "vitrim.json", "edits of a plan", "config.json", "index of shards", "header of safetensors")
FILES += ("image", "tar shard", "elastic.json", "leaderboard.json")
FILES += ("image of any mode", "folder of images", "training checkpoint")
RESUMED = ("resumed compress", "resumed prune-checkpoint")
SEARCHES = tuple(f"coverage-guided {door}" for door in ("recipe", "plan", "config", "safetensors", "image"))
JOBS = ("compress", "resume", "prune-checkpoint", "slice", "export")
EVERY = {"disk full": 1, "killed": 1, "no permission": 5, "read-only": 5}  # of the changes that a run makes
START, END = "<!-- table of make faults -->\n", "<!-- end of it -->"


def table(result: dict[str, Any]) -> str:
    """What was tried and what came of it, in markdown."""
    rows = ["| Fault | Tried | Survived | Lost |", "|---|---:|---:|---:|"]
    rows += [
        f"| {row['fault']} | {row['tried']:,} | {row['tried'] - row['lost']:,} | {row['lost']} |"
        for row in result["rows"]
    ]
    return "\n".join(rows)


def hostile(count: int, *, kind: str, scene: Any) -> list[str]:
    """What went wrong with files of one kind."""
    outcomes = {seed: scene.try_(kind, seed) for seed in range(count)}
    return [f"{kind} {seed}: {found.said[-2000:]}" for seed, found in outcomes.items() if not found.survived]


def failing(job: str, fault: str, scene: Any) -> tuple[int, list[str]]:
    """How many changes of a job were made to fail, and what went wrong."""
    from tests.support.disk_faults import sweep

    found = sweep(job, scene, every={fault: EVERY[fault]})
    return len(found), [
        f"{job}, {fault} at change {each['change']}: {each['wrong']}" for each in found if each["wrong"]
    ]


def flipped(job: str, count: int, scene: Any) -> tuple[int, list[str]]:
    """How often a bit of a stopped run's files was flipped before it was gone on with, and what went wrong."""
    from tests.support.faults import in_child
    from tests.support.resumed import Job

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        stopped, wrong = Job(job, scene, Path(folder)), []
        for seed in range(count):

            def work(seed: int = seed) -> int:
                said = stopped.flipped(random.Random(seed))
                print(said or "", file=sys.stderr)
                return int(said is not None)

            found = in_child(work)
            wrong += [] if found.code == 0 else [f"{job} {seed}: {found.said[-2000:]}"]
    return count, wrong


def measure(names: list[str], count: int, runs: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Row after row, each kept as soon as it is there."""
    from tests.support.doors import search
    from tests.support.faults import Scene

    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(io.StringIO()):
            scene = Scene(Path(scratch))
        for kind in [kind for kind in FILES if kind in names]:
            keep(_row(f"mutated {kind}", lambda kind=kind: (count, hostile(count, kind=kind, scene=scene))))
        for name in [name for name in SEARCHES if name in names]:
            if importlib.util.find_spec("atheris") is None:
                print(f"{name}: left out, atheris is not installed; pip install 'vitrim[fuzz]'", flush=True)
                continue
            keep(_row(name, lambda name=name: search(name.split()[1], scene, runs=runs)))
        for name in [name for name in RESUMED if name in names]:
            title = f"{name}: a bit flipped"
            keep(_row(title, lambda name=name: flipped(name.removeprefix("resumed "), count, scene)))
        for job in [job for job in JOBS if job in names]:
            for fault in EVERY:
                how = "every change" if EVERY[fault] == 1 else f"one of {EVERY[fault]} changes"
                keep(_row(f"{job}: {fault} at {how}", lambda job=job, fault=fault: failing(job, fault, scene)))


def _row(fault: str, try_: Callable[[], tuple[int, list[str]]]) -> dict[str, Any]:
    started = time.monotonic()
    tried, wrong = try_()
    for line in wrong:
        print(line, flush=True)
    print(f"{fault}: {tried} tried, {len(wrong)} lost, {time.monotonic() - started:.0f} s", flush=True)
    return {"fault": fault, "tried": tried, "lost": len(wrong)}


def main() -> None:
    """Try everything, and write the result and its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=60, help="hostile files of each kind")
    parser.add_argument("--runs", type=int, default=2000, help="inputs of each coverage-guided search")
    rows_of = [*FILES, *SEARCHES, *RESUMED, *JOBS]
    parser.add_argument("--only", nargs="*", default=rows_of, choices=rows_of)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vitrim.output.provenance import environment

    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        given.result.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")

    measure(given.only, given.files, given.runs, keep)
    if given.result == RESULT:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}{table({'rows': rows})}\n{END}{rest.partition(END)[2]}")
    sys.exit(any(row["lost"] for row in rows))


if __name__ == "__main__":
    main()
