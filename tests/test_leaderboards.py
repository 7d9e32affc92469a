"""benchmarks/leaderboard.py: seeds and sizes as lists, each run in its folder, mean and spread, the picture."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("leaderboards", ROOT / "benchmarks" / "leaderboard.py")
assert SPEC is not None and SPEC.loader is not None
leaderboards = sys.modules["leaderboards"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(leaderboards)


def a_row(method, repair, error, macs, *, counted="params", failed=None):
    judged = {"relative_error": error, "top1": None}
    row = {"method": method, "repair": repair, "error": failed, "fitted": {"counted": counted}, "macs": macs}
    return row | {"parameters": 50, "bytes": 200, "after_cut": judged, "after_recovery": None, "seconds": 1.0}


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Runs with a leaderboard in place of the real one, and its calls."""
    calls = []

    def leaderboard(model, *, methods, out, seed, quiet, data, recipe, **budget):
        [(counted, size)] = budget.items()
        calls.append((Path(model.partition(":")[2]).name, counted, size, seed))
        rows = [
            a_row("dgmr", "ours", 0.1 / size + 0.01 * seed, 100 * size),
            a_row("random", "none", 0.5 / size, 100 * size, counted=None),
            a_row("broken", "none", 0.0, 1, failed="X: y"),
        ]
        out.mkdir(parents=True)
        (out / "leaderboard.json").write_text(json.dumps({"original": {"macs": 100}, "rows": rows}))
        return {"verdict": []}

    monkeypatch.setattr(leaderboards.vitrim, "leaderboard", leaderboard)
    arguments = ["--sizes", "0.25", "0.5", "--seeds", "0", "1", "--runs", str(tmp_path / "runs"), "--out"]
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *arguments, str(tmp_path / "found.json")])
    leaderboards.main()
    return calls, tmp_path


def test_every_size_of_a_seed_is_run_before_the_next_seed(ran):
    calls, _ = ran
    sizes = [(counted, size) for counted in ("params_ratio", "macs_ratio") for size in (0.25, 0.5)]
    assert calls == [(model, *size, seed) for seed in (0, 1) for model in ("cifar10-vit", "deep-vit") for size in sizes]


def test_mean_spread_and_picture(ran):
    _, folder = ran
    found = json.loads((folder / "found.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"dgmr", "random"} and len(found["rows"]) == 2 * 2 * 2 * 2
    row = next(row for row in found["rows"] if row["method"] == "dgmr" and row["size"] == 0.25)
    assert row["num_seeds"] == 2 and row["error"]["mean"] == pytest.approx(0.405)
    assert row["error"]["spread"] == pytest.approx(0.01 / 2**0.5)
    table = (folder / "found.md").read_text()
    assert "| 1 | dgmr | ours | 0.4050 ± 0.0071 (2) | 0.2050 ± 0.0071 (2) |" in table
    assert "| 2 | random | none | 2.0000 ± 0.0000 (2) * |" in table
    assert table.index("| dgmr |") < table.index("| random |")
    assert (folder / "found.svg").read_text().count("MACs, ") >= 2
