"""Names of what a recovery leaves in its work folder."""

from __future__ import annotations

# What a stopped run continues from; see `state.py`.
RECOVERY_STATE = "recover.state"
# Folder for the state and the log of training all blocks at once.
AT_ONCE = "at-once"
# The same for training early exits.
EXITS = "exits"
# One JSON line a step.
RECOVERY_LOG = "recovery.jsonl"
# Folder for the files of the trackers in `options.report_to`.
TRACKER_LOGS = "logs"
# Folder for the teacher's targets, where the options name no other.
TEACHER_CACHE = "teacher-cache"
# What a training of factors inside a step of the recipe continues from, by the number of the step.
FACTORS_STATE = "factors-{}.state"
