"""What FiPS makes of half (and other shares) of the MLPs' values, beside DGMR at as many stored numbers.

The CIFAR-10 ViT of ../shared, six MLPs; no recovery of the whole model afterwards. Relative squared error of all output
tokens and top-1, on test images; `stored` is the share of the model's bytes, masks included.

    python benchmarks/fips.py              # ten minutes on 2 cores
    python benchmarks/fips.py --kernels    # ms of one layer of a ViT-B by several kernels, on one thread
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import timeit
import warnings
from pathlib import Path
from typing import Any

import torch

from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs, model_size
from vitrim.data import first_images, open_images, transform_for
from vitrim.evaluation import top1_of
from vitrim.layers.fips import pack, unpack
from vitrim.metrics.fidelity import fidelity
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment

SHARED = Path(__file__).resolve().parents[2] / "shared"
CIFAR10 = SHARED / "data" / "cifar10"
ROWS: dict[str, dict[str, Any]] = {
    "fips, SVD alone": {"method": "fips", "options": {"steps": 0}},
    "fips, gmp": {"method": "fips", "options": {"schedule": "gmp"}},
    "fips, rigl": {"method": "fips", "options": {"schedule": "rigl"}},
    "dgmr, least squares": {"method": "dgmr", "repair": {"refit": False}},
    "dgmr, and refit": {"method": "dgmr"},
}


def kernels(num_rows: int = 768, num_cols: int = 3072, rank: int = 1228) -> None:
    """Best of 19 runs, for one image and for eight, at 75% zeros."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Sparse CSR")
    mask_RC = torch.rand(rank, num_cols) < 0.25
    basis_DR, coeff_RC, places = torch.randn(num_rows, rank), torch.randn(rank, num_cols) * mask_RC, pack(mask_RC)
    values, weight_CD = coeff_RC[mask_RC], (basis_DR @ coeff_RC).T
    sparse_CR = coeff_RC.T.contiguous().to_sparse_csr()
    for num_tokens in (197, 1576):
        tokens_ND = torch.randn(num_tokens, num_rows)
        inner_NR = tokens_ND @ basis_DR
        inner_RN = inner_NR.T.contiguous()
        runs = {
            "the layer": lambda tokens_ND=tokens_ND: tokens_ND @ weight_CD.T,
            "by basis": lambda tokens_ND=tokens_ND: tokens_ND @ basis_DR,
            "by coefficients": lambda inner_NR=inner_NR: inner_NR @ coeff_RC,
            "by coefficients, CSR": lambda inner_RN=inner_RN: sparse_CR @ inner_RN,
            "multiplied out": lambda: basis_DR @ coeff_RC,
            "put in place": lambda: torch.zeros(mask_RC.shape).masked_scatter(unpack(places, (rank, num_cols)), values),
        }
        print(
            num_tokens,
            {name: f"{1e3 * min(timeit.repeat(run, number=1, repeat=20)[1:]):.1f}" for name, run in runs.items()},
        )


def main() -> None:
    """Run every row at every share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--options", type=json.loads, default={}, help="further options of fips, as JSON")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fips.json"))
    parser.add_argument("--kernels", action="store_true", help="time one layer instead")
    arguments = parser.parse_args()
    if arguments.kernels:
        return kernels()
    teacher, _ = open_model(f"local-dir:{SHARED / 'models' / 'cifar10-vit'}")
    teacher.requires_grad_(False)
    transform = transform_for(teacher)
    train = open_images(CIFAR10 / "train.parquet", transform=transform)
    batches, _ = first_images(train, arguments.num_images, seed=0)
    test = list(
        open_images(CIFAR10 / "test.parquet", transform=transform, limit=arguments.num_test).loader(batch_size=100)
    )
    images, sites, size = [batch.images_BCHW for batch in test], find_mlps(teacher), model_size(teacher)
    table: dict[str, dict[str, Any]] = {"original": {**top1_of(teacher, test)}}
    for share in arguments.shares:
        for row in arguments.rows:
            recipe = {**ROWS[row], "keep_ratio": share}
            if recipe["method"] == "fips":
                recipe["options"] = {**arguments.options, **recipe["options"]}
            student, started = copy.deepcopy(teacher), time.monotonic()
            report = cut_(student, teacher, sites, Recipe.parse(recipe), batches, quiet=True)
            table[f"{share:g} {row}"] = {
                "stored": model_size(student)["num_bytes"] / size["num_bytes"],
                "macs": count_macs(student, images[0][:1]) / count_macs(teacher, images[0][:1]),
                "relative_error": fidelity(student, teacher, images)["relative_error"],
                **top1_of(student, test),
                "seconds": time.monotonic() - started,
                "notes": report.notes,
            }
            print(f"{share:g} {row}: {table[f'{share:g} {row}']}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"environment": environment(), "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
