"""Versions 4 of transformers: which load what vitrim writes beside version 5, and with which it works itself.

Each tiny model of `tests/support/families.py` is cut to about half of its units and saved, here and under each of
VERSIONS. Then each version loads each folder in a process in which vitrim can't be imported, and outputs are compared.

    nice python benchmarks/transformers4.py            # prints the table; makes environments in .cache, needs pip
    nice python benchmarks/transformers4.py --write    # puts it into docs/models.md
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python benchmarks/transformers4.py --write -->\n", "<!-- end of transformers 4 -->\n"
# The versions, each with what goes with it; all else comes from the environment of this script.
VERSIONS = {
    "4.57.1": ("tokenizers==0.22.1", "huggingface-hub==0.36.0"),
    "4.51.3": ("tokenizers==0.21.1", "huggingface-hub==0.30.2"),
}
TOLERANCE = 1e-5
Outcome = dict[str, Any]


def python_of(version: str) -> str:
    """The interpreter of an environment with one version, made if it is not there."""
    folder = ROOT / ".cache" / f"transformers-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        wanted = [f"transformers=={version}", *VERSIONS[version]]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted], check=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "zz_others.pth").write_text(sysconfig.get_path("purelib"))
    return str(python)


def cut(folder: Path) -> Outcome:
    """Cut and save every family with the transformers of this process; say where each lies, or what was raised."""
    from tests.support.families import FAMILIES

    found: Outcome = {}
    for number, (name, family) in enumerate(FAMILIES.items()):
        if family.source == "transformers":
            try:
                found[name] = cut_one(family, folder / str(number))
            except Exception as error:  # of whichever library
                found[name] = said(error)
    (folder / "jobs.json").write_text(json.dumps(found))
    return found


def cut_one(family: Any, folder: Path) -> Outcome:
    """Cut one family to about half of the units of each MLP, at a width that its config can say."""
    import torch
    from safetensors.torch import save_file

    from vitrim.models.features import first_tensor
    from vitrim.models.sites import find_mlps
    from vitrim.models.stock import in_proportion, nearest_stock_width
    from vitrim.output.save import save
    from vitrim.surgery import KeepUnits, Plan, apply_

    for part in ("source", "out"):
        (folder / part).mkdir(parents=True)
    model, origin = family.build(folder / "source")
    sites = [site.below(origin.encoder) for site in find_mlps(model.get_submodule(origin.encoder))]
    width = nearest_stock_width(origin, sites, sites[0].d_hidden // 2)
    assert width is not None
    edits = tuple(map(KeepUnits.first, sites, in_proportion(width, sites)))
    apply_(model, edits)
    assert save(folder / "out", model, origin=origin, plan=Plan(edits=edits, method="first"))
    with torch.no_grad():
        output = first_tensor(model.eval().get_submodule(origin.encoder)(family.inputs))
    save_file({"inputs": family.inputs, "output": output.contiguous()}, folder / "probe.safetensors")
    return {"folder": str(folder), "architecture": origin.architecture, "encoder": origin.encoder}


def read(folder: Path) -> Outcome:
    """Load every family of a folder by transformers alone: the largest difference, or what was raised."""
    sys.modules["vitrim"] = None  # type: ignore[assignment]
    jobs = json.loads((folder / "jobs.json").read_text())
    return {name: read_one(**job) for name, job in jobs.items() if isinstance(job, dict)}


def read_one(folder: str, architecture: str, encoder: str) -> float | str:
    """Load one family and run its encoder, which versions have in different places."""
    import torch
    import transformers
    from safetensors.torch import load_file

    probe = load_file(f"{folder}/probe.safetensors")
    try:
        model = getattr(transformers, architecture).from_pretrained(f"{folder}/out").eval()
        modules = dict(model.named_modules())
        paths = [encoder, encoder.removeprefix("model."), f"model.{encoder}"]
        paths += [path.removesuffix("vision_model").removesuffix(".") for path in paths]
        with torch.no_grad():
            output = next(modules[path] for path in paths if path in modules)(probe["inputs"])
        while not isinstance(output, torch.Tensor):
            output = output[0]
        return float((output - probe["output"]).abs().max() / probe["output"].abs().max())
    except Exception as error:  # of whichever library
        return said(error)


def said(error: Exception) -> str:
    """An error in a line; "" where this version has no such model."""
    text = str(error).partition("\n")[0]
    return "" if "has no attribute" in text and "transformers" in text else f"{type(error).__name__}: {text:.80}"


def verdict(found: float | str) -> str:
    """A cell of the table."""
    if isinstance(found, str):
        return found.replace("|", "\\|") or "-"
    return "yes" if found <= TOLERANCE else "no, other outputs"


def asked(python: str, what: str, folder: Path) -> Outcome:
    """What this script answers in a fresh process of an environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [python, __file__, what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(scratch: Path) -> str:
    """The table in Markdown."""
    from importlib.metadata import version

    here = version("transformers")
    pythons = {here: sys.executable, **{other: python_of(other) for other in VERSIONS}}
    for each in pythons:
        (scratch / each).mkdir()
    jobs = {each: asked(python, "--cut", scratch / each) for each, python in pythons.items()}
    pairs = [(here, other) for other in VERSIONS] + [
        pair for other in VERSIONS for pair in ((other, other), (other, here))
    ]
    columns = [jobs[cutter] | asked(pythons[reader], "--read", scratch / cutter) for cutter, reader in pairs]
    rows = [("Family", *(f"Cut with {cutter}, loaded with {reader}" for cutter, reader in pairs))]
    rows += [("---",) * len(rows[0])]
    rows += [(name.partition(": ")[2], *(verdict(column[name]) for column in columns)) for name in jobs[here]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    parser.add_argument("--cut", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if given.cut or given.read:
        print(json.dumps(cut(given.cut) if given.cut else read(given.read)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        made = table(Path(scratch))
    print(made)
    if given.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
