"""Python in processes of its own that find vitrim and `tests.support`: one, or several that are one distributed run.

They are forked from a process that has imported torch, the model libraries and vitrim, and has done nothing else: the
imports would take longer than most of what is tried. What torchrun adds (its agent, restarts) is tried where it is
asked for, and there every process imports all by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENDS = ("out", "err")
IMPORTED = ["torch.distributed.fsdp", "timm", "transformers", "open_clip", "vitrim", "tests.support.models"]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, for children on one thread and without a device."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def run_python(
    *words: object,
    processes: int | None = None,
    torchrun: bool = False,
    timeout: float | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script or a module to its end.

    Args:
        words: a script with its arguments, or `-m` and a module with its.
        processes: how many make a distributed run; None for one that knows of no other.
        torchrun: start them with torchrun.
        timeout: seconds after which it is stopped, which is an error.
        cwd: the folder to run in.

    Returns:
        Its exit code and what it wrote.
    """
    arguments = [str(word) for word in words]
    if not torchrun:
        return _forked(arguments, processes, timeout, cwd or Path.cwd())
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*start, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        cwd=cwd,
        check=False,
    )


def forked() -> ForkServerContext:
    """What starts processes that are forked from the one that has imported everything; there is one of these."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _forked(
    words: Sequence[str], processes: int | None, timeout: float | None, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run one or several processes; as under torchrun, where one fails the others are stopped."""
    context = forked()
    ends = None if timeout is None else time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as scratch:
        started = []
        for rank, known in enumerate(_environments(processes)):
            place = str(Path(scratch) / str(rank))
            started.append(context.Process(target=_run, args=(list(words), known, place, str(cwd))))
            started[-1].start()
        try:
            codes = _wait(started, ends)
        finally:
            for process in started:
                process.kill()
                process.join()
        out, err = (
            "".join(path.read_text(errors="replace") for path in sorted(Path(scratch).glob(f"*.{end}"))) for end in ENDS
        )
    failed = {rank: code for rank, code in enumerate(codes) if code}
    err += "".join(f"process {rank} ended with {code}\n" for rank, code in failed.items())
    return subprocess.CompletedProcess(list(words), next(iter(failed.values()), 0), out, err)


def _environments(processes: int | None) -> list[dict[str, str]]:
    """What each of the processes finds in its environment."""
    if processes is None:
        return [environment()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(processes)
    run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return [environment(**run, RANK=rank, LOCAL_RANK=rank) for rank in map(str, range(processes))]


def _wait(started: Sequence[Any], ends: float | None) -> list[int | None]:
    """Wait until all have ended well or one has not, and others soon behind it; return their exit codes."""
    while True:
        codes = [process.exitcode for process in started]
        if None not in codes:
            return codes
        if any(codes):
            time.sleep(0.5)
            return [process.exitcode for process in started]
        if ends is not None and time.monotonic() > ends:
            raise TimeoutError("the processes took too long")
        time.sleep(0.02)


def _run(words: list[str], known: dict[str, str], place: str, cwd: str) -> None:
    """Be one of the processes: run a script or a module as Python does, and write to files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(known)
    for number, end in enumerate(ENDS, start=1):
        file = os.open(f"{place}.{end}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
