"""Early exits of a model whose blocks are looped: it is read at the end of a loop, with the blocks behind passed by.

No foreign forward is copied. For the time of a `with` block some blocks don't run and return what is known: those of
earlier loops what these have put out, those of later ones what the exit puts out. What stands in front of the blocks
and behind them runs as always, so that every exit has the model's own final norm and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vitrim.errors import ModelError, RecipeError
from vitrim.layers.recursive import RecursiveLinear
from vitrim.models.features import logits, num_classes

T = TypeVar("T")


class Loops:
    """The loops of a model: `blocks` holds the paths of the blocks of each, in the order in which they run.

    Raises:
        ModelError: the model's blocks are not looped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        owners, users = _looped(model)
        every = [path for path, _ in model.named_modules() if path in owners | users]
        if not owners or len(every) % len(owners) or not _stand_together(model, every):
            raise ModelError(
                f"{type(model).__name__}: its blocks are not looped, so it has no exits; use a model that the method "
                "recursive has made."
            )
        self.length = len(owners)
        self.blocks = [every[start : start + self.length] for start in range(0, len(every), self.length)]

    def __len__(self) -> int:
        return len(self.blocks)

    def check(self, number: int) -> None:
        """Check that there is a loop of this number, the first is 1.

        Raises:
            RecipeError: there is none.
        """
        if not 1 <= number <= len(self):
            raise RecipeError(f"exit: {number} is no loop of this model; use 1..{len(self)}.")

    @contextmanager
    def up_to(self, number: int, before: Any = None) -> Iterator[dict[str, Any]]:
        """Leave the model behind a loop, the first is 1; what this puts out is then under "output".

        With `before`, what the loop in front has put out, the earlier ones don't run again.

        Raises:
            RecipeError: there is no such loop.
        """
        self.check(number)
        seen: dict[str, Any] = {}
        end = self.model.get_submodule(self.blocks[number - 1][-1])
        earlier = [] if before is None else list(chain(*self.blocks[: number - 1]))
        later = list(chain(*self.blocks[number:]))
        with ExitStack() as stack:
            stack.callback(end.register_forward_hook(lambda _, __, output: seen.update(output=output)).remove)
            stack.enter_context(returning(self.model, earlier, lambda: before))
            stack.enter_context(returning(self.model, later, lambda: seen["output"]))
            yield seen

    def exits(self, run: Callable[[], T]) -> list[T]:
        """Return what a function that runs the model gives at each exit, the last included; no block runs twice."""
        outputs: list[Any] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:  # copied, since a block may add to its input in place
            outputs.append(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output))

        with ExitStack() as hooks:
            for loop in self.blocks:
                hooks.callback(self.model.get_submodule(loop[-1]).register_forward_hook(note).remove)
            last = run()
        found: list[T] = []
        for output in outputs[:-1]:
            with returning(self.model, list(chain(*self.blocks)), lambda output=output: output):
                found.append(run())
        return [*found, last]


class UntilSure(nn.Module):
    """A looped classifier that runs each image by itself, and leaves at the first loop whose class is sure.

    A loop is sure if its largest class probability is `confidence` or more. `depths` says how many blocks each image of
    the last call took.

    Raises:
        ModelError: the model's blocks are not looped, or it has no head.
        RecipeError: the confidence is no probability.

    Example:
        small = UntilSure(vitrim.load("small"), 0.9)
        scores_BC = small(images_BCHW)
    """

    def __init__(self, model: nn.Module, confidence: float) -> None:
        super().__init__()
        if not 0 <= confidence <= 1:
            raise RecipeError(f"confidence: is {confidence:g}; use a probability from 0 to 1.")
        if not num_classes(model):
            raise ModelError(f"confidence: {type(model).__name__} has no class head to be sure by; use exit.")
        self.model, self.confidence, self.loops = model, confidence, Loops(model)
        self.depths: list[int] = []

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the class scores (B, classes)."""
        self.depths = []
        return torch.cat([self._one(image_CHW[None]) for image_CHW in images_BCHW])

    def first_sure(self, scores_EBC: Tensor) -> Tensor:
        """Return the number (B,), from 0, of the first exit whose class is sure, of the scores of all exits."""
        sure_EB = scores_EBC.float().softmax(-1).amax(-1) >= self.confidence
        sure_EB[-1] = True
        return sure_EB.int().argmax(0)

    def _one(self, image_1CHW: Tensor) -> Tensor:
        before, number = None, 1
        while True:
            with self.loops.up_to(number, before) as seen:
                scores_1C = logits(self.model, image_1CHW)
            assert scores_1C is not None
            if number == len(self.loops) or float(scores_1C.float().softmax(-1).amax()) >= self.confidence:
                self.depths.append(number * self.loops.length)
                return scores_1C
            before, number = seen["output"], number + 1


def leaving_at(
    model: nn.Module, exit: int | None, confidence: float | None
) -> tuple[AbstractContextManager[Any], UntilSure | None]:
    """Return what holds a model at an exit, and the model as it is left once it is sure, as far as they are asked for.

    Raises:
        ModelError: the model has no exits, or no head.
        RecipeError: there is no such exit, the confidence is no probability, or both were given.
    """
    if exit is not None and confidence is not None:
        raise RecipeError("exit, confidence: one leaves at a loop, the other where it is sure; give one of the two.")
    if exit is None:
        return nullcontext(), None if confidence is None else UntilSure(model, confidence)
    loops = Loops(model)
    loops.check(exit)
    return loops.up_to(exit), None


@contextmanager
def returning(model: nn.Module, paths: Sequence[str], output: Callable[[], Any]) -> Iterator[None]:
    """Let modules return a value in place of running."""
    modules = [vars(model.get_submodule(path)) for path in paths]
    kept = [attributes.get("forward") for attributes in modules]
    try:
        for attributes in modules:
            attributes["forward"] = lambda *_, **__: output()
        yield
    finally:
        for attributes, own in zip(modules, kept, strict=True):
            del attributes["forward"]
            attributes |= {} if own is None else {"forward": own}


def _stand_together(model: nn.Module, paths: Sequence[str]) -> bool:
    """Return whether modules stand in one container, one behind the other, whatever their names."""
    containers = {path.rpartition(".")[0] for path in paths}
    inside = [name for name, _ in model.get_submodule(next(iter(containers))).named_children()]
    places = [inside.index(path.rpartition(".")[2]) for path in paths] if len(containers) == 1 else [0, 0]
    return all(b - a == 1 for a, b in pairwise(places))


def _looped(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the paths of the blocks that own shared matrices, and of those that use them."""
    paths = {module: path for path, module in model.named_modules() if isinstance(module, RecursiveLinear)}
    owners, users = set[str](), set[str]()
    for module, path in paths.items():
        if module.others and module.others[0] in paths:
            parts, others = path.split("."), paths[module.others[0]].split(".")
            place = next(n for n, pair in enumerate(zip(parts, others, strict=True), 1) if pair[0] != pair[1])
            users.add(".".join(parts[:place]))
            owners.add(".".join(others[:place]))
    return owners, users
