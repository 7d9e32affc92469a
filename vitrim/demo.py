"""The demo: a real pretrained ViT that comes with the package loses half its parameters, recovers, and loads again."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def run_demo(out: Path, *, steps: int, console: Console) -> dict[str, Any]:
    """Inspect, compress to MLP ratio 1, repair, distil without labels, save, reload with plain timm, evaluate.

    Args:
        out: folder to write.
        steps: distillation steps.
        console: where to print.

    Returns:
        What `evaluate` found on the 360 test digits.
    """
    import timm

    from vitrim.compression.pipeline import compress
    from vitrim.evaluation import evaluate
    from vitrim.inspection import inspect

    with as_file(files("vitrim") / "assets" / "digits-vit") as folder:
        model = f"local-dir:{folder}"
        found = inspect(model)
        share = found.parameters["mlp"] / found.parameters["total"]
        console.print(f"Digits ViT: {found.parameters['total']:,} parameters, {share:.0%} in {len(found.sites)} MLPs.")
        console.print("Cutting every MLP from 384 to 96 hidden units with 1,437 unlabelled training images ...")
        compress(
            model,
            data="digits",
            mlp_ratio=1.0,
            recover={"steps": steps, "batch_size": 64, "augment": "none"},
            out=out,
        )
        small = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        console.print(f"Reloaded with plain timm: timm.create_model('local-dir:{out}', pretrained=True)")
        measured = evaluate(small, model, "digits", index="digits", split="test")
    table = Table("360 test digits", "original", "small", title="Before and after")
    names = {
        "parameters": "parameters",
        "macs": "MACs per image",
        "top1": "top-1 (%)",
        "knn": "kNN (%)",
        "linear_probe": "linear probe (%)",
    }
    for key, name in names.items():
        before, after = (measured[who][key] for who in ("teacher", "student"))
        table.add_row(name, *(f"{v:,}" if isinstance(v, int) else f"{v:.2f}" for v in (before, after)))
    for size in measured["teacher"]["latency"]:
        times = [measured[who]["latency"][size]["median_ms"] for who in ("teacher", "student")]
        table.add_row(f"latency, batch {size} (ms)", *(f"{t:.2f}" for t in times))
    table.add_row("cosine of CLS to the original", "1", f"{measured['fidelity']['pooled_cosine']:.5f}")
    table.add_row("relative error of all tokens", "0", f"{measured['fidelity']['relative_error']:.5f}")
    console.print(table)
    console.print(f"Open {out / 'report.html'} for the pictures.")
    return measured
