"""What one budget is worth where it is spent over MLP widths, attention and depth: errors after the cut, no training.

A row is a model at half of its parameters or MACs, with the closed form alone or with the default refit behind it. Its
columns are equal widths of all MLPs, `allocate` over the MLPs, over MLPs and attention (`parts: both`), and over depth
as well (`allocate.depth`), all counted in what the budget is. A seed draws other images to learn from. Judged on test
images of CIFAR-10 that nothing else sees: the relative squared error of all output tokens (0 is identical, 1 is
predicting the mean). Needs ../shared, and for the deeper model what benchmarks/deep_vit.py leaves.

What is done is kept in the JSON, so a run that was stopped goes on; --write puts the table into docs/choosing.md.

    nice -n 10 python benchmarks/allocation.py
    python benchmarks/allocation.py --models cifar10-vit --budgets params --repairs "closed form"
    python benchmarks/allocation.py --write
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from vitrim.compression.job import open_job
from vitrim.compression.phases import choose_widths, cut_models_, prepare
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import count_macs, num_parameters
from vitrim.data import first_images, open_images, transform_for
from vitrim.metrics.fidelity import fidelity
from vitrim.output.load import open_model
from vitrim.output.provenance import environment

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
MODELS = ("cifar10-vit", "deep-vit")
REPAIRS = {"closed form": {"refit": False}, "with refit": {}}
SPENT = {
    "equal widths": ("mlp", None),
    "MLPs": ("mlp", {}),
    "and attention": ("both", {}),
    "and depth": ("both", {"depth": True}),
}
BEGIN, END = "<!-- table: python benchmarks/allocation.py --write -->\n", "<!-- end of table -->\n"
PAGE = ROOT / "docs" / "choosing.md"


def main() -> None:
    """Run every cell that is not there yet, at every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--budgets", nargs="+", default=["params", "macs"], choices=["params", "macs"])
    parser.add_argument("--repairs", nargs="+", default=list(REPAIRS), choices=REPAIRS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--num-images", type=int, default=300, help="to learn from; a tenth of them is held out")
    parser.add_argument("--num-test", type=int, default=250)
    parser.add_argument("--deep", type=Path, default=ROOT.parent / "deep-vit", help="folder of the deeper model")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was measured and tried")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "allocation.json")
    parser.add_argument("--write", action="store_true", help="put the table into the page; run nothing")
    given = parser.parse_args()
    if given.write:
        write(json.loads(given.out.read_text()))
        return
    torch.set_num_threads(1)
    result = json.loads(given.out.read_text()) if given.out.exists() else {"rows": {}}
    result |= {
        "environment": environment(),
        "arguments": {name: getattr(given, name) for name in ("ratio", "num_images", "num_test")},
    }
    cells = ((s, r, m, b, n) for s in given.seeds for r in given.repairs for m in given.models for b in given.budgets
             for n in SPENT)  # fmt: skip
    for seed, repair, model, budget, spent in cells:
        row = result["rows"].setdefault(f"{model}, {budget}, {repair}", {}).setdefault(spent, {})
        if str(seed) not in row:
            row[str(seed)] = cell(given, model, budget, repair, spent, seed)
            print(f"seed {seed} {model}, {budget}, {repair}, {spent}: {row[str(seed)]}", flush=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def cell(given: argparse.Namespace, name: str, budget: str, repair: str, spent: str, seed: int) -> dict[str, Any]:
    """Cut a model with one draw of images, and judge it on the test images."""
    model = f"local-dir:{given.deep if name == 'deep-vit' else SHARED / 'models' / name}"
    teacher, _ = open_model(model)
    transform, (parts, allocate) = transform_for(teacher), SPENT[spent]
    images, _ = first_images(open_images(CIFAR10 / "train.parquet", transform=transform), given.num_images, seed=seed)
    test, _ = first_images(open_images(CIFAR10 / "test.parquet", transform=transform), given.num_test, seed=0)
    recipe = {
        f"{budget}_ratio": given.ratio,
        "options": {"parts": parts},
        "repair": REPAIRS[repair],
        "calibrate": {"views": 1},
        "allocate": None if allocate is None else {"cost": budget, "cache": given.cache, **allocate},
        "seed": seed,
    }
    started = time.process_time()
    job = open_job(model, Recipe.of(recipe), torch.cat(images), out=None)
    context = RunContext(quiet=True, device="cpu", seed=seed)
    models = prepare(job, context)
    widths = choose_widths(job, models, context)
    cut_models_(models, job, widths, context)
    seconds, about = round(time.process_time() - started, 1), widths.about or {}
    image, student = test[0][:1], models.student
    return {
        "relative_error": fidelity(student, teacher, test)["relative_error"],
        "params": num_parameters(student) / num_parameters(teacher),
        "macs": count_macs(student, image) / count_macs(teacher, image),
        "seconds": seconds,
        **{key: about[key] for key in ("kept", "tried", "blocks_out") if key in about},
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table, as the documentation shows it: a row is given where all of its cells are there."""
    lines = [f"| Model | Budget | Repair | {' | '.join(SPENT)} | Blocks out | Seeds |", f"|---|---|---|{'---:|' * 6}"]
    for name, row in result["rows"].items():
        seeds = set.intersection(*(set(row.get(spent, {})) for spent in SPENT))
        if not seeds:
            continue
        model, budget, repair = name.split(", ")
        errors = [spread([row[spent][seed]["relative_error"] for seed in sorted(seeds)]) for spent in SPENT]
        out = ", ".join(str(row["and depth"][seed].get("blocks_out", 0)) for seed in sorted(seeds))
        words = {"params": "parameters", "macs": "MACs"}[budget]
        lines.append(f"| {model} | {words} | {repair} | {' | '.join(errors)} | {out} | {len(seeds)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def write(result: dict[str, Any]) -> None:
    """Put the table between the marks in the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(result)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
