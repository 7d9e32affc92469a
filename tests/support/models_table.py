"""Measures what vitrim does to each family of models, and writes the table of docs/models.md from it.

`python -m tests.support.models_table` prints the table, with `--write` it puts it into the page. The tests in
`test_families.py` ask for the same measurements and say what they must be. Nothing is downloaded.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.families import FAMILIES, Family
from tests.support.processes import ROOT
from vitrim import load
from vitrim.compression.cut import cut_
from vitrim.config.options import RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.errors import ModelError
from vitrim.models.features import evaluating, features
from vitrim.models.load import backend_of
from vitrim.models.sites import find_mlps
from vitrim.models.stock import nearest_stock_width, stock_origin
from vitrim.output.save import save
from vitrim.output.verify import WITHOUT_VITRIM
from vitrim.surgery import KeepUnits, Plan, apply_, weight_of
from vitrim.tokens import Features
from vitrim.types import FeaturesAt, MlpSite

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.support.models_table --write -->\n", "<!-- end of table -->\n"
HEAD = ("Source", "Family", "MLP", "Where", "Cut = masked", "Loads again with", "Widths", "`torch.export`")
TOLERANCE = 1e-5

# Loads folders in a process where vitrim can't be imported, each by its library's own code, and compares outputs.
RELOAD_ALL = """
import json, sys, torch
from safetensors.torch import load_file
found = {}
for name, (source, encoder, code) in json.load(open(sys.argv[1])).items():
    try:
        scope = {"folder": source}
        exec(code, scope)
        probe = load_file(source + ".probe")
        with torch.no_grad():
            output = scope["model"].eval().get_submodule(encoder)(probe["inputs"])
        output = output if isinstance(output, torch.Tensor) else output[0]
        output = output if isinstance(output, torch.Tensor) else output[-1]  # of several maps the last
        found[name] = float((output - probe["output"]).abs().max() / probe["output"].abs().max())
    except Exception as error:
        found[name] = repr(error)
print(json.dumps(found))
"""


class Measured:
    """What is measured on one family, each thing when it is first asked for."""

    def __init__(self, family: Family, folder: Path) -> None:
        (folder / "source").mkdir(parents=True, exist_ok=True)
        self.family, self.folder, self.inputs = family, folder, family.inputs
        self.model, self.origin = family.build(folder / "source")
        self.sites = find_mlps(self.encoder_of(self.model))

    def encoder_of(self, model: nn.Module) -> nn.Module:
        """The part of a model that takes the images."""
        return model.get_submodule(self.origin.encoder)

    @cached_property
    def paths(self) -> Counter[str]:
        """Number of MLPs by path."""
        return Counter(re.sub(r"\d+", "*", site.path) for site in self.sites)

    @cached_property
    def output(self) -> Tensor:
        """What the uncut encoder puts out."""
        return run(self.encoder_of(self.model), self.inputs)

    def features(self, at: FeaturesAt) -> Features | None:
        """Pooled vector and patches of the uncut encoder; None where it has no final norm to read in front of."""
        try:
            with evaluating(self.encoder_of(self.model)):
                return features(self.encoder_of(self.model), self.inputs, at=at)
        except ModelError:
            return None

    def reordered(self, order: Callable[[int], Tensor]) -> Tensor:
        """What the encoder puts out with all units kept, in another order."""
        model = copy.deepcopy(self.encoder_of(self.model))
        apply_(model, [KeepUnits(site=s, keep=tuple(order(s.d_hidden).tolist())) for s in self.sites])
        return run(model, self.inputs)

    @cached_property
    def plan(self) -> Plan:
        """About half of the units of each MLP, drawn at random, at a width that the library can express if it can."""
        half = self.sites[0].d_hidden // 2
        return self._drawn(nearest_stock_width(self.origin, [self._whole(site) for site in self.sites], half) or half)

    def _drawn(self, width: int) -> Plan:
        """Units drawn at random, in random order: `width` of the first MLP, others in proportion to d_model."""
        edits = []
        for index, site in enumerate(self.sites):
            order = torch.randperm(site.d_hidden, generator=torch.Generator().manual_seed(index))
            num_keep = round(width * site.d_model / self.sites[0].d_model)
            edits.append(KeepUnits(site=site, keep=tuple(order[:num_keep].tolist())))
        return Plan(edits=tuple(edits), method="random")

    def _whole(self, site: MlpSite) -> MlpSite:
        return site.below(self.origin.encoder)

    @cached_property
    def student(self) -> nn.Module:
        """The whole model, cut."""
        student = copy.deepcopy(self.model)
        apply_(student, self.plan.below(self.origin.encoder).edits)
        return student

    @cached_property
    def cut_output(self) -> Tensor:
        """What the cut encoder puts out."""
        return run(self.encoder_of(self.student), self.inputs)

    @cached_property
    def masked(self) -> nn.Module:
        """The uncut encoder with zeros for the removed units in each output projection."""
        model = copy.deepcopy(self.encoder_of(self.model))
        for edit in self.plan.edits:
            removed = sorted({*range(edit.site.d_hidden)} - {*edit.keep})
            weight_of(model, edit.site.output)[:, removed] = 0
        return model

    @cached_property
    def masked_difference(self) -> float:
        """Cut against masked."""
        return difference(self.cut_output, run(self.masked, self.inputs))

    @cached_property
    def errors(self) -> dict[str, float]:
        """Squared error of outputs against the uncut model's, over their spread: masked, cut, cut with repair."""
        generator = torch.Generator().manual_seed(1)
        judged, *batches = [torch.randn(32, *self.inputs.shape[1:], generator=generator) for _ in range(8)]
        repaired = copy.deepcopy(self.encoder_of(self.model))
        recipe = Recipe(method="random", hidden_dim=self.plan.edits[0].width, repair=RepairOptions(refit=False))
        cut_(repaired, self.encoder_of(self.model), self.sites, recipe, batches, quiet=True)
        expected = run(self.encoder_of(self.model), judged)
        spread = (expected - expected.mean(0)).square().sum()
        models = {"masked": self.masked, "cut": self.encoder_of(self.student), "repaired": repaired}
        return {name: float((run(m, judged) - expected).square().sum() / spread) for name, m in models.items()}

    @cached_property
    def saved(self) -> tuple[Path, bool]:
        """The folder of the cut model, and whether its library should load it."""
        return self._save(self.student, "float32")

    def _save(self, student: nn.Module, name: str) -> tuple[Path, bool]:
        (self.folder / name).mkdir()
        stock = save(self.folder / name, student, origin=self.origin, plan=self.plan.below(self.origin.encoder))
        return self.folder / name, stock

    def loaded(self, folder: Path) -> nn.Module:
        """The folder through `vitrim.load`, whole."""
        return load(folder, model=None if self.origin.library else copy.deepcopy(self.model))

    def in_bfloat16(self) -> tuple[nn.Module, nn.Module]:
        """A bfloat16 model cut in memory, and the same saved and loaded, whole."""
        if self.origin.library == "transformers":  # it keeps rope in float32 beside bfloat16 weights
            live = type(self.model).from_pretrained(self.folder / "source", dtype=torch.bfloat16)
        else:
            live = copy.deepcopy(self.model).bfloat16()
        apply_(live, self.plan.below(self.origin.encoder).edits)
        return live, self.loaded(self._save(live, "bfloat16")[0])

    @cached_property
    def stock_widths(self) -> str:
        """Which widths the library can express: every one, or which multiples of 8."""
        if self._is_stock(self.plan.edits[0].width + 1):
            return "every"
        site = self.sites[0]
        found = [width for width in range(8, site.d_hidden + 1, 8) if self._is_stock(width)]
        if found != [*range(found[0], site.d_hidden + 1, found[0])]:
            return f"{', '.join(map(str, found))} of {site.d_hidden}"
        return f"multiples of {'the model width' if found[0] == site.d_model else found[0]}"

    def _is_stock(self, width: int) -> bool:
        return stock_origin(self.origin, self._drawn(width).below(self.origin.encoder).edits) is not None

    @cached_property
    def compiled(self) -> float:
        """The cut model as torch.compile traces it against the same without; no backend, since that knows no models."""
        try:
            compiled = torch.compile(self.encoder_of(self.student), backend="eager")
            return difference(run(compiled, self.inputs), self.cut_output)
        finally:
            torch.compiler.reset()

    @cached_property
    def exported(self) -> float | str:
        """The cut model through torch.export against the same without, or why torch can't export it."""
        return self._export(self.encoder_of(self.student), self.cut_output)

    @cached_property
    def uncut_exported(self) -> float | str:
        """The same for the uncut model."""
        return self._export(self.encoder_of(self.model), self.output)

    def _export(self, model: nn.Module, expected: Tensor) -> float | str:
        try:
            with torch.no_grad():
                program = torch.export.export(model, (self.inputs,))
        except Exception as error:  # torch raises many kinds
            return type(error).__name__
        return difference(run(program.module(), self.inputs), expected)


def run(model: Callable[..., Any], inputs: Tensor) -> Tensor:
    """A model's main output."""
    with torch.no_grad():
        output = model(inputs)
    output = output if isinstance(output, Tensor) else output[0]
    return output if isinstance(output, Tensor) else output[-1]  # of several maps the last


def difference(output: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((output - expected).abs().max() / expected.abs().max())


@cache
def measured(name: str) -> Measured:
    """The measurements of a family, by its name."""
    return Measured(FAMILIES[name], scratch() / str(list(FAMILIES).index(name)))


@cache
def scratch() -> Path:
    """A folder for everything that is written here, gone with the process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def stock_reports() -> dict[str, float | str]:
    """For each family saved in its library's own form: the difference after that library alone loaded it."""
    jobs: dict[str, dict[str, tuple[str, str, str]]] = {}
    for name in FAMILIES:
        found = measured(name)
        backend, (folder, stock) = backend_of(found.origin.library), found.saved
        if stock and backend is not None:
            tensors = {"inputs": found.inputs, "output": found.cut_output.contiguous()}
            save_file(tensors, folder.with_name(f"{folder.name}.probe"))
            job = (str(folder), found.origin.encoder, backend.RELOAD)
            jobs.setdefault(str(found.origin.library), {})[name] = job
    reports: dict[str, float | str] = {}
    for source, each in jobs.items():
        path = scratch() / f"{source}.json"
        path.write_text(json.dumps(each))
        command = [sys.executable, "-c", WITHOUT_VITRIM + RELOAD_ALL, str(path)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        reports |= json.loads(done.stdout.splitlines()[-1])
    return reports


def table() -> str:
    """The support table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(name) for name in FAMILIES)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def row(name: str) -> tuple[str, ...]:
    """One family's cells."""
    found, family = measured(name), FAMILIES[name]
    kinds = ", ".join(dict.fromkeys(site.label for site in found.sites))
    paths = ", ".join(f"`{path}`" for path in found.paths)
    return (family.source, family.name, kinds, paths, _exact(found), *_loader(name), _verdict(found.exported))


def _verdict(result: float | str) -> str:
    if isinstance(result, str):
        return f"no, nor uncut: {result}"
    return "yes" if result <= TOLERANCE else f"off by {result:.0e}"


def _exact(found: Measured) -> str:
    if found.masked_difference <= TOLERANCE:
        return "yes"
    errors = ", ".join(f"{error:.2f} {name}" for name, error in found.errors.items())
    return f"off by {found.masked_difference:.0%}; error {errors}"


def _loader(name: str) -> tuple[str, str]:
    """What loads the folder, and whether it could at every width."""
    found = measured(name)
    if found.saved[1]:
        verdict = _verdict(stock_reports()[name])
        loader = str(found.origin.library) if verdict == "yes" else f"{found.origin.library}: {verdict}"
        return loader, found.stock_widths
    verdict = _verdict(difference(run(found.encoder_of(found.loaded(found.saved[0])), found.inputs), found.cut_output))
    call = "vitrim.load(path)" if found.origin.library else "vitrim.load(path, model=...)"
    return f"`{call}`" if verdict == "yes" else f"`{call}`: {verdict}", "-"


def main() -> None:
    """Print the table, or put it into the page."""
    made = table()
    if "--write" not in sys.argv:
        print(made)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
