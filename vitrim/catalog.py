"""Documentation of methods and options, read from their source code: importing them would import torch, which is slow.

`vitrim methods` and the command line's help use it, so that every option is documented once, beside its field.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent
COLUMNS = ("name", "arxiv", "needs", "edit", "summary", "paper")


def method_rows() -> list[dict[str, str]]:
    """Return name, arxiv, needs, edit, summary and paper of every method, in the order of registration.

    Methods that the running program has registered itself are included.
    """
    kinds = dict(_edit_kinds())
    own = [
        {**{name: str(found[name]) for name in COLUMNS if name != "edit"}, "edit": _edits(found, kinds)}
        for found in _registered()
    ]
    registry = sys.modules.get("vitrim.methods.registry")
    known = {row["name"] for row in own}
    others = [] if registry is None else [kind for name, kind in registry.METHODS.items() if name not in known]
    plain = [name for name in COLUMNS if name != "edit"]
    return own + [{**{name: getattr(kind, name) for name in plain}, "edit": kind.edits_in_words()} for kind in others]


@cache
def field_docs(module: str, kind: str) -> dict[str, str]:
    """Return the documentation under each field of a class, by name of the field.

    Args:
        module: the class's module inside vitrim, dotted.
        kind: name of the class.
    """
    tree = _parsed(ROOT / f"{module.replace('.', '/')}.py")
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    docs = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(below):
            assert isinstance(below, ast.Expr)
            docs[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return docs


def _registered() -> Iterator[dict[str, object]]:
    """Yield the class-level literals of each method, including inherited ones, in the package's import order."""
    package = _parsed(ROOT / "methods" / "__init__.py")
    modules = [node.module for node in package.body if isinstance(node, ast.ImportFrom) and node.module]
    defaults = _literals(_classes(ROOT / "methods" / "registry.py")["Method"])
    for module in modules:
        classes = _classes(ROOT.parent / f"{module.replace('.', '/')}.py")
        known: dict[str, dict[str, object]] = {}
        for name, node in classes.items():
            bases = [known[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in known]
            known[name] = {**defaults, **(bases[0] if bases else {}), **_literals(node)}
            if any(isinstance(mark, ast.Name) and mark.id == "register" for mark in node.decorator_list):
                yield known[name]


def _literals(node: ast.ClassDef) -> dict[str, object]:
    """Return a class's own plain values by name, with a tuple of classes as their names."""
    found: dict[str, object] = {}
    for line in node.body:
        if not isinstance(line, ast.Assign | ast.AnnAssign):
            continue
        for target in line.targets if isinstance(line, ast.Assign) else [line.target]:
            if isinstance(target, ast.Name) and isinstance(line.value, ast.Constant):
                found[target.id] = line.value.value
            elif isinstance(target, ast.Name) and isinstance(line.value, ast.Tuple):
                found[target.id] = tuple(part.id for part in line.value.elts if isinstance(part, ast.Name))
    return found


def _edits(found: dict[str, object], kinds: dict[str, str]) -> str:
    """Return the names of a method's kinds of edit, for people."""
    edits = found["edits"]
    assert isinstance(edits, tuple)
    return ", ".join(kinds[name].replace("_", " ") for name in edits)


def _edit_kinds() -> Iterator[tuple[str, str]]:
    """Yield the name and kind of each edit class."""
    for path in sorted((ROOT / "surgery").glob("*.py")):
        for name, node in _classes(path).items():
            kind = _literals(node).get("KIND")
            if kind is not None:
                yield name, str(kind)


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    """Return the classes of a file by name."""
    return {node.name: node for node in _parsed(path).body if isinstance(node, ast.ClassDef)}


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
