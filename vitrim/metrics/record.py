"""What a run measured, as one frozen value: what is returned, shown and written to metrics.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vitrim.storage.documents import finite, not_finite

Row = Mapping[str, Any]

# A ratio of latencies whose quartiles are further apart than this share of it is noise.
MOST_SPREAD = 0.1


def relative_latency(row: Row) -> str:
    """Return a latency as a share of the original's with its quartiles, and "noisy" where these are too far apart."""
    ratio, (low, high) = row["ratio"], row["ratio_quartiles"]
    return f"{ratio:.2f} ({'' if is_steady(row) else 'noisy, '}{low:.2f} to {high:.2f})"


def is_steady(row: Row) -> bool:
    """Return whether a latency was measured well enough beside the original's to be shown as a number."""
    low, high = row["ratio_quartiles"]
    return high - low <= MOST_SPREAD * row["ratio"]


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What one model costs, and how often it is right where it has a head and the images have labels.

    `macs` are those of one image; `latency` is by batch size, each with `median_ms`, `iqr_ms` and, of the small model,
    `ratio` and `ratio_quartiles`, both to the original that it was timed in turns with; `num_bytes` is the
    size of the tensors in files, each in its own type. What was not measured is None, or empty.
    """

    parameters: int
    macs: int | None = None
    peak_memory_mib: float | None = None
    latency: Mapping[int, Row] = field(default_factory=dict)
    num_bytes: int | None = None
    top1: float | None = None

    @classmethod
    def from_json(cls, data: Row) -> ModelCost:
        """Return the inverse of `Metrics.to_json` for one model."""
        return cls(**{**data, "latency": {int(size): row for size, row in data["latency"].items()}})


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How close a student's features are to its teacher's on held-out images.

    `fidelity` holds `relative_error`, cosines and recall, and `num_images`, on which all of them are; `blocks` one row
    a block, with `block` and `relative_error`; `top1` is the student's, in percent, on the `num_labelled` with a label.
    `fitted` has the `relative_error` on `num_images` of the images that the repair was fitted on; empty without repair.
    """

    fidelity: Mapping[str, float]
    blocks: Sequence[Row] = ()
    top1: float | None = None
    num_labelled: int = 0
    fitted: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """How many images the student was judged on."""
        return int(self.fidelity["num_images"])

    @classmethod
    def from_json(cls, data: Row) -> Closeness:
        """Return the inverse of `Metrics.to_json` for what was judged; a number that was not finite is NaN."""
        rows = [data["fidelity"], data.get("fitted", {}), *data["blocks"]]
        found, own, *blocks = (
            {key: math.nan if value is None else value for key, value in row.items()} for row in rows
        )
        return cls(**{**data, "fidelity": found, "fitted": own, "blocks": blocks})

    @property
    def relative_error(self) -> float:
        """The squared error of all tokens, relative to what predicting their mean would give."""
        return self.fidelity["relative_error"]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a run did to a model and what came of it.

    Attributes:
        model: name of the original.
        method: methods, joined by `+`.
        encoder: path of the part that was cut, "" for the whole model.
        before: cost of the original.
        after: cost of the result.
        after_cut: closeness after cut and repair; None without images.
        after_recovery: closeness after training; None where nothing was trained.
        widths: hidden units of each MLP before and after, by path.
        edits: every other edit in words (`edit`, `where`, `what`).
        images: how many images stand behind each number (`calibration`, `held_out`, `train`, `skipped`).
        cut_errors: errors of each MLP during the cut, by path.
        learning: the closed form fitted on half of the images and on all, as `repair.learning` describes it.
        allocation: how widths were found; None for equal widths.
        blockwise: what block-by-block training did; None where there was none.
        at_once: what training all blocks at once did; None where there was none.
        recovery: what distillation did; None where there was none.
        exits: what training early exits did; None where there was none.
        elastic: errors at each width of an elastic result.
        text_tuning: what tuning the text tower did.
        sliced_from: the output that was sliced.
        stock: whether the model's own library loads the result.
        remote_code: whether transformers does with the modeling file beside it.
        loads_with: the line of Python that loads it; "" where nothing was written.
        reload_difference: largest difference of a fresh load, relative to the largest output.
        seconds: time that the run took.
        notes: what the user should know.
        environment: versions, machine, time and command.
    """

    model: str
    method: str
    encoder: str = ""
    before: ModelCost
    after: ModelCost
    after_cut: Closeness | None = None
    after_recovery: Closeness | None = None
    widths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    edits: Sequence[Row] = ()
    images: Mapping[str, Any] = field(default_factory=dict)
    cut_errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    learning: Row | None = None
    allocation: Row | None = None
    blockwise: Row | None = None
    at_once: Row | None = None
    recovery: Row | None = None
    exits: Row | None = None
    elastic: Row | None = None
    text_tuning: Row | None = None
    sliced_from: str | None = None
    stock: bool = False
    remote_code: bool = False
    loads_with: str = ""
    reload_difference: float | None = None
    seconds: float = 0.0
    notes: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def closeness(self) -> Closeness | None:
        """How close the result is: after recovery where there was one, else after the cut."""
        return self.after_recovery or self.after_cut

    @property
    def judged_on(self) -> str:
        """What stands behind the quality: how many images, and where they come from, in a sentence."""
        if self.text_tuning is not None:
            return f"Losses are on {self.images['held_out']:,} held-out pairs."
        if self.closeness is None:
            why = "no image was held out" if self.images else "no images were given"
            return f"Quality was not measured: {why}."
        number = self.closeness.num_images
        return f"Quality is on {number:,} image{'' if number == 1 else 's'} held out from the given data."

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready description; a number that is not finite is None, and a note says so."""
        plain = asdict(self)
        missing = [f"{path}: is not a finite number, so it is left out." for path in not_finite(plain)]
        return finite({**plain, "notes": [*plain["notes"], *missing]})

    @classmethod
    def from_json(cls, data: Row) -> Metrics:
        """Return the inverse of `to_json`; what a later version may have added is left out.

        Raises:
            KeyError, TypeError, ValueError: the document is not one of ours.
        """
        known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        costs = {when: ModelCost.from_json(data[when]) for when in ("before", "after")}
        judged = {
            when: None if data[when] is None else Closeness.from_json(data[when])
            for when in ("after_cut", "after_recovery")
        }
        notes = tuple(data.get("notes", ()))  # JSON knows no tuples
        return cls(**{**known, **costs, **judged, "notes": notes})
