"""Widths that differ from MLP to MLP beside equal ones of the same cost, after the cut, without training.

    python benchmarks/allocation.py
    python benchmarks/allocation.py --model local-dir:MODEL --data IMAGES --cases 0

Prints a table: relative error of all tokens on held-out images, with equal widths and with those that were found, and
the errors that the allocation had foreseen.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import vitrim

CASES = (
    ("dgmr", "params", {"refit": False}),
    ("dgmr", "params", {}),
    ("dgmr", "latency", {}),
    ("magnitude", "params", {"refit": False}),
    ("magnitude", "params", False),
    ("dgmr-paper", "macs", False),
)


def main() -> None:
    """Run all cases at all ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--num-images", type=int, default=600)
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="which of the cases")
    parser.add_argument("--cache", type=Path, default=None, help="folder that keeps what was measured")
    given = parser.parse_args()
    print("| method | repair | budget | MLP ratio | equal | allocated | predicted: equal | allocated | widths |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number in given.cases:
        method, budget, repair = CASES[number]
        for ratio in given.ratios:
            recipe = vitrim.Recipe.parse(
                {
                    "method": method,
                    "repair": repair,
                    "mlp_ratio": ratio,
                    "calibrate": {"num_images": given.num_images},
                    "allocate": {"budget": budget, "cache": given.cache},
                }
            )
            found = vitrim.compress(given.model, data=given.data, recipe=recipe, quiet=True)
            about, widths = found.metrics.allocation, list(found.plan.widths.values())
            errors = [
                f"{about[key][which]:.4f}"
                for key in ("relative_error", "predicted")
                for which in ("uniform", "allocated")
            ]
            row = (method, repair, budget, ratio, *errors, widths)
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
