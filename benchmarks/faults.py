"""Faults and hostile files, many of each kind, and the table of docs/reliability.md. `make faults` runs it.

The files and the failing disk are those of tests/faults.py and tests/disk_faults.py, of which the ordinary tests try a
few. Needs Linux and a C compiler. Every case is seeded; a case that is lost is printed, and is a bug.

    python benchmarks/faults.py [--files 60] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
RESULT, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "reliability.md"
FILES = ("recipe", "vitrim.json", "edits of a plan", "config.json", "index of shards", "header of safetensors")
FILES += ("image", "tar shard", "elastic.json", "zoo.json")
JOBS = ("compress", "resume", "prune-checkpoint", "slice")
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


def failing(job: str, fault: str) -> tuple[int, list[str]]:
    """How many changes of a job were made to fail, and what went wrong."""
    from disk_faults import sweep

    found = sweep(job, fault=fault, every=EVERY[fault])
    return len(found), [
        f"{job}, {fault} at change {each['change']}: {each['wrong']}" for each in found if each["wrong"]
    ]


def measure(names: list[str], count: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Row after row, each kept as soon as it is there."""
    from faults import Scene

    with tempfile.TemporaryDirectory() as scratch:
        scene = None
        for kind in [kind for kind in FILES if kind in names]:
            with contextlib.redirect_stdout(io.StringIO()):
                scene = scene or Scene(Path(scratch))
            keep(
                _row(f"mutated {kind}", lambda kind=kind, scene=scene: (count, hostile(count, kind=kind, scene=scene)))
            )
    for job in [job for job in JOBS if job in names]:
        for fault in EVERY:
            how = "every change" if EVERY[fault] == 1 else f"one of {EVERY[fault]} changes"
            keep(_row(f"{job}: {fault} at {how}", lambda job=job, fault=fault: failing(job, fault)))


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
    parser.add_argument("--only", nargs="*", default=[*FILES, *JOBS], choices=[*FILES, *JOBS])
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vitrim.evaluation import environment

    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        given.result.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")

    measure(given.only, given.files, keep)
    if given.result == RESULT:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}{table({'rows': rows})}\n{END}{rest.partition(END)[2]}")
    sys.exit(any(row["lost"] for row in rows))


if __name__ == "__main__":
    main()
