"""The list of methods, read from their source: what `vitrim methods` prints, without importing torch.

A method says what it is in class attributes that are plain literals, so parsing its file is enough; nothing is run.
Classes are followed to their bases, as Python would. `vitrim.methods.METHODS` is the same list of live classes, with
those that other code has registered besides.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """What a method says about itself; `edits` in words. See `vitrim.methods.Method` for the meaning of each."""

    name: str
    arxiv: str
    needs: str
    takes: str
    edits: str
    summary: str
    paper: str


def read_methods(methods: Path = HOME / "methods", surgery: Path = HOME / "surgery") -> list[MethodEntry]:
    """Read what the methods of a folder say about themselves.

    Args:
        methods: folder of the files that define methods.
        surgery: folder of the files that define the kinds of edit that they make.

    Returns:
        One entry for each class under `@register`, in the order in which importing the package registers them.

    Raises:
        ValueError: a class says nothing about one of these, or not as a literal; a mistake in the source.
    """
    classes, kinds = _classes(methods), _classes(surgery)
    return [_entry(name, classes, kinds) for name, node in classes.items() if _is_registered(node)]


def _classes(folder: Path) -> dict[str, ast.ClassDef]:
    """The classes that the files of a folder define, by name; files in the order of their names."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _is_registered(node: ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).split(".")[-1] == "register" for decorator in node.decorator_list)


def _entry(name: str, classes: dict[str, ast.ClassDef], kinds: dict[str, ast.ClassDef]) -> MethodEntry:
    """What one class says, by itself or by its bases."""
    said = {key: _literal(name, key, classes) for key in ("name", "arxiv", "needs", "takes", "summary", "paper")}
    edits = _value(name, "edits", classes)
    if not isinstance(edits, ast.Tuple):
        raise ValueError(f"{name}.edits: is no tuple of the kinds of edit; write one out.")
    words = [_literal(ast.unparse(kind), "KIND", kinds).replace("_", " ") for kind in edits.elts]
    return MethodEntry(edits=", ".join(words), **said)


def _literal(name: str, key: str, classes: dict[str, ast.ClassDef]) -> str:
    """The text that a class attribute holds."""
    value = _value(name, key, classes)
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
        raise ValueError(f"{name}.{key}: is no literal text; write it out, since it is read without being run.")
    return value.value


def _value(name: str, key: str, classes: dict[str, ast.ClassDef]) -> ast.expr:
    """The expression that a class attribute is set to, in the class or in the first of its bases that sets it."""
    for node in _with_bases(name, classes):
        for line in node.body:
            target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
            value = getattr(line, "value", None)
            if isinstance(target, ast.Name) and target.id == key and value is not None:
                return value
    raise ValueError(f"{name}.{key}: is not set, neither there nor in a base class; set it on the class.")


def _with_bases(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """A class and its bases, nearest first, as far as they are defined in the same folder."""
    if name in classes:
        yield classes[name]
        for base in classes[name].bases:
            yield from _with_bases(ast.unparse(base).split(".")[-1], classes)
