"""How much the error of each method changes where one model is written in ways that compute the same.

The ways are those of `tests/support/rescaled.py`: norms, residual stream and value rows times 1/64 to 64, permuted
units, layer scale folded or not. Small ViTs with random weights of three kinds, and with `--model cifar10` the CIFAR-10
ViT of ../shared with a layer scale taken out of its projections. Prints the worst change for each kind of way.

    python benchmarks/invariance.py                      # a few minutes on 2 cores
    PYTHONPATH=OTHER_TREE python benchmarks/invariance.py --out other.json   # the same of another version's code
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.compression.cut import cut_
from vitrim.config.options import BlockwiseOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.data import first_images, open_images, transform_for
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.recover.distill import recover_
from vitrim.repair.blockwise import recover_blocks_

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
NO_REFIT = {"refit": False}
# row -> recipe, all at half of the hidden units or of the values
ROWS: dict[str, dict[str, Any]] = {
    "`dgmr`, closed form": {"method": "dgmr", "repair": NO_REFIT},
    "`corp`": {"method": "corp", "options": {"parts": "both", "values": True}},
    "`low-rank`": {"method": "low-rank"},
    "`fips`": {"method": "fips"},
    "`dgmr` with refit": {"method": "dgmr", "repair": True},
    "block by block": {"method": "dgmr", "repair": False},
    "distillation": {"method": "dgmr", "repair": False},
}


def main() -> None:
    """Measure every row on every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "cifar10"], default="tiny")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--num-images", type=int, default=96)
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 64, 1 / 8, 8.0, 64.0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/invariance.json"))
    arguments = parser.parse_args()
    rescaled = _rescaled()
    result: dict[str, Any] = {"environment": environment(), "model": arguments.model, "changes": {}, "errors": {}}
    for name, (model, batches, judged) in _models(arguments.model, arguments.num_images, rescaled).items():
        ways = rescaled.rescalings(model, tuple(arguments.factors))
        for row in arguments.rows:
            plain = result["errors"].setdefault(row, {})[name] = error(row, model, batches, judged)
            for way, rescale in ways.items():
                change = error(row, rescale(model), batches, judged) / plain - 1
                worst = result["changes"].setdefault(row, {})
                kind = way.partition(" x ")[0]
                worst[kind] = max(worst.get(kind, 0.0), abs(change))
                print(f"{name} {row} {way}: {change:+.2%}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def error(row: str, model: nn.Module, batches: Sequence[Tensor], judged: Sequence[Tensor]) -> float:
    """Relative error on held-out images after a row's recipe and, for the last two, training."""
    student, sites = copy.deepcopy(model), find_mlps(model)
    cut_(student, model, sites, Recipe.parse({"keep_ratio": 0.5, **ROWS[row]}), batches, quiet=True)
    images, context = open_images([(image, -1) for batch in batches for image in batch]), RunContext(quiet=True)
    common = {"held_out": judged, "context": context}
    if row == "block by block":
        options = BlockwiseOptions(num_images=len(images), batch_size=16, steps=60, train="block")
        recover_blocks_(student, model, find_mlps(student), images, options=options, **common)
    if row == "distillation":
        recover_(student, model, images, options=RecoverOptions(steps=100, batch_size=16), **common)
    return fidelity(student, model, judged)["relative_error"]


def _models(which: str, num_images: int, rescaled: Any) -> dict[str, tuple[nn.Module, list[Tensor], list[Tensor]]]:
    """Models by name with images to calibrate on and to judge by."""
    if which == "cifar10":
        model, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
        transform = transform_for(model)
        train, test = (SHARED / "data" / "cifar10" / f"{part}.parquet" for part in ("train", "test"))
        seen = [first_images(open_images(each, transform=transform), num_images, seed=0)[0] for each in (train, test)]
        return {"cifar10": (rescaled.with_layer_scale(model.requires_grad_(False)), *seen)}
    generator = torch.Generator().manual_seed(0)
    mix_KP = torch.randn(24, 3 * 16 * 16, generator=generator) / 24**0.5  # correlated, as images are
    images = torch.randn(2 * num_images, 24, generator=generator) @ mix_KP
    images = (images + 0.2 * torch.randn(images.shape, generator=generator)).view(-1, 3, 16, 16)
    seen = [list(part.split(16)) for part in images.split(num_images)]
    return {kind: (rescaled.tiny_vit(kind), *seen) for kind in rescaled.KINDS}


def _rescaled() -> Any:
    """The rescalings that lie beside this script, whichever tree vitrim itself is imported from."""
    spec = importlib.util.spec_from_file_location("rescaled", ROOT / "tests" / "support" / "rescaled.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def markdown(result: dict[str, Any]) -> str:
    """The table as the documentation shows it."""
    kinds = list(dict.fromkeys(kind for row in result["changes"].values() for kind in row))
    lines = ["| | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for row, found in result["changes"].items():
        cells = (f"{found[kind]:.1%}" if kind in found else "-" for kind in kinds)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
