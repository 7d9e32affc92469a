"""The app itself: running a command line, exit codes, and how results are shown. It does not import torch.

Wrong input ends in one line on standard error and exit code 2; a run stopped by Ctrl-C exits with 130.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table

from vitrim.errors import Interrupted, VitrimError

# Where there is no terminal nothing is wrapped, and no table is narrower than what is in it.
UNWRAPPED = 100_000

app = App(
    name="vitrim",
    help="Make pretrained Vision Transformers smaller and keep their features.",
    help_epilogue="Exit codes: 0 done, 2 wrong input (one line on standard error), 130 stopped by Ctrl-C.",
)
app.register_install_completion_command()

Json = Annotated[bool, Parameter(name="--json", negative="", help="print one JSON document and nothing else")]


def main() -> None:
    """Run the `vitrim` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        with _Spoken():
            app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except Interrupted as error:
        return fail(error, 130)
    except KeyboardInterrupt:
        return fail("stopped; --resume goes on from the last state that was kept, if there is one", 130)
    except CycloptsError as error:
        return fail(str(error).strip().split("\n")[0], 2)
    except VitrimError as error:
        return fail(f"{type(error).__name__}: {error}", 2)
    return 0


class _Spoken:
    """Shows what the library logs on standard error while a command runs, the message alone."""

    def __enter__(self) -> None:
        self.log, self.handler = logging.getLogger("vitrim"), logging.StreamHandler(sys.stderr)
        self.handler.setFormatter(logging.Formatter("%(message)s"))
        self.level = self.log.level
        self.log.addHandler(self.handler)
        self.log.setLevel(logging.INFO)

    def __exit__(self, *_: object) -> None:
        self.log.removeHandler(self.handler)
        self.log.setLevel(self.level)


def hush(quiet: bool) -> bool:
    """Let the library log warnings alone from here on, if so asked; return whether it was."""
    if quiet:
        logging.getLogger("vitrim").setLevel(logging.WARNING)
    return quiet


def fail(message: Any, code: int) -> int:
    """Print one line on standard error and return the code; of several processes each says which one it is."""
    who = f"vitrim [{os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "vitrim"
    print(f"{who}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def make_console() -> Console:
    """Return a console for standard output: as wide as the terminal, or as what is printed where there is none.

    rich obeys NO_COLOR and TERM=dumb by itself; COLUMNS counts on a terminal alone.
    """
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=UNWRAPPED, force_terminal=False, color_system=None)


def say(text: str = "") -> None:
    """Print a sentence; where it does not fit, the terminal breaks it and we don't."""
    make_console().print(text, soft_wrap=True, markup=False)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=1))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table for people."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    make_console().print(table)


def print_notes(notes: Sequence[str]) -> None:
    """Print what the user should know."""
    for note in notes:
        say(f"note: {note}")


def number(value: float | None) -> str:
    """Return a number for a table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
