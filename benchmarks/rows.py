"""What several tables share: the models that they are made on, and rows that are written as they come.

A stopped run goes on behind the last of its rows. A row's name ends in its seed, where it has one.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrim.output.provenance import environment

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODELS = {
    "cifar10": f"local-dir:{SHARED / 'models' / 'cifar10-vit'}",
    "deep": f"local-dir:{ROOT / 'benchmarks' / 'models' / 'deep-vit'}",
    "minilm": str(SHARED / "models" / "minilm"),
}
Row = dict[str, Any]


def results(name: str) -> Path:
    """Where a table's rows are kept."""
    return ROOT / "benchmarks" / "results" / f"{name}.json"


class Rows:
    """The rows of a file, written as they come; those that it has are not run again."""

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        self.path, self.found = path, {"arguments": arguments, "rows": {}}
        if path.exists():
            self.found = json.loads(path.read_text())
            if self.found["arguments"] != arguments:
                raise SystemExit(f"{path}: holds rows of {self.found['arguments']}; give another --out.")

    def get(self, name: str, run: Callable[[], Row]) -> Row:
        """Return a row, which is run and written if it is not there."""
        if name not in self.found["rows"]:
            self.found["rows"][name] = run()
            self.found["environment"] = environment()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
            print(name, json.dumps(self.found["rows"][name]), flush=True)
        return self.found["rows"][name]


def by_seed(found: dict[str, Any]) -> dict[str, list[Row]]:
    """All rows of a file by name, those of all seeds together."""
    rows: dict[str, list[Row]] = {}
    for name, row in found["rows"].items():
        rows.setdefault(re.sub(r", seed \d+$", "", name), []).append(row)
    return rows


def mean(values: list[float], digits: int) -> str:
    """The mean, and behind it the standard deviation where several differ."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if max(values) > min(values) else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def mean_top1(rows: list[Row]) -> str:
    """The mean of top-1, where the model has a head."""
    known = [row["top1"] for row in rows if row["top1"] is not None]
    return mean(known, 1) if known else "-"


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown; numbers stand behind the first column."""
    ruler = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", ruler, *(f"| {' | '.join(line)} |" for line in lines)])
