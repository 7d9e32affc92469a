"""How results are shown on standard output: sentences, tables, one JSON document.

On a terminal a table fits the width and a sentence is left for the terminal to break. Anywhere else (a pipe, a file, a
log) every line is whole, tables are as wide as what they hold, and there is no colour, whatever COLUMNS says.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wider than anything that we print: nothing is broken or cut off.
UNBROKEN = 100_000


def on_terminal() -> bool:
    """Whether standard output is a terminal that can do more than print lines."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def make_console() -> Console:
    """Return a console for standard output as it is now; rich leaves colours out where NO_COLOR is set.

    What is printed is plain text: brackets in a path are no markup, and `:x:` in a name is no emoji.
    """
    if on_terminal():
        return Console(markup=False, emoji=False, highlight=False)
    return Console(markup=False, emoji=False, highlight=False, width=UNBROKEN, force_terminal=False, color_system=None)


def print_help(show: Callable[[Console], object]) -> None:
    """Print what the command line says of itself.

    Args:
        show: prints to the console that it is given, if at all.
    """
    if on_terminal():
        show(make_console())
        return
    lines = io.StringIO()
    show(Console(file=lines, width=UNBROKEN, force_terminal=False, color_system=None, highlight=False))
    for line in lines.getvalue().splitlines():
        print(line.rstrip())  # paragraphs come padded to the width


def say(text: str = "") -> None:
    """Print a sentence; where it does not fit, the terminal breaks it and we don't."""
    make_console().print(text, soft_wrap=True)


def print_notes(notes: Sequence[str]) -> None:
    """Print what the user should know."""
    for note in notes:
        say(f"note: {note}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table for people; cells are shown as text, or as they are where they have a style of their own."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    make_console().print(table)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=1))


def number(value: float | None) -> str:
    """Return a number for a table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
