"""The app itself: running a command line, exit codes, and how results are shown.

Wrong input ends in one line on standard error and exit code 2; a run stopped by Ctrl-C exits with 130.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table

from vitrim.errors import Interrupted, VitrimError

app = App(
    name="vitrim",
    help="Make pretrained Vision Transformers smaller and keep their features.",
    help_epilogue="Exit codes: 0 done, 2 wrong input (one line on standard error), 130 stopped by Ctrl-C.",
)
app.register_install_completion_command()
console = Console()

Json = Annotated[bool, Parameter(name="--json", negative="", help="print one JSON document and nothing else")]


def main() -> None:
    """Entry point of the `vitrim` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; its exit code."""
    try:
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


def fail(message: Any, code: int) -> int:
    """One line on standard error; of several processes each says which one it is."""
    who = f"vitrim [{os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "vitrim"
    print(f"{who}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def print_json(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=1))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people."""
    table = Table(*header)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


def print_summary(rows: Mapping[str, Mapping[str, float | None]]) -> None:
    """The closing table of a run."""
    from vitrim.report.picture import format_number

    cells = [
        (
            name,
            *(
                "-" if row[when] is None else format_number(row[when], name=name)
                for when in ("before", "after_cut", "after")
            ),
        )
        for name, row in rows.items()
    ]
    print_table(("", "original", "after the cut", "after recovery"), cells)


def print_notes(notes: Sequence[str]) -> None:
    """What the user should know."""
    for note in notes:
        console.print(f"note: {note}")


def number(value: float) -> str:
    """A number for a table."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
