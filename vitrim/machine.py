"""Reports what a run finds on this machine: versions, optional libraries, devices, threads, free memory and disk."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from vitrim.distributed.devices import resolve_device
from vitrim.output.provenance import versions

FOR_DEVELOPERS = ("docs", "test")


def doctor(folder: str | Path = ".") -> dict[str, Any]:
    """Look at the machine and return what a run will find.

    Args:
        folder: folder for outputs; the free space on its disk is reported.

    Returns:
        A mapping with `versions`, `extras` (each package's version, None if missing), `device` (the choice of `auto`),
        `devices`, `threads`, `cores`, free bytes of `memory` and `disk`, and `problems` in words.

    Example:
        >>> import vitrim
        >>> "torch" in vitrim.doctor()["versions"]
        True
    """
    folder = Path(folder)
    needs = [Requirement(line) for line in requires("vitrim") or ()]
    extras = {
        extra: {need.name: _installed(need.name) for need in needs if _is_for(need, extra)}
        for extra in metadata("vitrim").get_all("Provides-Extra", [])
        if extra not in FOR_DEVELOPERS
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = {
        "versions": versions(),
        "extras": extras,
        "device": str(resolve_device("auto")),
        "devices": [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "memory": psutil.virtual_memory().available,
        "disk": shutil.disk_usage(folder).free,
    }
    return {**found, "problems": _problems(found, folder)}


def _problems(found: dict[str, Any], folder: Path) -> list[str]:
    """Return sentences on what would get in the way of a run."""
    said = []
    if not os.access(folder, os.W_OK):
        said.append(f"{folder}: can't be written to; run vitrim from another folder, or give --out elsewhere.")
    if found["threads"] > found["cores"]:
        said.append(f"torch uses {found['threads']} threads on {found['cores']} cores; set OMP_NUM_THREADS.")
    if not torch.cuda.is_available() and torch.version.cuda and Path("/proc/driver/nvidia").exists():
        said.append("there is an NVIDIA driver, but torch finds no GPU: driver and CUDA version may not fit.")
    return said


def _is_for(need: Requirement, extra: str) -> bool:
    """Return whether a requirement belongs to an extra, and only to an extra."""
    return (
        need.marker is not None and need.marker.evaluate({"extra": extra}) and not need.marker.evaluate({"extra": ""})
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
