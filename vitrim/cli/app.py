"""The app itself: runs a command line, sets exit codes and shows the log. It does not import torch.

Wrong input gives one line on standard error and exit code 2; a run stopped by Ctrl-C or SIGTERM exits with
130, and a model below a limit that was set for it with 1.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.help import PlainFormatter

from vitrim.cli.console import on_terminal, print_help
from vitrim.errors import BelowLimitError, Interrupted, VitrimError
from vitrim.stopping import stoppable

app = App(
    name="vitrim",
    help="Make pretrained Vision Transformers smaller and keep their features.",
    help_epilogue="Exit codes: 0 done, 1 below a limit of --fail-under, 2 wrong input (one line on standard error), "
    "130 stopped by Ctrl-C or SIGTERM.",
    suppress_keyboard_interrupt=False,  # `run` says a line
)
app.register_install_completion_command()

Json = Annotated[bool, Parameter(name="--json", negative="", help="print one JSON document and nothing else")]


def main() -> None:
    """Run the `vitrim` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths may have letters that the locale's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    app.help_formatter = None if on_terminal() else PlainFormatter()
    try:
        with stoppable(), _log_shown():
            print_help(
                lambda console: app(
                    list(arguments),
                    console=console,
                    exit_on_error=False,
                    print_error=False,
                    result_action="return_value",
                )
            )
    except Interrupted as error:
        return fail(error, 130)
    except KeyboardInterrupt:
        return fail("stopped; --resume goes on from the last state that was kept, if there is one", 130)
    except BelowLimitError as error:
        return fail(error, 1)
    except CycloptsError as error:
        return fail(str(error).strip().split("\n")[0], 2)
    except VitrimError as error:
        return fail(f"{type(error).__name__}: {error}", 2)
    return 0


class _ToStandardError(logging.Handler):
    """Prints messages to standard error as it is at that moment, since a progress bar may replace the stream."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message; if there are several processes, only the first one prints."""
        if os.environ.get("RANK", "0") == "0":
            print(self.format(record), file=sys.stderr)


@contextmanager
def _log_shown() -> Iterator[None]:
    """Show the library's log while a command runs; `hush` limits it to warnings."""
    log, handler = logging.getLogger("vitrim"), _ToStandardError()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def hush(quiet: bool) -> bool:
    """Limit the library's log to warnings if `quiet`; return `quiet`."""
    if quiet:
        logging.getLogger("vitrim").setLevel(logging.WARNING)
    return quiet


def fail(message: Any, code: int) -> int:
    """Print one line on standard error and return the code; one of several processes adds its number."""
    who = f"vitrim [{os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "vitrim"
    print(f"{who}: {' '.join(str(message).split())}", file=sys.stderr)
    return code
