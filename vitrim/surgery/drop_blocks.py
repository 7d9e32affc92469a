"""The edit that takes a run of consecutive blocks out of a list of blocks; those behind it get lower numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vitrim.errors import BudgetError, SiteNotFoundError
from vitrim.surgery.edits import Edit
from vitrim.surgery.modules import submodule
from vitrim.types import BlockRun


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Edit):
    """Take a run of blocks out.

    `tensors` may hold new values for layers of the block in front of the run, such as a projection into which what
    stands for the dropped blocks is folded.
    """

    KIND: ClassVar[str] = "drop_blocks"
    MAKES: ClassVar[str] = "blocks taken out"

    run: BlockRun

    def describe(self) -> str:
        """Return which blocks go."""
        run = self.run
        return f"blocks {run.start} to {run.stop - 1} of {run.total} taken out"

    def new_path(self, path: str) -> str | None:
        """Return the path that a module has afterwards; None if it is gone."""
        index, inside = self._place(path)
        if index is None or index < self.run.start:
            return path
        return None if index < self.run.stop else f"{self.run.block(index - self.run.length)}{inside}"

    def affected_tensors(self) -> list[str]:
        """Return the names of all tensors from the first dropped block on, and of those that the edit replaces."""
        run = self.run
        names = [f"{run.block(index)}.{name}" for index in range(run.start, run.total) for name in run.names]
        return names + list(self.tensors)

    def check(self, model: nn.Module) -> None:
        """Check that the list has as many blocks, and that one stays in front of the run."""
        run, blocks = self.run, submodule(model, self.run.path)
        if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) != run.total:
            raise SiteNotFoundError(
                f"{run.path}: is no list of {run.total} blocks; the plan was made for another model."
            )
        if not (1 <= run.start < run.stop <= run.total):
            raise BudgetError(
                f"{run.path}: asked to take out blocks {run.start} to {run.stop - 1}; use 1..{run.total - 1}, the "
                "first block stays."
            )

    def reshape_(self, model: nn.Module) -> None:
        """Take the blocks out of their list, and tell those behind their new numbers."""
        blocks, run = submodule(model, self.run.path), self.run
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        del blocks[run.start : run.stop]
        for block in list(blocks)[run.start :]:
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):  # transformers counts its layers
                    module.layer_idx -= run.length  # type: ignore[assignment, operator]

    def map_tensor(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield a tensor of a later block under its new name, nothing for one of a dropped block."""
        if name in self.tensors:
            yield name, self.given(name, tensor).reshape(tensor.shape)  # a matrix for a 1x1 convolution
        elif (new := self.new_path(name)) is not None:
            yield new, tensor

    def _place(self, path: str) -> tuple[int | None, str]:
        """Return the number of the block that a path leads into, and the rest of the path; None outside of the list."""
        start = f"{self.run.path}.".removeprefix(".")
        number, dot, rest = path.removeprefix(start).partition(".")
        return (int(number), f"{dot}{rest}") if path.startswith(start) and number.isdigit() else (None, "")
