"""The sweep: every architecture of timm, transformers and open_clip at toy size, through vitrim from end to end.

Each is inspected, cut without images, written as its library writes it, cut from that folder with 16 random images,
saved, and loaded again, by its own library where the output says that it can. A row is what came of it: cut, or the
line with which it was refused. Anything else that is raised is a bug of vitrim's ("raw"), and so is an output that does
not load again ("late"). Both are to be 0.

To save hours, latency is timed once, the report is not drawn, and outputs are checked in this process.
Rows are kept in the JSON as they are done, so a sweep that was stopped goes on; `--again` repeats those that match.

    nice python benchmarks/registry.py                    # about an hour on one thread
    python benchmarks/registry.py --only 'vit_base' --libraries timm --again
    python benchmarks/registry.py --write                 # only puts the tables into docs/models.md
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from architectures import LIBRARIES  # noqa: E402
from shrinking import Named, Shrunk  # noqa: E402

import vitrim  # noqa: E402
from tests.support.checks import in_this_process  # noqa: E402
from vitrim.cost.latency import measure_latency  # noqa: E402
from vitrim.data.inputs import random_inputs  # noqa: E402
from vitrim.errors import OutputError, SiteNotFoundError, VitrimError  # noqa: E402
from vitrim.inputs import run_on  # noqa: E402
from vitrim.models.features import evaluating  # noqa: E402
from vitrim.models.load import origin_of  # noqa: E402
from vitrim.models.origin import on_meta  # noqa: E402
from vitrim.output.load import open_encoder, read_about  # noqa: E402
from vitrim.output.provenance import environment  # noqa: E402
from vitrim.output.verify import checking_with  # noqa: E402
from vitrim.report import page  # noqa: E402

RESULT, PAGE = ROOT / "benchmarks" / "results" / "registry.json", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: python benchmarks/registry.py --write -->\n", "<!-- end of the registry -->\n"
OUTCOMES = ("cut", "cut without images", "refused", "no MLP", "not shrunk", "slow", "late", "raw")
REPAIR = {"refit_steps": 5}
SEED, IMAGES = 0, 16


class TookTooLongError(BaseException):
    """Not an Exception, which the code that is tried may catch."""


def main() -> None:
    """Try every architecture that is not there yet, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--only", default="", help="regular expression that a name or a family must match")
    parser.add_argument("--every", type=int, default=1, help="of these, each one in so many: a sample")
    parser.add_argument("--again", action="store_true", help="repeat rows that are there")
    parser.add_argument("--seconds", type=int, default=40, help="limit for each row, of processor time")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--write", action="store_true", help="put the tables into the page; try nothing")
    given = parser.parse_args()
    if given.write:
        write(json.loads(given.out.read_text()))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    rows: dict[str, dict[str, Any]] = kept.get("rows", {})
    names: dict[str, int] = kept.get("names", {})
    for library in given.libraries:
        known = in_turn(LIBRARIES[library]())
        names[library] = sum(len(each.known.names) for each in known)
        asked = [each for each in known if _is_asked(each.known, given, rows)]
        _sweep(asked[:: given.every], given, names, rows)


def _sweep(asked: list[Named], given: argparse.Namespace, names: dict[str, int], rows: dict[str, Any]) -> None:
    """Try architectures, and keep each row as soon as it is there."""
    for named in asked:
        row = tried(named, given.seconds)
        gc.collect()  # models hold themselves in circles
        rows[_key(named.known)] = row
        print(
            *(row.get(key, "") for key in ("library", "name", "count", "outcome", "sites", "format", "why")), flush=True
        )
        about = {**environment(), **{name: version(name) for name in ("transformers", "open_clip_torch")}, "seed": SEED}
        result = {"environment": about, "names": names, "rows": dict(sorted(rows.items()))}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def in_turn(architectures: Iterable[Named]) -> list[Named]:
    """Return architectures so that each family's first comes before any second: a sweep may be stopped."""
    seen: Counter[str] = Counter()
    places: list[tuple[int, Named]] = []
    for named in architectures:
        places.append((seen[named.known.family], named))
        seen[named.known.family] += 1
    return [named for _, named in sorted(places, key=lambda pair: pair[0])]


def _is_asked(known: Shrunk, given: argparse.Namespace, rows: dict[str, Any]) -> bool:
    matches = any(re.search(given.only, name) for name in (known.family, *known.names))
    return matches and (given.again or _key(known) not in rows)


def _key(known: Shrunk) -> str:
    return f"{known.library}/{known.names[0]}"


# Trying one


def tried(named: Named, seconds: int = 40) -> dict[str, Any]:
    """Return the row of an architecture."""
    known, started = named.known, time.process_time()
    row = {"library": known.library, "family": known.family, "name": known.names[0], "count": len(known.names)}
    row["others"] = known.names[1:]
    with _within(seconds), tempfile.TemporaryDirectory() as scratch, _quiet(Path(scratch)):
        step = "shrinking"
        try:
            torch.manual_seed(SEED)
            shrunk = named.shrunk()
            row["shrunk"] = shrunk.said
            if shrunk.build is None:
                return {**row, "outcome": "not shrunk", "why": shrunk.said}
            for step, try_ in _steps(shrunk, Path(scratch)):
                row |= _caught(step, try_)
                if "outcome" in row:
                    break
        except TookTooLongError:
            row |= {"outcome": "slow", "why": f"{step}: more than {seconds} s"}
    return {**row, "outcome": row.get("outcome", "cut"), "seconds": round(time.process_time() - started, 1)}


def _steps(shrunk: Shrunk, scratch: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the steps in order, each as what it adds to the row."""
    assert shrunk.build is not None
    if not shrunk.has_mlps:  # as `inspect` of a name does: large ones need not be built
        empty = on_meta(shrunk.build)
        yield "inspect", lambda: _inspected(empty)
        return
    model, out = _random(shrunk.build), scratch / "out"
    images = _images(model, shrunk.size)
    yield "inspect", lambda: _inspected(model)
    yield "without images", lambda: _cut(model, "magnitude", None, exact=True)
    yield "with images", lambda: _cut_with_images(_saved(shrunk, model, scratch / "stock"), images, out)
    yield "reload", lambda: _reloaded(out, images)


def _caught(step: str, try_: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a step gives, or which kind of failure it is."""
    try:
        return try_()
    except VitrimError as error:
        kind = {SiteNotFoundError: "no MLP", OutputError: "late"}.get(type(error), "refused")
        return {"outcome": kind, "step": step, "why": _general(str(error))}
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/vitrim/" in frame.filename]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return {"outcome": "raw", "step": step, "why": _general(f"{type(error).__name__}: {error}{where}")[:400]}


def _general(line: str) -> str:
    """Return a line without what differs from run to run."""
    return re.sub(r"(local-dir:)?/tmp/[^ :;,)]*", "FOLDER", " ".join(line.split()))


def _inspected(model: nn.Module) -> dict[str, Any]:
    try:
        sites = vitrim.inspect(model, keep_ratio=0.5, exact=True).sites
    except SiteNotFoundError as error:
        return {
            "outcome": "no MLP",
            "why": "no MLP found" if "no MLP found" in str(error) else str(error),
            "unseen": unseen(model, ()),
        }
    return {"sites": len(sites), "kinds": sorted({site.label for site in sites}), "unseen": unseen(model, sites)}


def _cut(model: Any, method: str, out: Path | None, **given: Any) -> dict[str, Any]:
    result = vitrim.compress(model, method=method, keep_ratio=0.5, out=out, seed=SEED, quiet=True, **given)
    found = {"parameters": [result.metrics.before.parameters, result.metrics.after.parameters]}
    if out is None:
        return found
    about = read_about(out)
    return {**found, "format": about["origin"]["library"] if about["stock"] else "own"}


def _cut_with_images(model: Any, images: Any, out: Path) -> dict[str, Any]:
    """Cut with images; a model that takes none of them is cut without, and the reason is kept."""
    try:
        return _cut(model, "dgmr", out, data=images, repair=REPAIR)
    except OutputError:
        raise
    except VitrimError as error:
        found = _cut(model, "magnitude", out)
        return {**found, "outcome": "cut without images", "why": _general(str(error))}


def _images(model: nn.Module, size: tuple[int, ...]) -> Any:
    """Return random images, or what a model's processor makes of random pictures."""
    origin = origin_of(model)
    if "processor" not in origin.preprocessing:
        return torch.randn(IMAGES, *size)
    return list(random_inputs(origin, IMAGES))  # type: ignore[call-overload]


def _saved(shrunk: Shrunk, model: nn.Module, folder: Path) -> Any:
    """Return the folder that the library wrote, or the model where it can't."""
    folder.mkdir()
    try:
        shrunk.save(model, folder)
    except Exception:
        return model
    return str(folder) if any(folder.iterdir()) else model


def _reloaded(out: Path, images: Any) -> dict[str, Any]:
    """Load an output and run it; that it gives the same was checked when it was written."""
    if read_about(out)["origin"]["library"] is None:
        return {}
    encoder, _ = open_encoder(str(out))
    with evaluating(encoder):
        run_on(encoder, images[:2] if isinstance(images, Tensor) else torch.cat(images[:2]))
    return {}


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model, and move every parameter, so that no layer scale hides what an MLP does."""
    torch.manual_seed(SEED)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def unseen(model: nn.Module, sites: Any) -> list[str]:
    """Return pairs of linear layers, wider in between, that were not found as MLPs: their names may be new."""
    encoder = origin_of(model).encoder
    seen = {path for site in sites for path in (site.value, site.gate, site.output)}
    linear = [(n, m) for n, m in model.get_submodule(encoder).named_modules(prefix=encoder) if isinstance(m, nn.Linear)]
    pairs = [
        f"{name} / {other}"
        for (name, first), (other, second) in itertools.pairwise(linear)
        if first.in_features == second.out_features < first.out_features == second.in_features
        and not {name, other} & seen
    ]
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", pair) for pair in pairs))


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    """Raise after some seconds of this process's own time; on a busy machine others take more."""

    def stop(*_: Any) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _quiet(scratch: Path) -> Iterator[None]:
    """Check outputs in this process, print nothing, and put all temporary files into one folder."""
    before, tempfile.tempdir, draw = tempfile.tempdir, str(scratch), page.write_report
    logging.disable(logging.CRITICAL)
    page.write_report = lambda *_: None
    measure_latency.__kwdefaults__ |= {"rounds": 1, "min_seconds": 0.0}  # type: ignore[operator]
    try:
        with warnings.catch_warnings(), checking_with(in_this_process), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        tempfile.tempdir, page.write_report = before, draw
        logging.disable(logging.NOTSET)


# Tables


def summary(result: dict[str, Any]) -> str:
    """How many architectures of each library ended in which way, in Markdown."""
    lines = [
        "| Library | Names | Tried | Rows | " + " | ".join(OUTCOMES) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(OUTCOMES),
    ]
    for library in LIBRARIES:
        own = [row for row in result["rows"].values() if row["library"] == library]
        count = Counter(row["outcome"] for row in own)
        names = [result["names"].get(library, 0), sum(row["count"] for row in own)]
        cells = [*names, len(own), *(count[outcome] for outcome in OUTCOMES)]
        lines.append(f"| {library} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines)


def families(result: dict[str, Any]) -> str:
    """What was cut, by library, kind of MLP and what loads the result, in Markdown."""
    groups = _grouped(result, ("cut",), lambda row: (row["library"], ", ".join(row["kinds"]), row["format"]))
    lines = ["| Library | MLPs | Loads with | Families, and how many names of each |", "|---|---|---|---|"]
    for (library, kinds, loader), names in groups.items():
        loader = "`vitrim.load(path)`" if loader == "own" else loader
        lines.append(f"| {library} | {kinds} | {loader} | {names} |")
    return "\n".join(lines)


def refusals(result: dict[str, Any]) -> str:
    """What was not cut, or without images only, and why, in Markdown."""
    others = [outcome for outcome in OUTCOMES if outcome != "cut"]
    groups = _grouped(result, others, lambda row: (row["library"], row["outcome"], _reason(row)))
    lines = ["| Library | Outcome | Reason | Families, and how many names of each |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {names} |" for key, names in groups.items()]
    return "\n".join(lines)


def _grouped(
    result: dict[str, Any], outcomes: Any, key: Callable[[Any], tuple[str, ...]]
) -> dict[tuple[str, ...], str]:
    """Return families with their numbers of names as text, by what they have in common."""
    groups: dict[tuple[str, ...], Counter[str]] = {}
    for row in result["rows"].values():
        if row["outcome"] in outcomes:
            groups.setdefault(key(row), Counter())[row["family"]] += row["count"]
    order = {name: place for place, name in enumerate((*LIBRARIES, *OUTCOMES))}
    found = sorted(groups.items(), key=lambda item: ([order.get(part, 0) for part in item[0][:2]], -item[1].total()))
    return {
        key: ", ".join(f"{family} {count}" if count > 1 else family for family, count in sorted(names.items()))
        for key, names in found
    }


def _reason(row: dict[str, Any]) -> str:
    """Return a line without the model's own name and sizes, in a cell of a table."""
    line = re.sub(r"no MLP found in \w+ \(\d+ modules seen\): .*", "no MLP found", row["why"])
    line = re.sub(r"^(FOLDER|\w+)( [\w.]+)?: |\w+\.(?=forward\(\))", "", line)
    return re.sub(r"\(\d+(, \d+)+\)", "(C, H, W)", line).replace("|", "\\|")


def write(result: dict[str, Any]) -> None:
    """Put the tables into the page."""
    tables = "\n\n".join(made(result) for made in (summary, families, refusals))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
