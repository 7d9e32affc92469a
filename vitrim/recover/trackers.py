"""Sends each line of the log to trackers as well: TensorBoard, or by name whatever else accelerate supports.

A resumed run goes on in the same TensorBoard folder (steps after the last state are dropped there) and in the same run
of Weights & Biases; others begin a new run. The JSONL log is written in any case, in `distill.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrim.config.options import RecoverOptions
from vitrim.errors import MissingExtraError, RecipeError

# File with the name of the run, which a resumed run has to find again.
RUN_ID = "run-id"
PROJECT = "vitrim"
# Trackers that an extra of this package installs.
EXTRA, IN_EXTRA = "trackers", ("tensorboard",)


def check_trackers(names: Sequence[str], *, folder: Path | None) -> None:
    """Refuse trackers that can't be used, before anything runs.

    Args:
        names: accelerate's names.
        folder: where the run writes its files; None where it writes none.

    Raises:
        RecipeError: a name is unknown, or its tracker writes files and there is no folder.
        MissingExtraError: the package of a tracker is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise RecipeError(f"recover.report_to: unknown tracker {name!r}; accelerate knows {known}.")
        if name in LoggerType.list() and name not in map(str, get_available_trackers()):
            package = f"'vitrim[{EXTRA}]'" if name in IN_EXTRA else name.replace("_", "-")
            raise MissingExtraError(f"recover.report_to: {name} is not installed; pip install {package}.")
        if folder is None and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
            raise RecipeError(
                f"recover.report_to: {name} writes files and this run writes none; give an output folder."
            )


class Trackers:
    """Trackers of a run, from its start to its end; does nothing where `report_to` names none.

    Args:
        accelerator: of the run.
        options: of the run; `report_to` names the trackers, which also get the other options.
        folder: where they write their files.

    Raises:
        RecipeError: a name is unknown, or its tracker writes files and there is no folder.
        MissingExtraError: the package of a tracker is not installed.
    """

    def __init__(self, accelerator: Any, options: RecoverOptions, folder: Path | None) -> None:
        check_trackers(options.report_to, folder=folder)
        self.accelerator, self.options, self.folder = accelerator, options, folder

    def open(self, step: int) -> None:
        """Start the trackers; a resumed run, with `step` steps done, continues its curves."""
        if not self.options.report_to:
            return
        from accelerate.tracking import filter_trackers

        continuing: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}} if step else {}
        if self.folder is not None and self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            continuing["wandb"] = {"id": self._run_id(new=step == 0), "resume": "allow", "dir": str(self.folder)}
        self.accelerator.project_configuration.logging_dir = None if self.folder is None else str(self.folder)
        self.accelerator.log_with = filter_trackers(list(self.options.report_to), self.folder)
        plain = {k: v for k, v in self.options.model_dump().items() if isinstance(v, bool | int | float | str)}
        self.accelerator.init_trackers(PROJECT, config=None if step else plain, init_kwargs=continuing)

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step to the trackers."""
        if self.options.report_to:
            self.accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Let the trackers write what they hold; accelerate's own `end_training` would also end the process group."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _run_id(self, *, new: bool) -> str:
        """Return an id for this run, from the file where a resumed run finds it again."""
        assert self.folder is not None
        file = self.folder / RUN_ID
        if new or not file.exists():
            file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        return file.read_text(encoding="utf-8")
