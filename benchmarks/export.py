"""Exports students to ONNX: how far from PyTorch, and how much faster than the original's own ONNX file.

Models of a ViT-S's size with random weights, since neither parity nor speed asks for trained ones: a plain one and a
gated one cut to the model width, and a plain one with layers as two factors. Passes of both files are taken in turns.
Prints a table and writes JSON with machine, versions, seed and command.

    python benchmarks/export.py            # about 4 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch import nn

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs, num_parameters
from vitrim.models.sites import find_mlps
from vitrim.output.export import export
from vitrim.output.provenance import environment

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain MLPs, dgmr": ("vit_small_patch16_224", {"method": "dgmr", "mlp_ratio": 1.0}),
    "gated MLPs, dgmr": ("eva02_small_patch14_224", {"method": "dgmr", "mlp_ratio": 1.0}),
    "plain MLPs, low-rank": ("vit_small_patch16_224", {"method": "low-rank", "keep_ratio": 0.5}),
}


def main() -> None:
    """Export, compare and time every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.json"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rows = [run_row(name, *row, arguments) for name, row in ROWS.items()]
    result = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "command": " ".join(sys.argv),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def run_row(name: str, model: str, values: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One original, its student, and their two files."""
    original = timm.create_model(model, img_size=224, num_classes=0).eval()
    student = cut(original, values)
    images = torch.randn(arguments.batch_size, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for index, each in enumerate((original, student)):
            path = Path(folder) / f"{index}.onnx"
            found = export(each, path, latency=False)
            sessions.append(onnxruntime.InferenceSession(path, options(), providers=["CPUExecutionProvider"]))
        seconds = in_turns(sessions, {"images": images.numpy()}, arguments.rounds)
    macs = [count_macs(each, images[:1]) for each in (original, student)]
    return {
        "row": name,
        "model": model,
        "parameters": [num_parameters(each) for each in (original, student)],
        "macs": macs,
        "difference": found.differences["noise"],
        "opset": found.opset,
        "seconds": seconds,
        "faster": seconds[0] / seconds[1],
        "fewer_macs": macs[0] / macs[1],
    }


def cut(original: nn.Module, values: dict[str, Any]) -> nn.Module:
    """A student, by weights alone."""
    student = copy.deepcopy(original)
    recipe = Recipe.parse(
        {**values, "repair": False, **({"options": {"select_on": "weights"}} if values["method"] == "dgmr" else {})}
    )
    cut_(student, original, find_mlps(original), recipe, None, quiet=True)
    return student


def options() -> onnxruntime.SessionOptions:
    """As many threads as torch has."""
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = torch.get_num_threads()
    return found


def in_turns(sessions: list[Any], inputs: dict[str, Any], rounds: int) -> list[float]:
    """The middle time of a pass of each, one after the other in every round."""
    seconds: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds + 1):
        for place, session in enumerate(sessions):
            started = time.perf_counter()
            session.run(None, inputs)
            seconds[place].append(time.perf_counter() - started)
    return [sorted(found[1:])[rounds // 2] for found in seconds]  # the first round warms up


def markdown(result: dict[str, Any]) -> str:
    """The table as the documentation shows it."""
    lines = [
        "| student | parameters | largest difference from PyTorch | MACs | ONNX passes |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        before, after = row["parameters"]
        lines.append(
            f"| {row['row']} | {before / 1e6:.1f}M to {after / 1e6:.1f}M | {row['difference']:.1e} | "
            f"{row['fewer_macs']:.2f} times fewer | {row['faster']:.2f} times faster |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
