"""Runs a model's blocks several times in a row (SDPose, arXiv 2404.03518), and reads it behind each cycle.

No foreign forward is copied. The model runs once as always; then its blocks are called again on what they have put
out, with the other arguments of the first time; and what stands behind the blocks runs on the tokens of each cycle,
with blocks and patch embedding passed by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from vitrim.errors import ModelError
from vitrim.models.exits import returning
from vitrim.models.features import first_tensor
from vitrim.models.sites import find_mlps

T = TypeVar("T")


class Cycle(NamedTuple):
    """What is known behind a cycle: the tokens (B, N, D) of the last block, and what the model gives from there."""

    tokens_BND: Tensor
    output: Any


def cycles(model: nn.Module, blocks: Sequence[str], count: int, run: Callable[[], T]) -> list[Cycle]:
    """Return the cycles of a function that runs a model, the first of which is the model as it is.

    Args:
        model: any model whose blocks take tokens and put tokens out.
        blocks: paths of its blocks, in the order in which they run.
        count: how often the blocks run.
        run: runs the model, once.

    Raises:
        ModelError: the model did not run the blocks, once each and in this order.
    """
    called: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = []
    embedded: list[Any] = []
    front = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "patch_embed"][:1]
    with ExitStack() as hooks:
        for path in blocks:

            def note(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                called.append((path, args[1:], kwargs, first_tensor(output)))

            hooks.callback(model.get_submodule(path).register_forward_hook(note, with_kwargs=True).remove)
        for path in front:
            hook = model.get_submodule(path).register_forward_hook(lambda _, __, output: embedded.append(output))
            hooks.callback(hook.remove)
        output = run()
    if [path for path, *_ in called] != list(blocks):
        raise ModelError(f"{type(model).__name__}: does not run its blocks once each, one behind the other.")
    found = [Cycle(called[-1][-1], output)]
    for _ in range(count - 1):
        tokens_BND = found[-1].tokens_BND.clone()  # a block may add to its input in place
        for path, args, kwargs, _ in called:
            tokens_BND = first_tensor(model.get_submodule(path)(tokens_BND, *args, **kwargs))
        with returning(model, front, lambda: embedded[0]), returning(model, blocks, lambda: tokens_BND):  # noqa: B023
            found.append(Cycle(tokens_BND, run()))
    return found


def block_row(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the blocks that hold a model's MLPs, in the order of its modules."""
    return tuple(dict.fromkeys(site.block for site in find_mlps(model)))


class CycleModel(nn.Module):
    """A model that returns its cycles in training mode, and in eval mode what it gives in one pass."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model, self.count, self.blocks = model, count, block_row(model)

    def forward(self, images_BCHW: Tensor) -> Any:
        """Return a list of `Cycle`, or the model's output."""
        if not self.training:
            return self.model(images_BCHW)
        return cycles(self.model, self.blocks, self.count, lambda: self.model(images_BCHW))
