"""Everything that a report can show, and folders as runs leave them."""

from __future__ import annotations

import json

import torch

from vitrim.config.recipe import Recipe
from vitrim.report.data import ReportData


def report_data() -> ReportData:
    """A report with every part."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 64, 32, generator=generator)
    student = teacher + 0.2 * torch.randn(8, 64, 32, generator=generator)
    curve = [max(0.0, 1 - k / 96) ** 2 for k in range(97)]
    return ReportData(
        model="vit_tiny",
        method="dgmr",
        command="vitrim compress vit_tiny --ratio 0.5",
        summary={
            "parameters": {"before": 22_056_576, "after_cut": 11_400_000, "after": 11_400_000},
            "MACs per image": {"before": 4.6e9, "after_cut": 2.4e9, "after": 2.4e9},
            "relative error": {"before": 0.0, "after_cut": 0.35, "after": 0.118, "images": 512},
            "cosine CLS": {"before": 1.0, "after_cut": 0.91, "after": 0.9731, "images": 512},
            "top-1 (%)": {"before": 81.1, "after_cut": None, "after": 79.2, "images": 500},
        },
        sites=[
            {"path": f"blocks.{i}.mlp", "kind": "plain", "width_before": 384, "width_after": 96 + 32 * i}
            for i in range(6)
        ],
        edits=[],
        block_errors=[{"block": i, "after_cut": 0.1 + 0.04 * i, "after": 0.02 * (i + 1)} for i in range(6)],
        residual_curves={
            f"blocks.{i}.mlp": {
                "residual": curve,
                "num_units": 384,
                "cut": 48,
                "picks": list(range(97)),
            }
            for i in range(6)
        },
        recovery=[
            *({"step": step, "relative_error": 0.35 / (1 + step / 50)} for step in range(0, 101, 10)),
            *({"step": step, "loss": 0.5 / (1 + step / 50)} for step in range(101)),
        ],
        latency={"before": {1: 12.0, 8: 80.0, 32: 1300.0}, "after": {1: 8.0, 8: 50.0, 32: 700.0}},
        relative_latency={
            "relative latency, batch 1": "0.67 (0.66 to 0.68)",
            "relative latency, batch 64": "0.70 (noisy, 0.50 to 0.90)",
        },
        images=torch.rand(8, 3, 32, 32, generator=generator),
        teacher_patches=teacher,
        student_patches=student,
        grid=(8, 8),
        neighbours={
            "num_images": 6,
            "overlap": 0.75,
            "queries": [
                {"image": 0, "original": [1, 2], "smaller": [3, 1]},
                {"image": 4, "original": [5, 0], "smaller": [5, 0]},
            ],
            "thumbnails": {i: torch.rand(3, 32, 32, generator=generator) for i in range(6)},
            "labels": {i: -1 if i == 5 else i % 2 for i in range(6)},
        },
        answers={"labels": [0, 0, 1, 2, 2, -1], "before": [0, 0, 0, 2, 2, 2], "after": [0, 2, 1, 2, 1, 0]},
        recipe_yaml="model: vit_tiny\nmethod: dgmr\n",
        environment={"torch": "2.14.1"},
        recovered=True,
        notes=["Measured with one thread."],
        num_images=512,
        judged_on="Quality is on 512 images held out from the given data.",
    )


def write_run(
    folder,
    *,
    parameters=600,
    error=0.1,
    ms=5.0,
    spread=0.02,
    original_ms=10.0,
    data="photos",
    machine="cpu 1",
    **changes,
):
    """A folder with what the page reads of a run; its latency has the given quartiles around `ms` of 10."""

    def cost(count, time):
        ratio = {"ratio": time / 10.0, "ratio_quartiles": [time / 10.0 - spread / 2, time / 10.0 + spread / 2]}
        latency = {"8": {"median_ms": time, "iqr_ms": 0.1, **ratio}}
        sizes = {"parameters": count, "num_bytes": 4 * count}
        return {**sizes, "macs": 10 * count, "peak_memory_mib": 1.0, "latency": latency}

    metrics = {
        "model": "vit",
        "method": "dgmr",
        "images": {"held_out": 10},
        "before": cost(1000, original_ms),
        "after": cost(parameters, ms),
        "after_cut": {"fidelity": {"relative_error": 2 * error, "pooled_cosine": 0.9, "num_images": 10}, "blocks": []},
        "after_recovery": {
            "fidelity": {"relative_error": error, "pooled_cosine": 0.95, "num_images": 10},
            "blocks": [],
        },
        "environment": {"device": "cpu", "machine": machine},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "recipe.yaml").write_text(Recipe(model="vit", data=data).dump())
    return folder
