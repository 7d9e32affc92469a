"""Prints results on standard output: sentences, tables, or one JSON document.

On a terminal a table fits the width, and the terminal wraps long sentences. Anywhere else (a pipe, a file, a log) no
line is wrapped, tables are as wide as their content, and there is no colour, even if COLUMNS is set.
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

from vitrim.storage.documents import finite

# Wider than anything that we print, so that nothing is wrapped or cut off.
UNBROKEN = 100_000


def on_terminal() -> bool:
    """Return whether standard output is a terminal with more than plain lines."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def make_console() -> Console:
    """Return a console for standard output as it is now; rich leaves out colours if NO_COLOR is set.

    Text is printed as it is: brackets in a path are no markup, and `:x:` in a name is no emoji.
    """
    if on_terminal():
        return Console(markup=False, emoji=False, highlight=False)
    return Console(markup=False, emoji=False, highlight=False, width=UNBROKEN, force_terminal=False, color_system=None)


def print_help(show: Callable[[Console], object]) -> None:
    """Print the command line's own help.

    Args:
        show: prints to the console that it is given, or prints nothing.
    """
    if on_terminal():
        show(make_console())
        return
    lines = io.StringIO()
    show(Console(file=lines, width=UNBROKEN, force_terminal=False, color_system=None, highlight=False))
    for line in lines.getvalue().splitlines():
        print(line.rstrip())  # paragraphs come padded to the width


def say(text: str = "") -> None:
    """Print a sentence; a long one is wrapped by the terminal, not by us."""
    make_console().print(text, soft_wrap=True)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes for the user."""
    for note in notes:
        say(f"note: {note}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table for people; cells become text, except styled ones, which are printed as they are."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    make_console().print(table)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(finite(value), indent=1, allow_nan=False))


def number(value: float | None) -> str:
    """Return a number as text for a table."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
