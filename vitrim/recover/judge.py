"""Judges a student on held-out images, at each of its widths where it has several, and scores it by the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vitrim.distributed.processes import from_main
from vitrim.metrics.judging import FeatureModel, features_on_cpu, relative_error
from vitrim.recover.elastic import Widths, at_width
from vitrim.types import FeaturesAt

# An error below this counts as none.
TINY = 1e-12


class Judge:
    """Held-out images with the teacher's features, and the measure that they give of a student.

    Args:
        teacher: gives the features to compare with; run once on each image.
        held_out: preprocessed images (B, C, H, W).
        at: where features are read.
        widths: the widths of a student that serves several.
    """

    def __init__(
        self, teacher: nn.Module, held_out: Sequence[Tensor], *, at: FeaturesAt, widths: Widths | None
    ) -> None:
        self.at: FeaturesAt = at
        self.widths = widths
        self.held_out = [(batch, features_on_cpu(teacher, batch, at)) for batch in held_out]

    def errors(self, student: FeatureModel) -> dict[str, float]:
        """Return `relative_error`; with several widths that is their mean, and `mlp_ratio=R` is the error of each."""
        if self.widths is None:
            return from_main({"relative_error": relative_error(student, self.held_out, self.at)})
        errors = {}
        for ratio in self.widths.units:
            with at_width(student.model, self.widths, ratio):
                errors[f"mlp_ratio={ratio:g}"] = relative_error(student, self.held_out, self.at)
        return from_main({"relative_error": sum(errors.values()) / len(errors), **errors})


def score(errors: Mapping[str, float], start: Mapping[str, float]) -> float:
    """Turn held-out errors into one number to compare states by, the lower the better.

    With several widths it is the worst of their errors, each as a multiple of that width's error at the start. So a
    state that is kept has made none of them worse, however large the gain of another.

    Args:
        errors: of the state, from `Judge.errors`.
        start: of the untrained student.
    """
    changes = [max(error, TINY) / max(start[key], TINY) for key, error in errors.items() if key != "relative_error"]
    return max(changes, default=errors["relative_error"])
