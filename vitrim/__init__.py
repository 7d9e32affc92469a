"""vitrim makes pretrained Vision Transformers smaller and keeps their features.

Names are imported when they are first used, so that `import vitrim` does not load torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrim import methods
    from vitrim.checked import NOT_GIVEN
    from vitrim.clip.tasks import retrieval, tune_text, zero_shot
    from vitrim.compression.file_to_file import prune_checkpoint
    from vitrim.compression.in_place import prune_
    from vitrim.compression.leaderboard import leaderboard
    from vitrim.compression.pipeline import compress
    from vitrim.compression.slicing import slice_output as slice
    from vitrim.config.options import (
        AdapterOptions,
        AllocateOptions,
        AtOnceOptions,
        BlockwiseOptions,
        CacheOptions,
        CalibrateOptions,
        ExitOptions,
        RecoverOptions,
        RepairOptions,
    )
    from vitrim.config.recipe import Recipe
    from vitrim.config.steps import Step
    from vitrim.errors import (
        BudgetError,
        CheckpointError,
        DataError,
        Interrupted,
        MissingExtraError,
        ModelError,
        OutputError,
        RecipeError,
        SiteNotFoundError,
        VitrimError,
    )
    from vitrim.evaluation import Evaluation, evaluate
    from vitrim.inputs import Inputs
    from vitrim.inspection import Inspection, inspect
    from vitrim.machine import doctor
    from vitrim.metrics.record import Metrics
    from vitrim.output.export import export
    from vitrim.output.hub import push
    from vitrim.output.load import load
    from vitrim.output.result import Result
    from vitrim.surgery import Plan
    from vitrim.together import evaluate_together

    __version__: str

# Where each public name is defined; "slice" and "methods" stand under other names there.
_HOMES = {
    "NOT_GIVEN": "checked",
    "AdapterOptions": "config.options",
    "AllocateOptions": "config.options",
    "AtOnceOptions": "config.options",
    "BlockwiseOptions": "config.options",
    "BudgetError": "errors",
    "CacheOptions": "config.options",
    "CalibrateOptions": "config.options",
    "CheckpointError": "errors",
    "DataError": "errors",
    "Evaluation": "evaluation",
    "ExitOptions": "config.options",
    "Inputs": "inputs",
    "Inspection": "inspection",
    "Interrupted": "errors",
    "Metrics": "metrics.record",
    "MissingExtraError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "Plan": "surgery",
    "Recipe": "config.recipe",
    "RecipeError": "errors",
    "RecoverOptions": "config.options",
    "RepairOptions": "config.options",
    "Result": "output.result",
    "SiteNotFoundError": "errors",
    "Step": "config.steps",
    "VitrimError": "errors",
    "compress": "compression.pipeline",
    "doctor": "machine",
    "evaluate": "evaluation",
    "evaluate_together": "together",
    "export": "output.export",
    "inspect": "inspection",
    "leaderboard": "compression.leaderboard",
    "load": "output.load",
    "methods": "methods",
    "prune_": "compression.in_place",
    "prune_checkpoint": "compression.file_to_file",
    "push": "output.hub",
    "retrieval": "clip.tasks",
    "slice": "compression.slicing",
    "tune_text": "clip.tasks",
    "zero_shot": "clip.tasks",
}

__all__ = [
    "NOT_GIVEN",
    "AdapterOptions",
    "AllocateOptions",
    "AtOnceOptions",
    "BlockwiseOptions",
    "BudgetError",
    "CacheOptions",
    "CalibrateOptions",
    "CheckpointError",
    "DataError",
    "Evaluation",
    "ExitOptions",
    "Inputs",
    "Inspection",
    "Interrupted",
    "Metrics",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "RecoverOptions",
    "RepairOptions",
    "Result",
    "SiteNotFoundError",
    "Step",
    "VitrimError",
    "__version__",
    "compress",
    "doctor",
    "evaluate",
    "evaluate_together",
    "export",
    "inspect",
    "leaderboard",
    "load",
    "methods",
    "prune_",
    "prune_checkpoint",
    "push",
    "retrieval",
    "slice",
    "tune_text",
    "zero_shot",
]

logging.getLogger("vitrim").addHandler(logging.NullHandler())  # what is logged is shown where the user says so


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vitrim")
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrim' has no attribute {name!r}")
    home = import_module(f"vitrim.{_HOMES[name]}")
    found = home if name == "methods" else getattr(home, {"slice": "slice_output"}.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
