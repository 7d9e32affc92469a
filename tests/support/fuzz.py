"""Searches one door of doors.py for bytes that break what is behind it, led by coverage (atheris, libFuzzer).

    python -m tests.support.fuzz recipe SCENE [options of libFuzzer]

`doors.search` starts it, since libFuzzer ends its process, at the latest with the first finding: a traceback, a hang,
too much memory. Only vitrim is instrumented, not the libraries.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vitrim"]):
    from tests.support.doors import folder_of, knock, valid
    from tests.support.faults import Scene, text_of


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Mutate a document as a document more often than not, and what is none as bytes."""
    rng = random.Random(seed)
    try:
        return text_of(rng, json.loads(data))[:max_size] if rng.random() < 0.7 else atheris.Mutate(data, max_size)
    except (ValueError, RecursionError):
        return atheris.Mutate(data, max_size)


def main() -> None:
    """One search, as the arguments say; it ends the process."""
    name, scene, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        corpus, inner = Path(scratch) / "corpus", Path(scratch) / "inner"
        corpus.mkdir()
        inner.mkdir()
        for number, data in enumerate(valid(name, Scene(Path(scene)))):
            (corpus / str(number)).write_bytes(data)
        folder = folder_of(name, Scene(Path(scene)), inner)

        def knock_at(data: bytes) -> None:
            knock(name, folder, data)

        atheris.Setup([sys.argv[0], *options, str(corpus)], knock_at, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
