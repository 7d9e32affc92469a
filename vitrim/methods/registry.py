"""What a method is, and the list of all methods: a class with its options as fields and one function that decides.

A method reads plain matrices and sums and decides; it changes no module. It is asked either for each MLP which hidden
units stay (`SiteMethod`), or once for the whole model which edits to make (`ModelMethod`).
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import ValidationError
from torch import Tensor

from vitrim.checked import Checked
from vitrim.errors import RecipeError, SiteNotFoundError
from vitrim.ops.head_factors import LogitSums, ValueSums
from vitrim.ops.lora_importance import Factors
from vitrim.surgery import Edit, KeepUnits
from vitrim.types import ModelView, SiteView

Needs = Literal["weights", "images"]
BudgetUse = Literal["widths", "share", "nothing"]
Parts = Literal["mlp", "attention", "both"]
# For a refusal: what `models.attention` knows attentions by.
ATTENTION = (
    "one is a module with its number of heads (num_heads, n_heads, heads) that holds one nn.Linear for queries, keys "
    "and values and one for the output, or one for each of the four, in this order, and does no more than attend"
)


class Method(Checked):
    """Base class of all methods; an instance holds the options.

    Attributes:
        name: name in recipes and on the command line.
        paper: title of the paper.
        arxiv: arXiv number of the paper.
        summary: what the method does, in one line.
        needs: whether it works from weights alone or uses calibration images.
        repairs: whether the closed-form repair follows by default; it does not where a paper's own procedure is
            reproduced. Cuts of hidden units that come without tensors can be repaired, whichever method made them.
        needs_mlps: whether there is nothing to do for it in a model without MLPs.
        edits: kinds of edit that it makes.
        folds: whether its cuts of hidden units fold the dropped ones into the others; where our repair is asked for,
            it takes the place of that (`ModelView.repaired`).
        takes: which part of a budget it uses: hidden units of each MLP (`widths`), a `share` of something else, or
            `nothing`.
        senseless: sizes of a step, by key, that say nothing about what it does; they are refused.
        trial_options: options with which it soon leaves the same sizes, where a share is found by trial.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    arxiv: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[Needs]
    repairs: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    needs_mlps: ClassVar[bool] = True
    edits: ClassVar[tuple[type[Edit], ...]] = (KeepUnits,)
    takes: ClassVar[BudgetUse]
    senseless: ClassVar[tuple[str, ...]] = ()
    trial_options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def refusal(cls, error: ValidationError) -> str:
        """Return an error text: what is wrong with an option, and which options there are."""
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(cls.model_fields) or "none"
        said = first["msg"].removeprefix("Value error, ")
        return f"options.{key} of method {cls.name}: {said}; its options are {allowed}."

    def goes_by(self) -> BudgetUse:
        """Return which part of a budget the method uses, given these options."""
        return self.takes

    def check(self, view: ModelView) -> None:
        """Refuse a model that can't be cut with these options.

        Called before the first image is read. The view has images of noise, where a model's input size is known, and no
        budget but a share of its own.

        Raises:
            VitrimError: as `propose`.
        """

    def loops_blocks(self, view: ModelView) -> bool:
        """Return whether blocks of the model will be looped, given these options and the budget."""
        return False

    def reads_labels(self) -> bool:
        """Return whether it reads labels of the images, given these options."""
        return False

    @classmethod
    def edits_in_words(cls) -> str:
        """Return the names of its kinds of edit, for people."""
        return ", ".join(kind.KIND.replace("_", " ") for kind in cls.edits)

    @classmethod
    def lowest_order(cls) -> int:
        """Return the lowest order of its edits: no step before it may have a higher one."""
        return min(kind.ORDER for kind in cls.edits)

    @classmethod
    def highest_order(cls) -> int:
        """Return the highest order of its edits."""
        return max(kind.ORDER for kind in cls.edits)


class SiteMethod(Method):
    """Base class of methods that decide for each MLP which hidden units stay, and some also what stays of each head."""

    takes: ClassVar[BudgetUse] = "widths"

    def cuts(self) -> Parts:
        """Return what is cut of each block; more than `mlp` needs `mix_logits`, `mix_values` and images."""
        return "mlp"

    def goes_by(self) -> BudgetUse:
        """Return which part of a budget the method uses: with attention, widths alone don't say what stays."""
        return self.takes if self.cuts() == "mlp" else "share"

    def weighs_by_features(self) -> bool:
        """Return whether it is to be told how much errors of each output move the final features."""
        return False

    @abstractmethod
    def select(self, view: SiteView) -> Tensor:
        """Return the indices of the `view.num_keep` units of one MLP that stay, in pick order."""

    def whole_heads(self) -> bool:
        """Return whether heads are kept or dropped as a whole, by `pick_heads`, and not mixed."""
        return False

    def pick_heads(self, sums: ValueSums, num_keep: int) -> Tensor:
        """Return the indices of the heads that stay."""
        raise NotImplementedError(f"{self.name} picks no heads")

    def mix_logits(self, sums: LogitSums, num_keep: int) -> tuple[Tensor, Tensor]:
        """Return which mixtures of each head's query and of its key dimensions stay, each (G, K, F)."""
        raise NotImplementedError(f"{self.name} cuts no attention")

    def mix_values(self, sums: ValueSums, num_keep: int) -> Tensor:
        """Return which mixtures of each head's value dimensions stay, (G, K, F)."""
        raise NotImplementedError(f"{self.name} cuts no attention")


class ModelMethod(Method):
    """Base class of methods that decide for the whole model at once."""

    @abstractmethod
    def propose(self, view: ModelView) -> Iterator[Edit]:
        """Yield edits; each one is carried out before the next is asked for."""


@dataclass(frozen=True, kw_only=True)
class FactorTraining:
    """A training of LoRA factors in front of a frozen model: of which layers, by path, and how.

    `lr` is Adam's peak rate for a weight as torch initialises it. The loss is on features, or `on_labels`.
    """

    layers: tuple[str, ...]
    rank: int
    alpha: float
    steps: int
    batch_size: int
    lr: float
    on_labels: bool = False


class BetweenSteps(Protocol):
    """What a method does in a training, between each backward pass and the optimizer's step.

    `masks` are what the inputs of layers are multiplied by from the next forward pass on, by path.
    """

    masks: dict[str, Tensor]

    def see(self, step: int, factors: Mapping[str, Factors]) -> None:
        """Look at the factors of each layer and their gradients; steps count from 1."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return nested tensors from which it goes on exactly."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        ...


class TrainingView(ModelView, Protocol):
    """A view of a model that can be trained: what a job gives a `ModelMethod`."""

    def train_factors(self, training: FactorTraining, between: BetweenSteps) -> Mapping[str, Tensor]:
        """Train LoRA factors on images; return the adapted weights by full name, and leave the model as it was.

        Raises:
            RecipeError: a layer can't have such factors, or the images have no labels.
        """
        ...


METHODS: dict[str, type[Method]] = {}
Kind = TypeVar("Kind", bound=type[Method])


def register(kind: Kind) -> Kind:
    """Register a method under its name; use it as a class decorator.

    Raises:
        TypeError: the class is neither a SiteMethod nor a ModelMethod, or a required attribute is missing.
    """
    if not issubclass(kind, SiteMethod | ModelMethod):
        raise TypeError(f"{kind.__qualname__}: is no method; derive it from SiteMethod or ModelMethod.")
    silent = [name for name in ("name", "paper", "arxiv", "summary", "needs", "takes") if not hasattr(kind, name)]
    if silent:
        raise TypeError(f"{kind.__qualname__}: says nothing about {', '.join(silent)}; set it on the class.")
    METHODS[kind.name] = kind
    return kind


def find_method(name: str) -> type[Method]:
    """Return the class of the method with this name.

    Raises:
        RecipeError: no method has that name.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(METHODS)}."
        raise RecipeError(f"method: unknown name {name!r}; {hint}")
    return METHODS[name]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return the method with this name, with its options set.

    Raises:
        RecipeError: no method has that name, or an option is unknown or has a value that is not allowed.
    """
    return find_method(name)(**dict(options or {}))


def optional_tensor(view: ModelView, name: str) -> Tensor | None:
    """Return a tensor of the model, such as a bias, or None if there is none of that name."""
    try:
        return view.tensor(name)
    except SiteNotFoundError:
        return None
