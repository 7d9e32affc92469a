"""The leaderboard: any registered method at one size, failures and resuming, and what its table says."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import TensorDataset

from vitrim.cli.app import run
from vitrim.compression.leaderboard import leaderboard
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs, num_parameters
from vitrim.errors import OutputError, RecipeError
from vitrim.methods import METHODS, ModelMethod, SiteMethod, register
from vitrim.methods.fips import Fips
from vitrim.report.leaderboard import markdown, table, verdict
from vitrim.storage.sealed import sealed
from vitrim.surgery import KeepUnits

RECIPE = Recipe.parse(
    {
        "calibrate": {"num_images": 32, "batch_size": 16},
        "repair": {"refit_steps": 2, "max_tokens": 512},
        "recover": {"steps": 1, "batch_size": 8, "lr": 1e-4},
        "round_to": 1,
    }
)


@pytest.fixture(autouse=True)
def no_trace():
    """Methods that a test registers are gone after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(60, 3, 32, 32, generator=generator), torch.arange(60) % 5)


class Last(SiteMethod):
    name, needs, paper, arxiv, summary = "last", "weights", "none", "0.0", ""

    def select(self, view):
        return torch.arange(view.site.d_hidden - view.num_keep, view.site.d_hidden)


class Mended(Last):
    name = "thrower"


class Thrower(ModelMethod):
    name, needs, takes, paper, arxiv, summary = "thrower", "weights", "widths", "none", "0.0", ""

    def propose(self, view):
        yield from ()
        raise ZeroDivisionError("no\nluck")


class Wide(ModelMethod):
    """Cuts without tensors, so that our repair may follow."""

    name, needs, takes, paper, arxiv, summary = "wide", "weights", "widths", "none", "0.0", ""

    def propose(self, view):
        for site in view.sites:
            yield KeepUnits(site=site, keep=tuple(range(site.d_hidden))[-view.widths[site.path] :])


def test_a_new_method_is_in_the_leaderboard_and_a_failing_one_stops_no_other(build, data, tmp_path):
    for method in (Last, Thrower, Wide):
        register(method)
    model = build("timm-vit").copy()
    asked = {"data": data, "params_ratio": 0.6, "recipe": RECIPE, "out": tmp_path}
    asked |= {"quiet": True, "baselines": ("last",)}
    found = leaderboard(model, methods=("thrower", "last", "wide", "top-k"), **asked)
    rows = {(row["method"], row["repair"]): row for row in found["rows"]}
    assert list(rows) == [
        ("thrower", "none"),
        *((name, repair) for name in ("last", "wide") for repair in ("none", "ours")),
        ("top-k", "none"),
    ]
    assert rows["thrower", "none"]["error"] == "ZeroDivisionError: no luck"
    whole = num_parameters(model)
    assert found["original"]["parameters"] == whole
    assert found["original"]["macs"] == count_macs(model, torch.randn(1, 3, 32, 32))
    for name in ("last", "wide"):
        bare, repaired = (rows[name, repair] for repair in ("none", "ours"))
        assert bare["parameters"] == repaired["parameters"] and 0.59 <= bare["parameters"] / whole <= 0.6
        assert repaired["after_cut"]["relative_error"] < bare["after_cut"]["relative_error"]
        assert 0 < bare["bytes"] < found["original"]["bytes"]
        assert bare["latency"].keys() == {"1", "8", "32"}
        assert all(row["ratio"] > 0 and len(row["ratio_quartiles"]) == 2 for row in bare["latency"].values())
        assert bare["after_recovery"].keys() == {"relative_error", "cosine", "top1", "num_images", "num_labelled"}
    assert rows["last", "none"]["after_cut"] == rows["wide", "none"]["after_cut"]  # same units, images and seed
    top_k = rows["top-k", "none"]
    assert top_k["fitted"]["counted"] != "params" and top_k["parameters"] == whole
    _check_files(found, tmp_path)
    _check_resumed(model, asked, found, tmp_path)


def _check_files(found, folder):
    kept = json.loads((folder / "leaderboard.json").read_text())
    assert kept == sealed(found)
    assert kept["environment"]["machine"] and kept["asked"]["recipe"]["seed"] == 0
    text = (folder / "leaderboard.md").read_text()
    assert text == markdown(found)
    assert "ZeroDivisionError: no luck" in text and "Failed: thrower." in text


def _check_resumed(model, asked, found, folder):
    """Rows that are there are kept, the failed one is tried again, and a new method joins."""
    register(Mended)
    seconds = {(row["method"], row["repair"]): row.get("seconds") for row in found["rows"]}
    again = leaderboard(model, methods=("thrower", "last"), **asked)
    rows = {(row["method"], row["repair"]): row for row in again["rows"]}
    assert rows["thrower", "none"]["error"] is None
    assert rows["last", "none"] in found["rows"] and rows["top-k", "none"] in found["rows"]
    assert seconds["last", "ours"] == rows["last", "ours"]["seconds"]
    with pytest.raises(OutputError, match=r"rows of another comparison \(params_ratio\); choose another folder"):
        leaderboard(model, methods=("last",), **{**asked, "params_ratio": 0.7})
    text = (folder / "leaderboard.json").read_text()
    (folder / "leaderboard.json").write_text(text.replace('"repair": "ours"', '"repair": "OURS"', 1))
    with pytest.raises(OutputError, match=r"can't be used .* Choose another folder"):
        leaderboard(model, methods=("last",), **asked)


def test_a_share_of_macs_is_met(build, data):
    model = build("timm-split").copy()
    found = leaderboard(model, data=data, methods=("magnitude",), macs_ratio=0.7, recipe=RECIPE, quiet=True)
    assert [row["error"] for row in found["rows"]] == [None, None]
    for row in found["rows"]:
        assert 0.69 <= row["macs"] / found["original"]["macs"] <= 0.7
        assert row["after_cut"]["top1"] is None  # no head


@pytest.mark.parametrize("values", [{"params_ratio": 0.0}, {"macs_ratio": 1.0}, {"methods": ("dgrm",)}])
def test_what_can_not_be_compared_is_refused(build, data, values):
    with pytest.raises(RecipeError, match=r"is no share of the model|did you mean 'dgmr'"):
        leaderboard(build("timm-vit").model, data=data, **values)


def a_row(method, error, *, repair="none", counted="params", recovered=None, **values):
    judged = {"relative_error": error, "cosine": 0.9, "top1": None}
    after = None if recovered is None else {**judged, "relative_error": recovered}
    fitted = {"keep_ratio": 0.5, "counted": counted, "repairable": True}
    row = {"method": method, "repair": repair, "error": None, "fitted": fitted, "parameters": 50, "macs": 40}
    return row | {"bytes": 200, "after_cut": judged, "after_recovery": after, "seconds": 1.0} | values


class Masked(Fips):
    name = "masked"
    steps: int = 0  # nothing is trained


def timed(ratio, spread):
    return {"8": {"ratio": ratio, "ratio_quartiles": [ratio - spread / 2, ratio + spread / 2]}}


def test_every_method_is_sized_by_bytes_as_well(build, data):
    """The masks of FiPS are no parameters, and take their bytes."""
    register(Masked)
    model = build("timm-vit").copy()
    options = {"data": data, "methods": ("masked",), "params_ratio": 0.7, "recipe": RECIPE, "quiet": True}
    found = leaderboard(model, **options)
    (row,) = found["rows"]
    assert row["error"] is None and row["fitted"]["counted"] == "params"
    share = row["bytes"] / found["original"]["bytes"]
    assert row["parameters"] / found["original"]["parameters"] < share <= 0.7
    assert table(found)[1][1][2] == "70% params and bytes"


def test_the_verdict_compares_equal_terms_by_the_last_error():
    rows = [
        a_row("random", 0.5),
        a_row("clever", 0.6),
        a_row("clever", 0.2, repair="ours"),
        a_row("random", 0.3, repair="ours"),
        a_row("late", 0.9, recovered=0.4),
        a_row("other size", 0.9, counted="macs"),
        {"method": "broken", "repair": "none", "error": "X: y", "fitted": None},
    ]
    assert verdict(rows, ("random",)) == [
        "random, without our repair (error 0.5): lost to it: clever.",
        "random, with our repair (error 0.3): nothing of the same size lost to it.",
        "Failed: broken.",
    ]


def test_the_table_is_sorted_marks_the_best_and_says_what_was_saved():
    rows = [
        a_row("worse", 0.5, latency=timed(0.53, 0.02)),
        a_row("better", 0.1, bytes=190, latency=timed(0.66, 0.04)),
        a_row("heavier", 0.05, bytes=206, latency=timed(0.6, 0.02)),  # its masks are over the budget
        a_row("masked", 0.01, counted=None, latency=timed(0.4, 0.2)),
        {"method": "broken", "repair": "none", "error": "X: y", "fitted": None},
    ]
    asked = {"params_ratio": 0.5}
    original = {"parameters": 100, "macs": 100, "bytes": 400, "top1": None}
    header, cells = table({"asked": asked, "original": original, "rows": rows, "verdict": []})
    speed = "relative latency, batch 8"
    assert header == [
        *"method,repair,held to,parameters,MACs".split(","),
        speed,
        "weights (MB)",
        "error, cut",
        "seconds",
    ]
    assert [line[0] for line in cells] == ["original", "masked", "heavier", "better", "worse", "broken"]
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in cells}
    assert by_name["better"]["error, cut"] == "**0.1000**" and by_name["masked"]["error, cut"] == "0.0100"
    assert (by_name["heavier"]["error, cut"], by_name["heavier"]["weights (MB)"]) == ("0.0500", "0.00 (52%)")
    assert (by_name["better"]["weights (MB)"], by_name["worse"]["weights (MB)"]) == ("**0.00 (48%)**", "0.00 (50%)")
    assert by_name["worse"][speed] == "**0.53 (0.52 to 0.54)**" and by_name["better"][speed] == "0.66 (0.64 to 0.68)"
    assert (by_name["masked"][speed], by_name["original"][speed]) == ("0.40 (noisy, 0.30 to 0.50)", "1")
    assert by_name["worse"]["parameters"] == "0.00M (50%)"  # a tie of all is no best
    assert by_name["masked"]["held to"] == "keep_ratio 0.5; it can't reach 50% of params, nor of MACs"
    assert by_name["broken"]["held to"] == "X: y"


def test_the_command_prints_the_table_and_keeps_the_rows(tmp_path, capsys):
    recipe = tmp_path / "few.yaml"
    recipe.write_text("calibrate: {num_images: 32, batch_size: 16}\nrepair: {refit: false}\n")
    command = [
        "leaderboard",
        "--methods",
        "random",
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "leaderboard"),
        "--quiet",
    ]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "random" in shown and "50%" in shown and "leaderboard.json" in "".join(shown.split())
    assert run([*command, "--json"]) == 0
    assert {row["method"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"random"}
    assert run([*command, "--params-ratio", "2"]) == 2
