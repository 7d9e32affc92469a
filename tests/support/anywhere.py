"""Quick tests in a copy of this tree elsewhere: its path, the environment, order, workers and user are drawn by a seed.

`python -m tests.support.anywhere` runs all of QUICK, with `--part` a few of them, with names those files. `--seed N`
draws again what N drew; `--set NAME=INDEX` takes one of the CHOICES below instead.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT

# Files that look at paths, files and what is printed, or start processes; each takes seconds.
QUICK = (
    "architecture card cli cli_options cli_output demo_asset folders leaderboard numbers progress recipe report "
    "sealed share stage tensor_files training_files written yaml"
).split()
PART = 3  # of these files in a small part: half a minute on two cores

# Variables to set, or to take away (None). {here} and {there} are new folders, on two file systems where there are two.
CHOICES: dict[str, tuple[Any, ...]] = {
    "length": (20, 27, 40, 64, 90, 120, 150),  # of the copy's path
    "letters": ("c", "a clone of vitrim in ağaç köy ß 日本 "),
    "place": ("here", "there"),
    "home": ({}, {"HOME": None}, {"HOME": ""}, {"HOME": "{here}/home"}, {"HOME": "/dev/null/not writable"}),
    "tmpdir": ({}, {"TMPDIR": "{here}/a long path/" + "t" * 100}, {"TMPDIR": "{there}/t"}),
    "columns": ({"COLUMNS": None}, {"COLUMNS": "40"}, {"COLUMNS": "300"}),
    "locale": (
        {},
        {"LANG": "C", "LC_ALL": None, "LC_CTYPE": None},
        {"LC_ALL": "C"},
        {"LC_ALL": "tr_TR.UTF-8", "LOCPATH": "{here}/locales"},
    ),
    "zone": ({}, {"TZ": "Asia/Kathmandu"}),
    "workers": (1, 2, 4),
    "user": ("this", "nobody"),
}
NOBODY = 65534
Draw = dict[str, Any]


def draw(seed: int, fixed: Sequence[str]) -> Draw:
    """One choice of each kind by a seed; `NAME=INDEX` fixes one."""
    rng = random.Random(seed)
    drawn = {name: rng.choice(choices) for name, choices in CHOICES.items()}
    for name, _, index in (word.partition("=") for word in fixed):
        drawn[name] = CHOICES[name][int(index)]
    return drawn


def copy_into(folder: Path, length: int, letters: str) -> Path:
    """Copy this tree, as it is now, into a folder whose path has that many letters, or as few as can be had."""
    name = (letters * length)[: max(0, length - len(str(folder)) - 2)] + "c"
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    return shutil.copytree(ROOT, folder / name, symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))


def variables(drawn: Draw, here: Path, there: Path) -> dict[str, str | None]:
    """The environment variables that were drawn; makes the folders and the locale that they name."""
    found = {name: value for kind in drawn.values() if isinstance(kind, dict) for name, value in kind.items()}
    found = {name: value and value.format(here=here, there=there) for name, value in found.items()}
    for name in ("HOME", "TMPDIR"):
        if (found.get(name) or "").startswith((str(here), str(there))):
            Path(found[name]).mkdir(parents=True)
    if "LOCPATH" in found:
        language, _, encoding = found["LC_ALL"].partition(".")
        Path(found["LOCPATH"]).mkdir()
        words = ["localedef", "-i", language, "-f", encoding, f"{found['LOCPATH']}/{found['LC_ALL']}"]
        if not shutil.which(words[0]) or subprocess.run(words, capture_output=True, check=False).returncode:
            print(f"anywhere: {found['LC_ALL']} can't be made here; its name is set, and programs fall back to C.")
            del found["LOCPATH"]
    return found


def as_nobody(folders: Sequence[Path]) -> list[str]:
    """Give folders to another user, and return the words before a command that run it as that user; none if not root.

    Python may lie where only root can read, so the user may read everything if need be, but not write.
    """
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if not shutil.which(words[0]) or os.geteuid() != 0:
        print("anywhere: another user can be had by root only; tests are run as this one.")
        return []
    if subprocess.run(
        [*words, "env", sys.executable, "-c", "import pytest"], capture_output=True, check=False
    ).returncode:
        words += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    return words


def run(seed: int, drawn: Draw, files: Sequence[str], here: Path, there: Path) -> int:
    """Run test files in what was drawn; returns pytest's exit code."""
    clone = copy_into(there if drawn["place"] == "there" else here, drawn["length"], drawn["letters"])
    changed = variables(drawn, here, there)
    user = as_nobody([here, there]) if drawn["user"] == "nobody" else []
    words = [*user, "env", *(f"--unset={name}" for name, value in changed.items() if value is None)]
    words += [f"{name}={value}" for name, value in changed.items() if value is not None]
    words += [f"PYTHONPATH={clone}", "OMP_NUM_THREADS=1", sys.executable, "-m", "pytest", "-n", str(drawn["workers"])]
    words += ["--dist=loadfile", "-p", "no:cacheprovider", f"--order={seed}"]
    words += [f"tests/test_{name}.py" for name in files]
    print(f"anywhere: seed {seed}, at a path of {len(str(clone))} letters: {shlex.join(words)}", flush=True)
    return subprocess.run(words, cwd=clone, check=False).returncode


def main() -> int:
    """Draw, run, and say after a failure how to run the same again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files", nargs="*", metavar="NAME", default=QUICK, help="tests/test_NAME.py; else the quick ones"
    )
    parser.add_argument("--part", action="store_true", help=f"{PART} of the files")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(100_000))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=INDEX")
    given = parser.parse_args()
    files = random.Random(given.seed).sample(given.files, PART) if given.part else given.files
    other = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="v") as here, tempfile.TemporaryDirectory(prefix="v", dir=other) as there:
        code = run(given.seed, draw(given.seed, given.set), files, Path(here), Path(there))
    if code:
        fixed = [f"--set={word}" for word in given.set]
        again = shlex.join(["python", "-m", "tests.support.anywhere", f"--seed={given.seed}", *fixed, *files])
        print(f"anywhere: FAILED with exit code {code}; the same again: {again}")
    return code


if __name__ == "__main__":
    sys.exit(main())
