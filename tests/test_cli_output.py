"""What the command line prints: whole lines where there is no terminal, whatever the environment; text is no markup."""

import fcntl
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import termios
from importlib.resources import files
from pathlib import Path

import pytest
from rich.text import Text

from vitrim.cli import console
from vitrim.cli.app import hush, run
from vitrim.errors import LONGEST_REASON, reason_of

ASSET = Path(str(files("vitrim"))) / "assets" / "digits-vit"
MAIN = "from vitrim.cli import main; main()"
ENVIRONMENTS = {
    "as it is": {},
    "narrow": {"COLUMNS": "40"},
    "wide": {"COLUMNS": "300"},
    "dumb": {"TERM": "dumb"},
    "no colour": {"NO_COLOR": "1"},
    "forced colour": {"FORCE_COLOR": "1", "TERM": "xterm-256color"},
    "forced terminal": {"TTY_COMPATIBLE": "1", "COLUMNS": "40"},
}
PIPED = {"capture_output": True, "text": True, "check": False}
NAMES = ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


@pytest.fixture
def far_model(tmp_path):
    """The digits ViT at a path of 150 characters: spaces, letters beyond ASCII, and what rich takes for markup."""
    folder = tmp_path / "mödell [bold] :smile: ağaç"
    folder = folder / ("x" * max(1, 149 - len(str(folder))))
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ASSET, folder)
    return f"local-dir:{folder}"


@pytest.fixture
def environment(monkeypatch):
    """Sets an environment in place of all that says something about terminals."""

    def change(given):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return change


def test_what_is_printed_into_a_pipe_does_not_depend_on_the_environment(far_model, environment, capsys):
    shown = set()
    for given in ENVIRONMENTS.values():
        environment(given)
        assert run(["inspect", far_model]) == 0
        text = capsys.readouterr().out
        assert "│ the least with --memory-budget " in text and "\x1b" not in text
        shown.add(text.split("┃ prune-checkpoint")[0].rpartition("\n")[0])  # then come what is measured and estimated
    (text,) = shown
    assert f"{far_model}: 683,242 parameters, 65% of them in MLPs" in text.splitlines()
    table = [line for line in text.splitlines() if line.startswith("│")]
    assert any(re.fullmatch(r"│ mlp_ratio 1 +│ 96 +│ 349,738 +│ -48.8% +│", line) for line in table)


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["methods"]], ids=" ".join)
def test_help_and_lists_are_whole_too(arguments, environment, capsys):
    shown = set()
    for given in ENVIRONMENTS.values():
        environment(given)
        assert run(arguments) == 0
        shown.add(capsys.readouterr().out)
    (text,) = shown
    assert "\x1b" not in text and all(line == line.rstrip() for line in text.splitlines())
    whole = {
        "--help": "  compress: Make a model smaller and write it to a folder.",
        "compress --help": "  --batch-size INT: Images in a pass, over all processes.",
        "methods": "│ magnitude ",
    }[" ".join(arguments)]
    lines = [line.replace("--batch-size:", "--batch-size INT:") for line in text.splitlines()]  # cyclopts before 5
    assert any(line.startswith(whole) for line in lines)


def test_text_is_no_markup(capsys):
    console.say("[red]a[/red] :smile: [/]")
    console.print_table(("[b]x[/b]",), [["[red]a[/red]"], [Text("best", style="bold")]], title="[t]")
    shown = capsys.readouterr().out
    assert "[red]a[/red] :smile: [/]\n" in shown and "│ [red]a[/red] │" in shown and "[b]x[/b]" in shown
    assert "│ best         │" in shown and "[t]" in shown


def in_terminal(arguments, width, **given):
    """What a command prints on a terminal of a width."""
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", MAIN, *arguments]
    process = subprocess.Popen(
        command, env={**environment, "TERM": "xterm", **given}, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert process.wait() == 0, shown
    return shown.decode().replace("\r\n", "\n")


COLOUR = re.compile(r"\x1b\[[\d;]*(?:3|4|9|10)\d[\d;]*m")


def test_on_a_terminal_tables_fit_it_and_titles_stand_out():
    shown = in_terminal(["methods"], 100)
    assert "\x1b[1m" in shown
    assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines())) <= 100
    shown = in_terminal(["--help"], 60)
    assert "╭─ Commands" in shown and max(map(len, re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines())) <= 60
    assert COLOUR.search(shown)


def test_no_colour_and_dumb_terminals_are_obeyed():
    assert not COLOUR.search(in_terminal(["--help"], 60, NO_COLOR="1"))
    for arguments in (["--help"], ["methods"]):
        shown = in_terminal(arguments, 60, TERM="dumb")
        assert "\x1b" not in shown and max(map(len, shown.splitlines())) > 80


def test_a_sentence_on_a_terminal_is_broken_by_the_terminal_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    console.say("a sentence that is longer than twenty letters")
    assert capsys.readouterr().out == "a sentence that is longer than twenty letters\n"


def test_letters_that_the_encoding_lacks_do_not_stop_a_command():
    command = "from vitrim.cli import app, console\napp.command(lambda: console.say('\\u011f'), name='x')\n"
    given = {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", command + MAIN, "x"], **given).stdout == "\\u011f\n"
    assert "| magnitude " in subprocess.run([sys.executable, "-c", MAIN, "methods"], **given).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["methods"]], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", MAIN, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode != 0 and done.stderr == ""


def test_what_a_library_says_is_one_line_that_ends_with_a_word():
    assert reason_of(ValueError("  wrong\tshape (3, 4) \nand more")) == "wrong shape (3, 4)"
    assert reason_of(KeyError()) == "KeyError"
    words = "longer " * LONGEST_REASON
    assert reason_of(OSError(words)) == ("longer " * (LONGEST_REASON // 7)).strip() + " …"
    assert reason_of(OSError("x" * 400)) == "x" * LONGEST_REASON + " …"


def test_python_runs_the_package_as_the_command():
    done = subprocess.run([sys.executable, "-m", "vitrim", "inspect", "~nobody-of-that-name/x"], **PIPED)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("vitrim: ModelError: ~nobody-of-that-name/x: no such model; use ")


def test_timing_a_model_does_not_speak_of_cuda():
    time = "from vitrim.cost.latency import import_timer; import_timer()"
    done = subprocess.run([sys.executable, "-c", time], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_the_library_logs_in_silence_and_the_command_line_shows_it(capsys, monkeypatch):
    log = "import logging, vitrim; logging.getLogger('vitrim').warning('said')"
    done = subprocess.run([sys.executable, "-c", log], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    monkeypatch.setattr("vitrim.cli.look.method_rows", lambda: logging.getLogger("vitrim").info("said") or [])
    for rank, shown in (("0", "said\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert run(["methods"]) == 0 and capsys.readouterr().err == shown
    monkeypatch.delenv("RANK")
    before = logging.getLogger("vitrim").level
    monkeypatch.setattr(
        "vitrim.cli.look.method_rows", lambda: (hush(True) and logging.getLogger("vitrim").info("said")) or []
    )
    assert run(["methods"]) == 0 and capsys.readouterr().err == ""
    assert logging.getLogger("vitrim").level == before


def test_an_editable_install_leaves_python_startable_in_the_c_locale():
    """Before 3.12 Python reads .pth files in the locale's encoding, and does not start where one can't be read."""
    site = Path(sysconfig.get_path("purelib"))
    assert all(path.read_bytes().isascii() for path in site.glob("*vitrim*.pth"))
