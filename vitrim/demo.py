"""The demo: a pretrained ViT that comes with vitrim loses half its parameters, recovers, and is loaded again."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

NAMES = {
    "parameters": "parameters",
    "macs": "MACs per image",
    "top1": "top-1 (%)",
    "knn": "kNN (%)",
    "linear_probe": "linear probe (%)",
}
HEADER = ("360 test digits", "original", "small")


def run_demo(
    out: Path, *, recover_steps: int, say: Callable[[str], None], resume: bool = False, overwrite: bool = False
) -> tuple[tuple[str, ...], list[tuple[str, str, str]]]:
    """Inspect, compress to half the parameters, repair, distil without labels, save, reload with plain timm, evaluate.

    Args:
        out: folder to write.
        recover_steps: steps of distillation.
        say: called with a sentence at each stage.
        resume: go on with a stopped demo that was writing `out`.
        overwrite: replace an output of vitrim at `out`, and delete the state of a stopped demo.

    Returns:
        Header and rows of a before/after table, on the 360 test digits.
    """
    import timm

    from vitrim.compression.pipeline import compress
    from vitrim.evaluation import evaluate
    from vitrim.inspection import inspect
    from vitrim.output.stage import check_place
    from vitrim.report.summary import latency_rows

    check_place(out, resume=resume, overwrite=overwrite)
    with as_file(files("vitrim") / "assets" / "digits-vit") as folder:
        model = f"local-dir:{folder}"
        found = inspect(model, params_ratio=0.5)
        share, row = found.parameters["mlp"] / found.parameters["total"], found.predicted[0]
        say(f"Digits ViT: {found.parameters['total']:,} parameters, {share:.0%} in {len(found.sites)} MLPs.")
        width = f"from {found.sites[0].d_hidden} to {row.widths} hidden units"
        say(f"Cutting every MLP {width}, with 1,437 unlabelled training images ...")
        recover = {"steps": recover_steps, "batch_size": 64, "augment": "none"}
        place = {"out": out, "resume": resume, "overwrite": overwrite}
        compress(model, data="digits", params_ratio=0.5, recover=recover, **place)
        small = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        say(f"Reloaded with plain timm: timm.create_model('local-dir:{out}', pretrained=True)")
        measured = evaluate(small, model, "digits", index="digits", split="test")
    theirs, mine = measured.teacher.to_json(), measured.student.to_json()
    rows = [(name, _text(theirs[key]), _text(mine[key])) for key, name in NAMES.items()]
    rows += [(name, "1", text) for name, text in latency_rows(measured.student.cost).items()]
    rows.append(("cosine of CLS to the original", "1", f"{measured.fidelity['pooled_cosine']:.5f}"))
    rows.append(("relative error of all tokens", "0", f"{measured.fidelity['relative_error']:.5f}"))
    return HEADER, rows


def _text(value: float) -> str:
    """Return a number as text for the table."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
