"""How long Gram-Schmidt selection takes on one large layer, and whether the picks are those of the plain loop.

Rows are (1) the published loop, which rewrites the matrix at each pick, (2) the same picks by reading the matrix only,
(3) LAPACK's column-pivoted QR, (4) ours, and (5) one bare H x D x K product, below which no exact method can go. The
first two are timed on a few picks, the reading one in the middle of the run, and scaled to all. Weights are seeded:
plain Gaussian, and Gaussian with the singular values and row norms of trained fc1 layers.

    OMP_NUM_THREADS=1 python benchmarks/selection.py       # about 10 minutes; compare ratios, not machines
    python benchmarks/selection.py --layers 4304x1152
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from vitrim.ops.gram_schmidt import select_units, select_with_curve
from vitrim.output.provenance import environment

# fc1 of EVA-02-CLIP-E, OpenCLIP bigG, ViT-g/14 and SigLIP SO400M
LAYERS = ("15360x1792", "8192x1664", "6144x1408", "4304x1152")
# Share of the way down the spectrum -> singular value, of the fc1 layers of a ViT trained on CIFAR-10 (768 x 192)
SPECTRUM = {0: 1, 0.01: 0.7, 0.05: 0.5, 0.1: 0.33, 0.25: 0.24, 0.5: 0.19, 0.75: 0.15, 0.9: 0.12, 1: 0.1}
COLUMNS = ("layer", "weights", "naive_s", "reading_s", "lapack_s", "ours_s", "product_s", "naive_ratio", "bound_ratio")
AGREEMENT = ("common_ratio", "prefix")


def main() -> None:
    """Time every layer with every kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--num-picks", type=int, default=12, help="picks that are timed of the loops")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection.json"))
    arguments = parser.parse_args()
    shapes = {layer: tuple(int(size) for size in layer.split("x")) for layer in arguments.layers}
    smallest = min(shapes, key=lambda layer: shapes[layer][0] * shapes[layer][1])
    result: dict[str, Any] = {
        "environment": environment()
        | {"scipy": scipy.__version__, "threads": torch.get_num_threads(), "seed": arguments.seed},
        "rows": [],
    }
    for layer, (num_rows, width) in shapes.items():
        for kind in ("gaussian", "trained"):
            rows = weights(kind, num_rows, width, arguments.seed)
            row = {"layer": layer, "weights": kind, "load": os.getloadavg()[0]}
            row |= measure(rows, arguments.num_picks, arguments.repeats, exact=layer == smallest)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def weights(kind: str, num_rows: int, width: int, seed: int) -> Tensor:
    """Seeded float32 weights."""
    generator = torch.Generator().manual_seed(seed)
    rows_HD = torch.randn(num_rows, width, generator=generator)
    if kind == "gaussian":
        return rows_HD
    share_D = np.linspace(0, 1, width)
    values_D = np.exp(np.interp(share_D, list(SPECTRUM), np.log(list(SPECTRUM.values()))))
    rotation_DD = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    rows_HD = (rows_HD * torch.from_numpy(values_D).float()) @ rotation_DD
    return rows_HD * torch.exp(0.25 * torch.randn(num_rows, 1, generator=generator))


def measure(rows_HD: Tensor, num_picks: int, repeats: int, *, exact: bool) -> dict[str, Any]:
    """Seconds of each way to pick as many rows as there are columns, and how far their picks agree."""
    num_keep = rows_HD.shape[1]
    half, scale = num_keep // 2, num_keep / num_picks
    square_DK, rows64_HD = rows_HD[:num_keep].T.contiguous(), rows_HD.double()
    ours = select_units(rows_HD, num_keep)
    half_PD = torch.linalg.qr(rows64_HD[ours[:half]].T)[0].T.float()
    seconds, values = best_of(
        repeats,
        product=lambda: rows_HD @ square_DK,
        ours=lambda: select_units(rows_HD, num_keep).tolist(),
        ours_float64=lambda: select_units(rows64_HD, num_keep).tolist(),
        ours_with_curve=lambda: select_with_curve(rows_HD, num_keep),
        naive=lambda: naive(rows_HD, num_picks),
        reading=lambda: reading_only(rows_HD, num_picks, half_PD),
        lapack=lambda: pivoted_qr(rows_HD)[:num_keep].tolist(),
    )
    picks, truth = values["ours"], values["ours_float64"]
    seconds |= {"naive_s": seconds["naive_s"] * scale, "reading_s": seconds["reading_s"] * scale}
    found = seconds | {
        "naive_ratio": seconds["naive_s"] / seconds["ours_s"],
        "bound_ratio": seconds["ours_s"] / seconds["product_s"],
        **agreement(picks, truth),
        "naive_agrees": values["naive"] == picks[:num_picks],
        "reading_agrees": values["reading"] == picks[half : half + num_picks],
        "lapack": agreement(values["lapack"], truth),
    }
    if exact:
        found["plain_float64_agrees"] = reading_only(rows64_HD, num_keep) == truth
    return found


def naive(rows_HD: Tensor, num_picks: int) -> list[int]:
    """The published loop: at each pick, remove its direction from the whole matrix."""
    residual_HD, picks = rows_HD.clone(), []
    for _ in range(num_picks):
        norms_H = residual_HD.norm(dim=1)
        picks.append(int(norms_H.argmax()))
        direction_D = residual_HD[picks[-1]] / norms_H[picks[-1]]
        residual_HD = residual_HD - torch.outer(residual_HD @ direction_D, direction_D)
    return picks


def reading_only(rows_HD: Tensor, num_picks: int, start_PD: Tensor | None = None) -> list[int]:
    """The same picks without rewriting: an orthonormal basis, and squared norms downdated by one product a pick."""
    start_PD = rows_HD[:0] if start_PD is None else start_PD
    basis_KD = torch.cat([start_PD, rows_HD.new_zeros(num_picks, rows_HD.shape[1])])
    left_H = rows_HD.square().sum(1) - (rows_HD @ start_PD.T).square().sum(1)
    picks: list[int] = []
    for step in range(len(start_PD), len(start_PD) + num_picks):
        picks.append(int(left_H.argmax()))
        row_D = rows_HD[picks[-1]]
        for _ in range(2):
            row_D = row_D - (basis_KD[:step] @ row_D) @ basis_KD[:step]
        basis_KD[step] = row_D / row_D.norm()
        left_H -= (rows_HD @ basis_KD[step]).square()
        left_H[picks[-1]] = -torch.inf
    return picks


def pivoted_qr(rows_HD: Tensor) -> np.ndarray:
    """LAPACK's order of the rows, in their own precision."""
    (geqp3,) = scipy.linalg.get_lapack_funcs(("geqp3",), (rows_HD.numpy(),))
    return geqp3(rows_HD.T.numpy())[1] - 1


def best_of(repeats: int, **runs: Callable[[], Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of the fastest of each, in turns so that a busy moment meets all, and what they return.

    CPU seconds, as the machine may have other work: with one thread, what a clock shows on an idle one.
    """
    seconds, values = {f"{name}_s": float("inf") for name in runs}, {}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            values[name] = run()
            seconds[f"{name}_s"] = min(seconds[f"{name}_s"], time.process_time() - start)
    return seconds, values


def agreement(picks: list[int], reference: list[int]) -> dict[str, float]:
    """Share of common picks, and how many are the same in the same order from the start."""
    pairs = enumerate(zip(picks, reference, strict=True))
    prefix = next((place for place, (one, other) in pairs if one != other), len(picks))
    return {"common_ratio": len({*picks} & {*reference}) / len(reference), "prefix": prefix}


def markdown(result: dict[str, Any]) -> str:
    """The table as the documentation shows it."""
    header = (*COLUMNS, *AGREEMENT)
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for row in result["rows"]:
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in header]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
