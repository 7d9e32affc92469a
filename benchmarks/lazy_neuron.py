"""The robustness check of The Lazy Neuron Phenomenon, and what Top-k costs or saves in time.

Top-k against dense on the CIFAR-10 ViT of ../shared: noise in the images at evaluation, with Top-k put on after the
fact and with a short training of the whole model behind it; and the same training on labels of which a share is wrong.
Top-1 and expected calibration error on test images. Also the time of the output projection: dense, Top-k by masking,
and Top-k by gathering columns, in turns and on one thread, whose own seconds are counted. Prints tables and writes
JSON with machine, versions, seed and command.

    python benchmarks/lazy_neuron.py              # about 8 minutes on one core
    python benchmarks/lazy_neuron.py --quick      # half a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from corp import Bench
from torch import Tensor, nn
from torch.nn import functional

from vitrim.layers.top_k import TopKLinear, top_entries
from vitrim.models.features import evaluating
from vitrim.output.provenance import environment

D_HIDDEN = 768
NUM_BINS = 15  # of the calibration error
# What is done to images of values in 0..1.
NOISES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "Gaussian": lambda images, generator: images + 0.1 * torch.randn(images.shape, generator=generator),
    "impulse": lambda images, generator: impulses(images, 0.07, generator),
    "shot": lambda images, generator: torch.poisson(50 * images, generator=generator) / 50,
}
# Tokens, hidden units and model width of the products that are timed.
PRODUCTS = {
    "ViT-B, 4 images": (788, 3072, 768),
    "ViT-B, 1 token": (1, 3072, 768),
    "CIFAR-10 ViT, 16 images": (1040, 768, 192),
}
ONE_IN = (12, 24, 48, 96)  # the paper's Top-128 of 3072 is one in 24


def main() -> None:
    """Noise, then wrong labels, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--active", type=int, nargs="+", default=[128, 32], help=f"units of {D_HIDDEN}")
    parser.add_argument("--wrong", type=float, nargs="+", default=[0.0, 0.4, 0.8], help="shares of wrong labels")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--num-train", type=int, default=640)
    parser.add_argument("--steps", type=int, default=200, help="of 16 images")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--rounds", type=int, default=9, help="of timing; the fastest counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lazy_neuron.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.active, arguments.wrong, arguments.num_test, arguments.steps = [128], [0.0, 0.4], 100, 2
        arguments.rounds = 2
    result: dict[str, Any] = {
        "environment": environment(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "times": times(arguments.rounds, arguments.seed),
    }
    print(time_table(result), flush=True)
    result |= robustness(Robustness(arguments))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{noise_table(result)}\n\n{label_table(result)}")


def robustness(bench: Robustness) -> dict[str, list[dict[str, Any]]]:
    """Rows of both checks."""
    noise, labels = [], []
    for active in (D_HIDDEN, *bench.arguments.active):
        start = bench.top_k(active)
        noise.append({"trained": False, "active": active, "scores": bench.under_noise(start)})
        for wrong in bench.arguments.wrong:
            trained = bench.trained(start, wrong)
            labels.append({"wrong": wrong, "active": active, "scores": bench.clean(trained)})
            if wrong == 0:
                noise.append({"trained": True, "active": active, "scores": bench.under_noise(trained)})
            print(labels[-1], flush=True)
    return {"noise": noise, "labels": labels}


class Robustness(Bench):
    """The bench of corp.py, with noise and with training on labels."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(1, arguments.num_test, arguments.seed)
        self.arguments = arguments
        known: Any = self.teacher.pretrained_cfg
        self.mean, self.std = (torch.tensor(known[name])[:, None, None] for name in ("mean", "std"))
        (batch,) = self.train.subset(range(arguments.num_train)).loader(batch_size=arguments.num_train)
        self.images, self.labels = batch.images_BCHW, batch.labels_B

    def top_k(self, active: int) -> nn.Module:
        """The model with so many hidden units active for a token, not trained; dense with all of them."""
        if active == D_HIDDEN:
            return self.teacher
        return self.cut(self.teacher, {"method": "top-k", "options": {"num_active": active}})[0]

    def trained(self, start: nn.Module, wrong: float) -> nn.Module:
        """A copy trained on labels of which a share is another class; same images and order for every model."""
        model = copy.deepcopy(start).requires_grad_(True)
        generator = torch.Generator().manual_seed(self.seed)
        spoiled = torch.rand(len(self.labels), generator=generator) < wrong
        others = (self.labels + torch.randint(1, 10, self.labels.shape, generator=generator)) % 10
        labels = torch.where(spoiled, others, self.labels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.arguments.lr)
        for _ in range(self.arguments.steps):
            rows = torch.randperm(len(labels), generator=generator)[:16]
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(self.images[rows])
            functional.cross_entropy(scores.float(), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return model.requires_grad_(False)

    def clean(self, model: nn.Module) -> dict[str, float]:
        """Top-1 and calibration error in percent on the test images as they are."""
        return self.judge(model, lambda images, _: images)

    def under_noise(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """The same on clean images and under each noise."""
        return {"clean": self.clean(model)} | {name: self.judge(model, noise) for name, noise in NOISES.items()}

    def judge(self, model: nn.Module, noise: Callable[[Tensor, torch.Generator], Tensor]) -> dict[str, float]:
        """Top-1 and calibration error in percent, every model on the same noise."""
        generator, sure, right = torch.Generator().manual_seed(self.seed), [], []
        with evaluating(model):
            for batch in self.test:
                noisy = noise(batch.images_BCHW * self.std + self.mean, generator).clamp(0, 1)
                best = model((noisy - self.mean) / self.std).softmax(-1).max(-1)
                sure.append(best.values)
                right.append(best.indices == batch.labels_B)
        return {
            "top1": 100 * float(torch.cat(right).double().mean()),
            "ece": 100 * ece(torch.cat(sure), torch.cat(right)),
        }


def impulses(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of all values becomes 0 or 1."""
    drawn = torch.rand(images.shape, generator=generator)
    return torch.where(drawn < share, (drawn < share / 2).to(images), images)


def ece(sure_N: Tensor, right_N: Tensor) -> float:
    """Expected calibration error: how far accuracy is from confidence, over bins of equal confidence."""
    bins = (sure_N * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64).index_add(0, bins, right_N.double() - sure_N.double())
    return float(gaps.abs().sum()) / len(sure_N)


@torch.inference_mode()
def times(rounds: int, seed: int) -> list[dict[str, Any]]:
    """Milliseconds of the dense output projection, and as ratios of it: choosing entries, Top-k masked and gathered."""
    torch.set_num_threads(1)  # or `process_time` would add up those of all threads
    generator, rows = torch.Generator().manual_seed(seed), []
    for name, (num_tokens, d_hidden, d_model) in PRODUCTS.items():
        linear, hidden = nn.Linear(d_hidden, d_model), torch.randn(num_tokens, d_hidden, generator=generator)
        repeats = max(1, 500 // num_tokens)
        for one_in in ONE_IN:
            active = d_hidden // one_in
            masked, gathered = (TopKLinear.of(copy.deepcopy(linear), active, by="magnitude") for _ in range(2))
            gathered.gather_()
            runs: dict[str, Callable[[Tensor], Any]] = {
                "dense": linear.forward,
                "choosing": lambda hidden, active=active: top_entries(hidden, active, by="magnitude"),
                "masked": masked.forward,
                "gathered": gathered.forward,
            }
            found: dict[str, list[float]] = {run: [] for run in runs}
            for run in [run for _ in range(rounds) for run in runs]:
                started = time.process_time()
                for _ in range(repeats):
                    runs[run](hidden)
                found[run].append((time.process_time() - started) / repeats)
            best = {run: min(seconds) for run, seconds in found.items()}
            ratios = {run: best[run] / best["dense"] for run in runs if run != "dense"}
            about = {"model": name, "d_hidden": d_hidden, "active": active, "dense_ms": 1000 * best["dense"]}
            rows.append({**about, **ratios})
    return rows


def time_table(result: dict[str, Any]) -> str:
    """The table of times as the documentation shows it."""
    lines = [
        "| output projection of | active | dense | choosing alone | masked | gathered |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["times"]:
        ratios = " | ".join(f"{row[run]:.2f}" for run in ("choosing", "masked", "gathered"))
        lines.append(f"| {row['model']} | {row['active']} of {row['d_hidden']} | {row['dense_ms']:.2f} ms | {ratios} |")
    return "\n".join(lines)


def noise_table(result: dict[str, Any]) -> str:
    """The table of noise as the documentation shows it: top-1, and on clean images the calibration error."""
    lines = [
        f"| trained behind it | active of {D_HIDDEN} | clean (ECE) | " + " | ".join(NOISES) + " |",
        "|---|---|---|" + "---|" * len(NOISES),
    ]
    for row in sorted(result["noise"], key=lambda row: row["trained"]):
        scores, trained = row["scores"], "yes" if row["trained"] else "no"
        noisy = " | ".join(f"{scores[name]['top1']:.1f}" for name in NOISES)
        lines.append(f"| {trained} | {row['active']} | {cell(scores['clean'])} | {noisy} |")
    return "\n".join(lines)


def label_table(result: dict[str, Any]) -> str:
    """The table of wrong labels as the documentation shows it: top-1 and calibration error on clean test images."""
    actives = list(dict.fromkeys(row["active"] for row in result["labels"]))
    titles = " | ".join(f"{active} of {D_HIDDEN} active" for active in actives)
    lines = [f"| wrong labels | {titles} |", "|---|" + "---|" * len(actives)]
    for wrong in dict.fromkeys(row["wrong"] for row in result["labels"]):
        cells = [cell(row["scores"]) for row in result["labels"] if row["wrong"] == wrong]
        lines.append(f"| {wrong:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(scores: dict[str, float]) -> str:
    """Top-1, and the calibration error in parentheses."""
    return f"{scores['top1']:.1f} ({scores['ece']:.1f})"


if __name__ == "__main__":
    main()
