"""Records where and with what an output was made: versions, machine, time and command."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the numbers."""
    names = ("vitrim", "torch", "timm")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def environment() -> dict[str, str]:
    """Return versions, machine, time and command: provenance, which is kept apart from the plan."""
    return {
        **versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
