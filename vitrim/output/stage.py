"""Output folders are written beside their final place, under a lock, and renamed into it when they are whole."""

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


STATES = (CUT_STATE, PICKS, TEXT_STATE)  # each is something to go on from


LOCK = "lock"


@contextmanager
def staged_output(out: Path, *, resume: bool = False) -> Iterator[tuple[Path, Path]]:
    """A folder beside `out` that becomes `out` at the end, and a place for what a stopped run needs to go on.

    Args:
        out: the folder to write.
        resume: keep what an earlier, stopped run left in that place.

    Yields:
        The folder to write the output into, and the folder for resumable state. Both are gone afterwards, but for the
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
                for config in folder.glob("*config.json"):  # one that names a part of its folder gets the final name
                    config.write_text(config.read_text().replace(str(folder.resolve()), str(out.resolve())))
                _settle(folder)
                folder.rename(out)
                for state in STATES:
                    (work / state).unlink(missing_ok=True)
            except (OSError, SafetensorError) as error:  # the second is how safetensors says that a disk is full
                reason = getattr(error, "strerror", None) or error
                raise OutputError(f"{out}: could not be written ({reason}).") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if not any((work / state).exists() for state in STATES):
                    shutil.rmtree(work, ignore_errors=True)
    finally:
        for parent in (work, *made):
            with suppress(OSError, ValueError):  # what holds something stays
                parent.rmdir()


def refuse_existing(out: Path, *, kind: str = "output folder") -> None:
    """Refuse a place where something is, if only a link that leads nowhere.

    Raises:
        OutputError: so it is.
    """
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists already; choose another {kind} or remove this one.")


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """Make a folder and hold a lock in it. The system drops the lock of a process that dies, whatever it died of."""
    try:
        if work.is_symlink():
            raise OSError(errno.ELOOP, f"{work} is a link")
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{out}: can't be written ({reason}); choose a folder you may write to.") from None
    try:
        if not _hold(lock) or not (work / LOCK).exists():  # the run that held it may have ended between the two
            raise OutputError(f"{out}: another run is writing it; wait for that one, or choose another output folder.")
        yield
    finally:
        os.close(lock)


def _hold(lock: int) -> bool:
    """Lock an open file, if no other process has; a system or a disk without locks lets every run through."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True


def _start(work: Path, out: Path, *, resume: bool) -> None:
    """Empty the folder of a run, but for what it goes on from, and make that of its output."""
    refuse_existing(out)
    for old in [work / "output"] if resume else [path for path in work.iterdir() if path.name != LOCK]:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    (work / "output").mkdir()


def _settle(folder: Path) -> None:
    """Bring every file to disk before the folder gets its final name: after a power cut it is whole, or not there."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
