"""The pages of the documentation, and the blocks and commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import ROOT

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*DOCS, *(path for path in [ROOT / "README.md"] if path.exists())]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```\s*$", re.M | re.S)
NEEDS = re.compile(r"<!-- needs: [^>]+ -->\s*$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `line` is where its code starts."""

    language: str
    code: str
    line: int
    runs: bool


def blocks_of(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], code, line, NEEDS.search(text[: match.start()]) is None))
    return [block for block in found if block.language in languages]


def commands_of(page: Path) -> list[tuple[int, list[str]]]:
    """Line number and words of every command of the shell blocks; in a console, what stands behind a prompt."""
    commands = []
    for block in blocks_of(page, "bash", "console", "sh", "shell"):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for text in lines:
            words = shlex.split(text, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                commands.append((block.line, [words[0].removeprefix(".venv/bin/"), *words[1:]]))
    return commands


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))
