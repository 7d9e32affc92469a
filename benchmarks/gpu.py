"""What a cut is worth on a GPU, and whether a GPU cuts as the CPU does; nothing is downloaded, all weights are random.

Latency of DINOv2-g, EVA-CLIP-E and SigLIP2 so400m with half of their parameters, by turns with the original, at batch
1, 8, 64 and 256 in bf16 and fp32: as written (`eager`), with every block compiled (`compiled`), and those blocks
replayed as one CUDA graph (`graphs`); peak memory of a pass. First the digits ViT is cut on the CPU and on the GPU from
the same images: the picks that agree, and how far the outputs are apart. What would not end in time is left out and
said. Without a CUDA device it says so and ends well.

    python benchmarks/gpu.py                    # under 9 minutes on one GPU of 80 GB
    python benchmarks/gpu.py --models "DINOv2-g" --batches 1 64 --modes eager
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitrim
from vitrim.compression.budget import solve_widths
from vitrim.config.recipe import Recipe
from vitrim.cost.count import num_parameters
from vitrim.cost.latency import measure_latency
from vitrim.data import open_images, transform_for
from vitrim.metrics.record import relative_latency
from vitrim.models.features import device_of, evaluating
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.provenance import environment
from vitrim.surgery import KeepUnits, apply_

ROOT = Path(__file__).resolve().parents[1]
DIGITS = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
MODELS = {
    "SigLIP2 so400m": ("vit_so400m_patch14_siglip_224", {}),
    "DINOv2-g": ("vit_giant_patch14_dinov2", {"img_size": 224}),
    "EVA-CLIP-E": ("eva02_enormous_patch14_clip_224", {}),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODES = ("eager", "compiled", "graphs")
ROUNDS = 5
# Of half of the digits ViT's units, cut on two devices: float64 sums differ in their order alone, and refits in float32
# come after the picks.
CORRECT = {
    "closed form": {"method": "dgmr", "repair": {"refit": False}},
    "with refit": {"method": "dgmr"},
    "corp, attention too": {"method": "corp", "options": {"parts": "both"}},
}


def main() -> None:
    """Measure all that there is time for; rows are written as they are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--minutes", type=float, default=8.5, help="what has not begun by then is left out")
    parser.add_argument("--seconds", type=float, default=12.0, help="for one row; a slower one is left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device here, so nothing is measured; run this on a machine that has one.")
        return
    clock, device = Clock(arguments.minutes, arguments.seconds), torch.device("cuda")
    result: dict[str, Any] = {"environment": environment(), "correctness": correctness("cpu", "cuda"), "rows": []}
    print(json.dumps(result["correctness"], indent=1), flush=True)
    for name in arguments.models:
        for row in rows_of(name, device, arguments.batches, arguments.modes, clock):
            result["rows"].append(row)
            print(line(row), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps({**result, "minutes": clock.minutes}, indent=1) + "\n")
    print(f"\n{markdown(result)}\n\n{clock.minutes:.1f} minutes; {arguments.out}")


class Clock:
    """How much time there is: in all, and for one row."""

    def __init__(self, minutes: float, seconds: float) -> None:
        self.started, self.most_minutes, self.most_seconds = time.monotonic(), minutes, seconds

    @property
    def minutes(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.started) / 60

    def refusal(self, seconds: float) -> str | None:
        """Return why a row that is expected to take so long is left out, or None."""
        if self.minutes > self.most_minutes:
            return f"left out: {self.most_minutes:g} minutes are over"
        return f"left out: {seconds:.0f} s expected" if seconds > self.most_seconds else None


def rows_of(
    name: str,
    device: torch.device,
    batches: Sequence[int],
    modes: Sequence[str],
    clock: Clock,
    backend: str = "inductor",
) -> Iterator[dict[str, Any]]:
    """Yield a row for each type, mode and batch: latency of both sizes by turns, and peak memory of each."""
    source, model_args = MODELS[name]
    whole, half = pair(source, model_args, device)
    example = torch.randn(1, 3, *whole.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    counts = {"original": num_parameters(whole), "half": num_parameters(half)}
    for dtype, kind in DTYPES.items():
        whole, half = whole.to(kind), half.to(kind)
        for mode in modes:
            last = 0.0  # seconds of one pass of both, per image, at the batch before
            prepare_((whole, half), mode, backend)
            for batch in batches:
                row = {"model": name, "dtype": dtype, "mode": mode, "batch": batch, "parameters": counts}
                refused = clock.refusal(last * batch * (ROUNDS + 2))
                found = {"refused": refused} if refused else measure((whole, half), example, mode, batch, clock)
                if "latency" in found:
                    last = sum(each["median_ms"] for each in found["latency"].values()) / 1e3 / batch
                yield {**row, **found}


def pair(source: str, model_args: dict[str, Any], device: torch.device) -> tuple[Any, nn.Module]:
    """Return a model with random weights, and a copy with equal MLPs and half of its parameters."""
    import timm

    torch.manual_seed(0)
    with torch.device(device):
        whole = timm.create_model(source, num_classes=0, **model_args).eval().requires_grad_(False)
    half, sites = copy.deepcopy(whole), find_mlps(whole)
    widths = solve_widths(Recipe.parse({"params_ratio": 0.5}).width(), sites, whole, None)
    apply_(half, [KeepUnits.first(site, widths[site.path]) for site in sites])
    return whole, half.requires_grad_(False)


def prepare_(models: Sequence[nn.Module], mode: str, backend: str) -> None:
    """Compile every block, one graph for all that are alike; `eager` undoes it."""
    torch.compiler.reset()
    for model in models:
        for block in model.blocks:  # type: ignore[union-attr]
            block._compiled_call_impl = None
            if mode != "eager":
                block.compile(backend=backend)


def measure(models: Sequence[nn.Module], example: Tensor, mode: str, batch: int, clock: Clock) -> dict[str, Any]:
    """Time both models by turns at one batch, and take the peak memory of a pass; what fails says why."""
    try:
        memory = [peak_mib(model, example, batch) for model in models]
        run = [Replayed(model, example, batch) for model in models] if mode == "graphs" else models
        found = measure_latency(run, example, batch_sizes=(batch,), rounds=ROUNDS, max_seconds=clock.most_seconds)
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        return {"refused": f"failed: {' '.join(str(error).split())[:200]}"}
    if batch not in found[0]:
        return {"refused": f"left out: over {clock.most_seconds:g} s"}
    latency = {size: dict(row[batch]) for size, row in zip(("original", "half"), found, strict=True)}
    return {"latency": latency, "peak_mib": dict(zip(latency, memory, strict=True))}


def peak_mib(model: nn.Module, example: Tensor, batch: int) -> float | None:
    """Return the most memory that is taken during a pass, weights of this model and activations; None off CUDA."""
    device = device_of(model)
    if device.type != "cuda":
        return None
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with evaluating(model):
        images = example.to(device, next(model.parameters()).dtype).repeat(batch, 1, 1, 1)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        model(images)
        torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before + weights) / 2**20


class Replayed(nn.Module):
    """A model at one batch, recorded once as a CUDA graph: a pass copies the images in and replays it."""

    def __init__(self, model: nn.Module, example: Tensor, batch: int) -> None:
        super().__init__()
        self.model, self.graph = model, torch.cuda.CUDAGraph()
        with evaluating(model):
            self.images = example.to(device_of(model), next(model.parameters()).dtype).repeat(batch, 1, 1, 1)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    model(self.images)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.output = model(self.images)

    def forward(self, images: Tensor) -> Tensor:
        """Return the output of the replay, which the next one overwrites."""
        self.images.copy_(images)
        self.graph.replay()
        return self.output


def correctness(first: str, second: str, num_images: int = 256) -> dict[str, dict[str, float]]:
    """Cut the digits ViT on two devices from the same images; shares of equal picks, difference of the outputs."""
    teacher, _ = open_model(DIGITS)
    images = next(iter(open_images("digits", transform=transform_for(teacher), split="test").loader(batch_size=200)))
    found = {}
    for name, recipe in CORRECT.items():
        asked = {**recipe, "keep_ratio": 0.5, "calibrate": {"num_images": num_images}}
        runs = [
            vitrim.compress(teacher, data="digits", recipe=asked, device=each, quiet=True) for each in (first, second)
        ]
        outputs = []
        for run in runs:
            assert run.model is not None
            with evaluating(run.model):
                outputs.append(run.model.cpu()(images.images_BCHW))
        errors = [run.metrics.after_cut.relative_error for run in runs if run.metrics.after_cut is not None]
        found[name] = {
            "equal_picks": equal_picks(*(run.plan.edits for run in runs)),
            "difference": float((outputs[0] - outputs[1]).norm() / outputs[0].norm()),
            **{f"relative_error_{when}": error for when, error in zip((first, second), errors, strict=False)},
        }
    return found


def equal_picks(mine: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Return the share of the hidden units that two plans keep that both keep."""
    pairs = [(set(a.keep), set(b.keep)) for a, b in zip(mine, theirs, strict=True) if isinstance(a, KeepUnits)]
    return sum(len(a & b) for a, b in pairs) / max(1, sum(len(a) for a, _ in pairs))


def line(row: dict[str, Any]) -> str:
    """Return one row in words."""
    where = f"{row['model']} {row['dtype']} {row['mode']} batch {row['batch']}"
    if "refused" in row:
        return f"{where}: {row['refused']}"
    one, other = row["latency"].values()
    return f"{where}: {one['median_ms']:.2f} -> {other['median_ms']:.2f} ms, {relative_latency(other)}"


def markdown(result: dict[str, Any]) -> str:
    """Return the table as the documentation shows it."""
    lines = [
        "| model | type | mode | batch | original (ms) | half (ms) | relative | peak memory (MiB) |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        head = f"| {row['model']} | {row['dtype']} | {row['mode']} | {row['batch']} |"
        if "refused" in row:
            lines.append(f"{head} {row['refused']} | | | |")
            continue
        one, other = row["latency"].values()
        memory = " -> ".join("-" if each is None else f"{each:,.0f}" for each in row["peak_mib"].values())
        ratio = relative_latency(other)
        lines.append(f"{head} {one['median_ms']:.2f} | {other['median_ms']:.2f} | {ratio} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
