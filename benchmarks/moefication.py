"""When experts are faster than the MLP that they came from, and what each router keeps of the model.

Break-even: seconds of gathered experts, router and all, over those of the dense MLP, for random tokens and weights;
both in turns and on one thread, whose own seconds are counted, so that other work on the machine does not. Fidelity:
relative squared error of all output tokens and top-1 of the CIFAR-10 ViT of ../shared behind each router, as it is
(GELU) and after a short distillation with ReLU in its place. Prints tables and writes JSON with machine, versions, seed
and command.

    python benchmarks/moefication.py              # about 4 minutes on one core
    python benchmarks/moefication.py --quick      # half a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from corp import Bench
from timm.layers.mlp import Mlp
from torch import nn

from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import augment_for
from vitrim.layers.moefication import ExpertMlp
from vitrim.output.provenance import environment
from vitrim.recover.distill import recover_

# model -> (model width, hidden units, tokens of one image and of several)
SIZES = {"ViT-B": (768, 3072, (197, 788)), "CIFAR-10 ViT": (192, 768, (65, 1040))}
UNITS_PER_EXPERT = (32, 96)
SHARES = (0.125, 0.25, 0.5, 0.75)
ROUTERS = ("oracle", "similarity", "mlp")


def main() -> None:
    """Time first, then judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="of timing; the fastest counts")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5], help="active experts, for fidelity")
    parser.add_argument("--num-images", type=int, default=128, help="for calibration")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60, help="of distillation with ReLU, 64 images each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/moefication.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.shares, arguments.num_images, arguments.num_test = 2, [0.5], 16, 100
        arguments.steps = 2
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "times": times(arguments.rounds, arguments.seed),
    }
    print(time_table(result), flush=True)
    bench = Bench(arguments.num_images, arguments.num_test, arguments.seed)
    result["fidelity"] = fidelity(bench, arguments.shares, arguments.steps)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(fidelity_table(result))


@torch.inference_mode()
def times(rounds: int, seed: int) -> list[dict[str, Any]]:
    """For each size, number of experts and batch: the dense MLP's milliseconds, and the experts' as a ratio of them."""
    torch.set_num_threads(1)  # or `process_time` would add up those of all threads
    rows, generator = [], torch.Generator().manual_seed(seed)
    for name, (d_model, d_hidden, batches) in SIZES.items():
        dense = Mlp(d_model, d_hidden).eval()
        for units in UNITS_PER_EXPERT:
            number = d_hidden // units
            runs = {0.0: dense} | {share: experts(dense, number, round(share * number)) for share in SHARES}
            for num_tokens in batches:
                tokens = torch.randn(1, num_tokens, d_model, generator=generator)
                found: dict[float, list[float]] = {share: [] for share in runs}
                for share in [share for _ in range(rounds) for share in runs]:
                    started = time.process_time()
                    runs[share](tokens)
                    found[share].append(time.process_time() - started)
                best = {share: min(seconds) for share, seconds in found.items()}
                ratios = {f"{share:g}": best[share] / best[0.0] for share in SHARES}
                row = {"model": name, "experts": number, "tokens": num_tokens, "dense_ms": 1000 * best[0.0]}
                rows.append({**row, "ratios": ratios})
    return rows


def experts(dense: Mlp, num_experts: int, num_active: int) -> nn.Module:
    """An MLP as experts behind a router that was never trained, which spreads random tokens over all of them."""
    d_hidden, d_model = dense.get_parameter("fc1.weight").shape
    return ExpertMlp(
        dense,
        value="fc1",
        gate=None,
        output="fc2",
        packed=False,
        d_model=d_model,
        d_hidden=d_hidden,
        num_experts=num_experts,
        num_active=num_active,
        kind="mlp",
    ).eval()


def fidelity(bench: Bench, shares: list[float], steps: int) -> list[dict[str, Any]]:
    """Every router at every share, in the model as it is and with ReLU; errors are against the original throughout."""
    relu, _ = bench.cut(bench.teacher, {"method": "relufy"})
    recover_(
        relu.requires_grad_(True),
        bench.teacher,
        bench.train.augmented(augment_for(bench.teacher, "light", flip=True), bench.seed),
        held_out=bench.batches[:2],
        options=RecoverOptions(steps=steps, batch_size=64, lr=3e-4, precision="bf16", num_validations=2),
        context=RunContext(quiet=True, seed=bench.seed),
    )
    rows = []
    for activation, model in (("GELU", bench.teacher), ("ReLU, distilled", relu.requires_grad_(False))):
        rows.append({"activation": activation, "router": "all experts", "scores": {"1": bench.scores(model)}})
        for router in ROUTERS:
            scores = {}
            for share in shares:
                recipe = {"method": "moefication", "keep_ratio": share, "options": {"router": router}}
                scores[f"{share:g}"] = bench.scores(bench.cut(model, recipe)[0])
            rows.append({"activation": activation, "router": router, "scores": scores})
            print(rows[-1], flush=True)
    return rows


def time_table(result: dict[str, Any]) -> str:
    """The table of times as the documentation shows it."""
    shares = [f"{float(share):g}" for share in result["times"][0]["ratios"]]
    titles = " | ".join(f"{share} active" for share in shares)
    lines = [f"| MLP of | experts | tokens | dense | {titles} |", "|---|---|---|---|" + "---|" * len(shares)]
    for row in result["times"]:
        ratios = " | ".join(f"{row['ratios'][share]:.2f}" for share in shares)
        lines.append(f"| {row['model']} | {row['experts']} | {row['tokens']} | {row['dense_ms']:.2f} ms | {ratios} |")
    return "\n".join(lines)


def fidelity_table(result: dict[str, Any]) -> str:
    """The table of routers as the documentation shows it: top-1 and, in parentheses, relative error."""
    shares = list(result["fidelity"][1]["scores"])
    titles = " | ".join(f"{share} active" for share in shares)
    lines = [f"| activation | router | {titles} |", "|---|---|" + "---|" * len(shares)]
    for row in result["fidelity"]:
        cells = [row["scores"].get(share, row["scores"].get("1")) for share in shares]
        shown = " | ".join(f"{cell['top1']:.1f} ({cell['relative_error']:.4f})" for cell in cells)
        lines.append(f"| {row['activation']} | {row['router']} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
