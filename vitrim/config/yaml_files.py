"""The only reader and writer of YAML: plain data, no larger than a person would write, and no surprises in its types.

YAML 1.1 reads `yes` as true, `010` as 8 and `1:30` as 90. Here a number is decimal and a truth value is `true` or
`false`; everything else is text, which no option for a number takes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from vitrim.errors import RecipeError, reason_of

MAX_BYTES = 64 * 1024  # PyYAML takes a second for this
TYPES = {  # those of YAML 1.2's core schema, without octal and hexadecimal numbers; and what their first letters can be
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Reader(yaml.SafeLoader):
    """Reads plain data, each key once, and nothing by reference: a reference is how a small file becomes a huge one."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse references, before anything is built from them."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} stands for something above; write that out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there already; it would replace the first one."""
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """Writes what `_Reader` reads as the same value; text that it or YAML 1.1 takes for something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out."""
        return True


for _name, (_pattern, _first) in TYPES.items():
    for _kind in (_Reader, _Writer):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str, *, where: str) -> Any:
    """Return the value in a YAML text that holds only plain data.

    Args:
        text: the YAML text.
        where: name of the source, for error messages.

    Raises:
        RecipeError: the text is not valid YAML, is too long, or has a key twice or a reference to another part of it.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{where}: is longer than {MAX_BYTES // 1024} KiB; a recipe has a few lines.")
    try:
        return yaml.load(text, _Reader)
    except Exception as error:  # its constructors raise ValueError, KeyError, AttributeError, RecursionError and more
        reason = reason_of(" ".join(str(error).split()) or error)
        raise RecipeError(f"{where}: can't be read as YAML ({reason}).") from None


def read_yaml_file(path: Path) -> Any:
    """Return the value in a YAML file.

    Raises:
        RecipeError: it can't be read, is not UTF-8, or `read_yaml` refuses it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode(errors="strict" if len(data) <= MAX_BYTES else "replace")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: can't be read ({error}); pass a YAML file.") from None
    return read_yaml(text, where=str(path))


def write_yaml(value: Any) -> str:
    """Return plain data as YAML, which `read_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False)
