"""A model whose blocks are read from a checkpoint when they run, so that it need not fit in memory.

One block is in memory at a time, besides everything outside the blocks (embeddings, final norm, head). Cuts made so far
are applied whenever a block is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitrim.storage.tensor_files import check_finite
from vitrim.surgery import KeepUnits, submodule, transform


class FileBackedModel:
    """Loads a block of a model on meta when it is about to run, and unloads the one before.

    Args:
        model: model with parameters on meta; filled in place, with hooks on its blocks until `close`.
        blocks: paths of the blocks; everything outside them is read at once and stays.
        tensors: the checkpoint, by the model's own names.
        device: where blocks run.
        dtype: dtype for floating-point tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        tensors: Mapping[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.tensors, self.device, self.dtype = model, tensors, device, dtype
        self.edits: list[KeepUnits] = []
        self.resident: str | None = None
        self._names = {block: [n for n in model.state_dict() if n.startswith(f"{block}.")] for block in blocks}
        inside = {name for names in self._names.values() for name in names}
        self._fill_([name for name in model.state_dict() if name not in inside])
        self._hooks = [
            submodule(model, block).register_forward_pre_hook(lambda *_, block=block: self.enter(block))
            for block in blocks
        ]

    def enter(self, block: str) -> None:
        """Load a block, and put the previous one back on meta."""
        if block == self.resident:
            return
        if self.resident is not None:
            _empty_(submodule(self.model, self.resident))
        self.resident = block
        self._fill_(self._names[block], [edit for edit in self.edits if edit.site.block == block])

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _fill_(self, names: Sequence[str], edits: Sequence[KeepUnits] = ()) -> None:
        with torch.inference_mode(False):  # a block is entered from forward passes, and may be trained afterwards
            placed = dict(transform(_Lazily(names, self._read), edits))
            self.model.load_state_dict(placed, strict=False, assign=True)

    def _read(self, name: str) -> Tensor:
        """Read a tensor in the dtype of the run, before it is cut, so that repaired values are not rounded."""
        tensor = self.tensors[name]
        check_finite(name, tensor)
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


class _Lazily(Mapping[str, Tensor]):
    """A mapping of names to tensors, each read on access."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _empty_(module: nn.Module) -> None:
    """Move a module's parameters to meta, in their present shapes."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
