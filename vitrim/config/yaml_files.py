"""The only reader of YAML: plain data, no larger than a person could have written."""

from __future__ import annotations

from typing import Any

import yaml

from vitrim.errors import RecipeError

MAX_VALUES = 10_000


def read_yaml(text: str, *, where: str) -> Any:
    """Return the value in a YAML text that holds only plain data.

    Anything larger than a recipe could be is refused before it is expanded: nested aliases can expand to any number of
    values.

    Args:
        text: the YAML text.
        where: name of the source, for error messages.

    Raises:
        RecipeError: the text is not valid YAML, or holds more than 10,000 values.
    """
    try:
        value = yaml.safe_load(text)
    except Exception as error:  # its constructors raise ValueError, KeyError, AttributeError, RecursionError and more
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(f"{where}: can't be read as YAML ({reason}).") from None
    left, waiting = MAX_VALUES, [value]
    while waiting:
        left -= 1
        if left < 0:
            raise RecipeError(f"{where}: holds more than {MAX_VALUES:,} values; a recipe has some dozens.")
        part = waiting.pop()
        waiting += [*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, list | set) else []
    return value
