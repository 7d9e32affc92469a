"""Commands around finished models and the machine: report, export, push, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vitrim.cli.app import Json, app
from vitrim.cli.console import print_json, print_notes, print_table, say
from vitrim.types import Form, Layout, Precision


@app.command
def report(*folders: Path, out: Path) -> None:
    """Compare output folders of one original, on a page with a table and a picture of cost against closeness.

    Example: vitrim report small-dgmr small-corp small-amp --out compare.html

    Args:
        folders: two or more folders that compress wrote; no model is loaded.
        out: HTML file to write; it must not exist.
    """
    from vitrim.report.compare import compare_runs

    header, rows, notes = compare_runs(folders, out)
    print_table(header, rows)
    print_notes(notes)
    say(f"Report: {out}")


@app.command
def export(
    model: str,
    *,
    out: Path,
    to: Form = "onnx",
    precision: Precision = "fp32",
    layout: Layout = "file",
    data: str | None = None,
    tokens: Annotated[bool, Parameter(negative="")] = False,
    opset: int | None = None,
    as_json: Json = False,
) -> None:
    """Write a model in a form that runs without its library, and compare it with PyTorch.

    Example: vitrim export small --to onnx --out small.onnx --data photos/

    Args:
        model: a folder that vitrim wrote, or any model that compress takes.
        out: file to write, ending in .onnx (also tensorrt), .xml (openvino), .pt2 (torch), .pte (executorch),
            .mlpackage (coreml) or .tflite (litert); it must not exist.
        to: the runtime to write for.
        precision: of the weights, by the runtime's own way.
        layout: transformers-js makes `out` the folder that Transformers.js loads, with an ONNX file of this precision;
            a second export adds another precision.
        data: images to compare on, in addition to noise.
        tokens: export the pooled vector and the patch tokens instead of the model's own output.
        opset: ONNX opset; by default the one that torch prefers.
    """
    from vitrim.cost.memory import show_bytes
    from vitrim.metrics.record import relative_latency
    from vitrim.output.export import export as run
    from vitrim.output.runtimes import RUNTIMES

    asked = {"to": to, "precision": precision, "layout": layout, "data": data, "tokens": tokens, "opset": opset}
    found = run(model, out, **asked)
    if as_json:
        return print_json(found.to_json())
    for name, difference in found.differences.items():
        say(f"Largest difference from PyTorch on {name}: {difference:.1e} (allowed {found.tolerance:g})")
    if found.latency:
        times = found.latency[to]
        row = (to, *(relative_latency(found) for found in times.values()))
        print_table(("time on the CPU, 1 is PyTorch's", *(f"batch {size}" for size in times)), [row])
    elif found.differences:
        say(f"Compared in {RUNTIMES[to].stands_in}; {to} itself did not run, so nothing was timed.")
    else:
        say(f"{to} does not run on this system: the file's description was read back, nothing was compared or timed.")
    opset_said = "" if found.opset is None else f", opset {found.opset}"
    batch = "1 image" if found.largest_batch == 1 else f"1 to {found.largest_batch} images"
    size = show_bytes(found.num_bytes)
    say(f"Written: {found.path}, {size}{opset_said}, takes {batch} at a time, gives {', '.join(found.outputs)}")
    if found.next_step is not None:
        say(f"Next: {found.next_step}")


@app.command
def push(
    folder: Path,
    repo: str,
    *,
    yes: Annotated[bool, Parameter(negative="", help="send it; without, only show what would be sent")] = False,
    public: Annotated[bool, Parameter(negative="", help="of a new repository; without, it is private")] = False,
    as_json: Json = False,
) -> None:
    """Upload an output, with its model card, to the Hugging Face hub.

    Example: vitrim push small my-org/dinov2-base-half --yes

    Args:
        folder: a folder that vitrim wrote.
        repo: ORG/NAME; created if it does not exist.
    """
    from vitrim.cost.memory import show_bytes
    from vitrim.output.hub import push as run

    found = run(folder, repo, confirm=yes, private=not public)
    if as_json:
        return print_json(found.__dict__)
    if found.url is not None:
        return say(f"Uploaded: {found.url}")
    print_table(("file", "size"), [(name, show_bytes(size)) for name, size in found.files.items()])
    say(f"Nothing was sent. To upload these to {repo}, give --yes.")


@app.command
def doctor(*, as_json: Json = False) -> None:
    """Show what a run will find on this machine: versions, devices, threads, free memory and disk.

    Example: vitrim doctor
    """
    from vitrim.cost.memory import show_bytes
    from vitrim.machine import doctor as look

    found = look()
    if as_json:
        return print_json(found)
    print_table(("package", "version"), list(found["versions"].items()))
    rows = [
        (name, ", ".join(f"{package} {version or 'missing'}" for package, version in packages.items()))
        for name, packages in found["extras"].items()
    ]
    print_table(("extra", "packages"), rows)
    say(f"Devices: {', '.join(found['devices'])}; --device auto takes {found['device']}")
    say(f"Threads: {found['threads']} on {found['cores']} cores")
    say(f"Free: {show_bytes(found['memory'])} of memory, {show_bytes(found['disk'])} of disk here")
    print_notes(found["problems"])
