"""Writes output folders beside their final place, under a lock, and renames them when they are complete."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vitrim.errors import OutputError
from vitrim.output.load import ABOUT
from vitrim.recover.files import FACTORS_STATE
from vitrim.storage.places import remove

CUT_STATE, PICKS, TEXT_STATE = "cut.json", "picks.jsonl", "text.state"
# A stopped run can be resumed from each of these.
STATES = (CUT_STATE, PICKS, TEXT_STATE, FACTORS_STATE.format("*"))
# The lock of a run, by which its folder is also known to be ours; and an output that gives way to a new one.
LOCK, REPLACED = "vitrim-run.lock", "replaced"


@contextmanager
def staged_output(out: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[tuple[Path, Path]]:
    """Yield a folder that becomes `out` at the end, and a folder for the state that a stopped run needs to resume.

    Args:
        out: the folder to write.
        resume: keep the state of an earlier, stopped run.
        overwrite: replace an output of vitrim at `out`, at the end; without `resume`, delete an earlier run's state.

    Yields:
        The folder to write the output into, and the folder for resumable state. Both are removed afterwards, except the
        state of a run that was stopped after its cut.

    Raises:
        OutputError: as `check_place`, or its parent can't be written to, or another run is writing it.
    """
    _check_names(out, overwrite=overwrite)
    made = [parent for parent in out.parents if not os.path.lexists(parent)]
    work = _work(out)
    folder = work / "output"
    try:
        with _alone(work, out):
            try:
                _start(work, out, resume=resume, overwrite=overwrite)
                yield folder, work
                for config in folder.glob("*config.json"):  # a config that names its own folder gets the final path
                    text = config.read_text(encoding="utf-8")
                    config.write_text(text.replace(str(folder.resolve()), str(out.resolve())), encoding="utf-8")
                _settle(folder)
                _place(folder, out, work, overwrite=overwrite)
                for state in _states(work):
                    remove(state)
            except (OSError, SafetensorError) as error:  # safetensors raises the second if the disk is full
                reason = getattr(error, "strerror", None) or error
                raise OutputError(f"{out}: could not be written ({reason}).") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if not has_state(work):
                    shutil.rmtree(work, ignore_errors=True)
    finally:
        for parent in (work, *made):
            with suppress(OSError, ValueError):  # a folder that is not empty stays
                parent.rmdir()


def check_place(out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check that an output may be written, before anything is opened; nothing is changed.

    Args:
        out: the folder to write.
        resume: an earlier run's state is to be kept.
        overwrite: an output of vitrim may be replaced, and without `resume` an earlier run's state deleted.

    Raises:
        OutputError: something exists at `out` that may not be replaced, the folder for the run's state beside it is
            someone else's, or holds the state of an earlier run about which nothing was said.
    """
    _check_names(out, overwrite=overwrite)
    if not _is_running(_work(out)):  # else the lock says so, when the run begins
        _check_state(_work(out), wanted=resume or overwrite)


def _check_names(out: Path, *, overwrite: bool) -> None:
    """Refuse to write over what may not be replaced, or into a folder that is not from a run."""
    try:
        is_ours = not out.is_symlink() and (out / ABOUT).is_file()
        if not (overwrite and is_ours):
            refuse_existing(out, advice=", or replace it with overwrite (--overwrite)" if is_ours else "")
        work = _work(out)
        is_foreign = work.is_dir() and not work.is_symlink() and not (work / LOCK).is_file() and any(work.iterdir())
    except (OSError, ValueError) as error:
        raise _not_writable(out, error) from None
    if is_foreign:
        raise OutputError(f"{work}: is not from vitrim, and the run needs its name; move it, or choose another output.")


def _check_state(work: Path, *, wanted: bool) -> None:
    """Refuse to begin where a stopped run left its state, unless the caller said what to do with it."""
    if has_state(work) and not wanted:
        raise OutputError(
            f"{work}: holds the state of a stopped run; go on from it with resume (--resume), or delete it with "
            "overwrite (--overwrite)."
        )


def _is_running(work: Path) -> bool:
    """Return whether another run holds the lock of a folder."""
    try:
        lock = os.open(work / LOCK, os.O_RDWR)
    except (OSError, ValueError):
        return False
    try:
        return not _hold(lock)
    finally:
        os.close(lock)


def has_state(work: Path) -> bool:
    """Return whether a run's folder holds a state to resume from."""
    return bool(_states(work))


def _states(work: Path) -> list[Path]:
    """Return what there is to resume from in a run's folder."""
    return [found for pattern in STATES for found in work.glob(pattern)]


def refuse_existing(out: Path, *, kind: str = "output folder", advice: str = "") -> None:
    """Check that nothing exists at a path, not even a broken link.

    Raises:
        OutputError: something exists there; `advice` is what else may be done.
    """
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists already; choose another {kind} or remove this one{advice}.")


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a place; what can't be written there ends in one line."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}.", dir=out.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(f"{out}: can't be written ({error.strerror or error}); choose another place.") from error


def move_into(place: Path, folder: Path, *, last: str) -> None:
    """Move all files of a folder to a place, or none; `last` comes behind the weights that it names."""
    made = sorted(folder.iterdir(), key=lambda file: file.name == last)
    for file in made:
        refuse_existing(place / file.name, kind="file")
    for file in made:
        file.rename(place / file.name)


def _work(out: Path) -> Path:
    """Return the folder of the run that writes an output."""
    return out.with_name(f".{out.name}.partial")


def _not_writable(out: Path, error: Exception) -> OutputError:
    """Return the error for a place at which no folder can be made, such as a name that is too long."""
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"{out}: can't be written ({reason}); choose a folder you may write to.")


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """Make a folder and hold a lock in it. The system releases the lock when the process ends, even by a crash."""
    try:
        if work.is_symlink():
            raise OSError(errno.ELOOP, f"{work} is a link")
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _not_writable(out, error) from None
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


def _start(work: Path, out: Path, *, resume: bool, overwrite: bool) -> None:
    """Clear a run's folder, except for state to resume from, and make the folder for its output."""
    if (work / REPLACED).exists() and not os.path.lexists(out):  # a run was killed between two renamings
        (work / REPLACED).rename(out)
    _check_names(out, overwrite=overwrite)
    _check_state(work, wanted=resume or overwrite)
    old = [work / "output", work / REPLACED] if resume else [path for path in work.iterdir() if path.name != LOCK]
    for path in old:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (work / "output").mkdir()


def _place(folder: Path, out: Path, work: Path, *, overwrite: bool) -> None:
    """Give a folder its final name, in the place of an output that may be replaced."""
    if overwrite and os.path.lexists(out):
        out.rename(work / REPLACED)
    try:
        folder.rename(out)
    except BaseException:
        if (work / REPLACED).exists():
            (work / REPLACED).rename(out)
        raise
    shutil.rmtree(work / REPLACED, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Flush every file to disk before the folder gets its final name, so that no power cut leaves a partial output."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
