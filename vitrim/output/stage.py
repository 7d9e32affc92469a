"""Writes output folders beside their final place, under a lock, and renames them when they are complete."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vitrim.errors import OutputError

CUT_STATE = "cut.json"


PICKS, TEXT_STATE = "picks.jsonl", "text.state"


STATES = (CUT_STATE, PICKS, TEXT_STATE)  # a stopped run can be resumed from each of these


LOCK = "lock"


@contextmanager
def staged_output(out: Path, *, resume: bool = False) -> Iterator[tuple[Path, Path]]:
    """Yield a folder that becomes `out` at the end, and a folder for the state that a stopped run needs to resume.

    Args:
        out: the folder to write.
        resume: keep the state of an earlier, stopped run.

    Yields:
        The folder to write the output into, and the folder for resumable state. Both are removed afterwards, except the
        state of a run that was stopped after its cut.

    Raises:
        OutputError: `out` exists already, its parent can't be written to, or another run is writing it.
    """
    refuse_existing(out)
    made = [parent for parent in out.parents if not os.path.lexists(parent)]
    work = out.with_name(f".{out.name}.partial")
    folder = work / "output"
    try:
        with _alone(work, out):
            try:
                _start(work, out, resume=resume)
                yield folder, work
                for config in folder.glob("*config.json"):  # a config that names its own folder gets the final path
                    config.write_text(config.read_text().replace(str(folder.resolve()), str(out.resolve())))
                _settle(folder)
                folder.rename(out)
                for state in STATES:
                    (work / state).unlink(missing_ok=True)
            except (OSError, SafetensorError) as error:  # safetensors raises the second if the disk is full
                reason = getattr(error, "strerror", None) or error
                raise OutputError(f"{out}: could not be written ({reason}).") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if not any((work / state).exists() for state in STATES):
                    shutil.rmtree(work, ignore_errors=True)
    finally:
        for parent in (work, *made):
            with suppress(OSError, ValueError):  # a folder that is not empty stays
                parent.rmdir()


def refuse_existing(out: Path, *, kind: str = "output folder") -> None:
    """Check that nothing exists at a path, not even a broken link.

    Raises:
        OutputError: something exists there.
    """
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists already; choose another {kind} or remove this one.")


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """Make a folder and hold a lock in it. The system releases the lock when the process ends, even by a crash."""
    try:
        if work.is_symlink():
            raise OSError(errno.ELOOP, f"{work} is a link")
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{out}: can't be written ({reason}); choose a folder you may write to.") from None
    try:
        if not _hold(lock) or not (work / LOCK).exists():  # the run that held it may have ended in between
            raise OutputError(f"{out}: another run is writing it; wait for that one, or choose another output folder.")
        yield
    finally:
        os.close(lock)


def _hold(lock: int) -> bool:
    """Lock an open file and return whether that worked; without support for locks every run gets one."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True


def _start(work: Path, out: Path, *, resume: bool) -> None:
    """Clear a run's folder, except for state to resume from, and make the folder for its output."""
    refuse_existing(out)
    for old in [work / "output"] if resume else [path for path in work.iterdir() if path.name != LOCK]:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    (work / "output").mkdir()


def _settle(folder: Path) -> None:
    """Flush every file to disk before the folder gets its final name, so that no power cut leaves a partial output."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
