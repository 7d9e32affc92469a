"""What feedback is worth, and at which strength: relative error on other inputs after the closed form.

`none` repairs each block by itself, `whole` lets it correct all of what the blocks before it got wrong, and `by data`
is what vitrim does: the share of that which pays on held-out calibration tokens, block by block. Small ViTs with random
weights (mean and range of three), and the models of ../shared and `benchmarks/deep_vit.py` where they are present.

    nice python benchmarks/feedback.py                       # about 5 minutes of one core
    python benchmarks/feedback.py --cases "random, 16 images"
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.data import first_images, split_indices
from vitrim.data.inputs import open_set
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_encoder
from vitrim.output.provenance import environment

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CIFAR = f"local-dir:{SHARED / 'models' / 'cifar10-vit'}"
HALF, QUARTER = {"keep_ratio": 0.5, "options": {"parts": "both"}}, {"keep_ratio": 0.25}
# name -> (model, or "random"; calibration inputs; recipe)
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "random, 16 images": ("random", 16, HALF),
    "random, 200 images": ("random", 200, HALF),
    "CIFAR-10 ViT, 64 images, MLPs": (CIFAR, 64, QUARTER),
    "CIFAR-10 ViT, 64 images": (CIFAR, 64, HALF),
    "CIFAR-10 ViT, 400 images, MLPs": (CIFAR, 400, QUARTER),
    "deeper ViT, 64 images, MLPs": ("deep", 64, QUARTER),
    "deeper ViT, 64 images": ("deep", 64, HALF),
    "MiniLM, 64 texts, MLPs": (str(SHARED / "models" / "minilm"), 64, QUARTER),
}
STRENGTHS = {"none": 0.0, "whole": 1.0, "by data": 1.0}
Case = tuple[nn.Module, Sequence[Tensor], Sequence[Any]]


def main() -> None:
    """Measure every case at every strength."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--deep", default=f"local-dir:{ROOT / 'benchmarks' / 'models' / 'deep-vit'}")
    parser.add_argument("--num-test", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/feedback.json"))
    arguments = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}
    for name in arguments.cases:
        source, num_inputs, recipe = CASES[name]
        rows[name] = {strength: [] for strength in STRENGTHS}
        for case in cases(arguments.deep if source == "deep" else source, num_inputs, arguments.num_test):
            for strength in STRENGTHS:
                rows[name][strength].append(error(case, recipe, strength))
                print(f"{name}, {strength}: {rows[name][strength][-1]:.5f}", flush=True)
    result = {"environment": environment(), "errors": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(rows))


def cases(source: str, num_inputs: int, num_test: int) -> Iterator[Case]:
    """Yield models, each with calibration batches and other inputs to judge on."""
    if source == "random":
        for seed in range(3):
            yield random_case(seed, num_inputs)
        return
    model, origin = open_encoder(source)
    if "num_tokens" in origin.preprocessing:
        from pydoc_data.topics import topics

        inputs = open_set(list(topics.values()), origin, limit=None)
    else:
        inputs = open_set(SHARED / "data" / "cifar10" / "train.parquet", origin, limit=None)
    rest, held = split_indices(len(inputs), num_held_out=min(num_test, len(inputs) // 2), seed=0)
    batches = torch.cat([*first_images(inputs.subset(rest), num_inputs, seed=0)[0]]).split(16)
    yield model.float().eval().requires_grad_(False), batches, list(inputs.subset(held).loader(batch_size=32))


def random_case(seed: int, num_images: int) -> Case:
    """A ViT of two blocks with random weights, and noise for images: nothing of an error can be known from others."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", mlp_ratio=3, num_classes=0, **size).eval().requires_grad_(False)
    return model, torch.randn(num_images, 3, 32, 32).split(max(1, num_images // 4)), [torch.randn(128, 3, 32, 32)]


def error(case: Case, recipe: dict[str, Any], strength: str) -> float:
    """Relative error of all tokens of a cut model on other inputs."""
    model, batches, judged = case
    student, repair = copy.deepcopy(model), {"refit": False, "feedback": STRENGTHS[strength]}
    asked = Recipe.parse({"method": "dgmr", "repair": repair, **recipe})
    with patch("vitrim.ops.feedback.paying_share", return_value=1.0) if strength == "whole" else nullcontext():
        cut_(student, model, find_mlps(model), asked, batches, quiet=True)
    return fidelity(student, model, judged)["relative_error"]


def markdown(rows: dict[str, dict[str, list[float]]]) -> str:
    """The table as the documentation shows it."""
    lines = ["| | " + " | ".join(STRENGTHS) + " |", "|---|" + "---|" * len(STRENGTHS)]
    for name, row in rows.items():
        cells = []
        for errors in row.values():
            spread = "" if len(errors) == 1 else f" ({min(errors):.5f} to {max(errors):.5f})"
            cells.append(f"{sum(errors) / len(errors):.5f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
