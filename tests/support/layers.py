"""The layers of the package and what each part is, from which docs/architecture.md is written.

`python -m tests.support.layers` prints the table, with `--write` it puts it into the page; `test_architecture.py` holds
the imports and the page to it.
"""

from __future__ import annotations

import sys

from tests.support.processes import ROOT

# Lowest first. A file may import from lower layers, and a file of a package from that package.
LAYERS: tuple[dict[str, str], ...] = (
    {
        "errors": "what can go wrong, each kind with a line that says what to do",
        "progress": "bars, and messages to the log",
        "stopping": "SIGTERM taken as Ctrl-C",
        "tokens": "what is read of images: the one description that reads, compares, distils and prints go by",
        "torch_state": "torch's global state, held still for the time of an entry point",
    },
    {
        "catalog": "what methods and options say of themselves, read without importing torch",
        "checked": "the base of everything a user fills in: frozen, checked, unknown keys refused",
        "share": "one process's part of the images of a run, and how it agrees with the others",
        "types": "what all others speak of: an MLP's place and weights, sums, what a method sees",
        "inputs": "images as named tensors, for models that take more than one of all images",
        "storage": "tensors and JSON in files, read and written piece by piece",
    },
    {
        "ops": "tensor maths that knows no model, file or image",
        "layers": "modules that edits put in the place of others",
    },
    {"surgery": "edits and plans; the only place where modules change"},
    {
        "models": "models of other libraries: loading, finding MLPs, reading features, writing configs back",
        "methods": "one file a paper; each decides what is to be cut",
    },
    {"config": "what the user asked for: recipe, steps, options, widths, and the context of a run"},
    {
        "calibrate": "a walk through both models, block by block, that sums up what methods and repair need",
        "data": "images, texts and captions: opening, checking, splitting, streaming",
        "metrics": "how close features are and what they are good for; what a run measured, as one value",
    },
    {
        "report": "the pages with pictures",
        "cost": "parameters, multiply-accumulates, latency, and the memory that a run will need",
        "distributed": "devices, processes, precision, shards of a model",
    },
    {"repair": "the local refit of an MLP, and training block by block"},
    {"recover": "distillation of the whole model, and training all of its blocks at once"},
    {"output": "the folder that a run leaves: writing, checking, loading, exporting, uploading"},
    {
        "clip": "pairs of an image and a text tower: zero-shot, retrieval, tuning the text tower",
        "evaluation": "two models side by side on images",
    },
    {
        "compression": "the jobs: compress, prune in place, prune file to file, slice, compare methods",
        "together": "several models and their originals, whose scores are added",
    },
    {
        "inspection": "a look at a model before anything is cut",
        "machine": "what is installed, and what this machine has",
    },
    {"demo": "the model that comes with the package, halved"},
    {"cli": "commands, without logic of their own", "__init__": "the public names"},
    {"__main__": "`python -m vitrim`, which is the command"},
)
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- table: python -m tests.support.layers --write -->\n", "<!-- end of table -->\n"


def table() -> str:
    """The layers in Markdown, lowest first."""
    lines = ["| Layer | Part | What it is |", "|---|---|---|"]
    for height, parts in enumerate(LAYERS):
        lines += [f"| {height} | `{name}` | {about} |" for name, about in parts.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or put it into the page."""
    if "--write" not in sys.argv:
        print(table())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
