"""Python in processes of its own that find vitrim and `tests.support`: one, or several under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, for children on one thread and without a device."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def run_python(
    *words: object, processes: int | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script or a module to its end.

    Args:
        words: a script with its arguments, or `-m` and a module with its.
        processes: how many torchrun starts; None runs Python itself.
        timeout: seconds after which it is stopped, which is an error.

    Returns:
        Its exit code and what it wrote.
    """
    start = [sys.executable]
    if processes is not None:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*start, *map(str, words)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, errors="replace", timeout=timeout, check=False
    )
