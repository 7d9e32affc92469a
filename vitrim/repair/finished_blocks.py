"""Finished blocks of a block-by-block run: kept in files, taken up again, and passed between processes.

Where blocks are spread over processes, each block has one owner, which trains and keeps it; else the main process keeps
all of them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.distributed.processes import from_process, num_processes, rank
from vitrim.errors import CheckpointError, OutputError, RecipeError
from vitrim.storage.sealed import read_tensors, write_tensors

log = logging.getLogger("vitrim")
# By block and full name, the parameters that are trained.
Parts = Mapping[str, Mapping[str, nn.Parameter]]
# By block, its held-out error `before` and `after`.
Errors = dict[str, dict[str, float]]


class FinishedBlocks:
    """Finished blocks in files, one file a block, each written beside its place and renamed.

    Args:
        folder: where the files are; None keeps none.
        made: JSON values that say how blocks are trained; blocks that were trained otherwise are refused.
        resume: keep what an earlier run left; else it is removed.
    """

    def __init__(self, folder: Path | None, made: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.made = folder, dict(made)
        if folder is not None and not resume:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(
        self, index: int, parameters: Mapping[str, nn.Parameter], errors: Mapping[str, float], spread: bool
    ) -> None:
        """Write a block as it is now, on the process that owns it.

        Raises:
            OutputError: the file could not be written, as on a full disk.
        """
        if self.folder is None or owner(index, spread) != rank():
            return
        path = self._path(index)
        about = {"made": json.dumps(self.made, sort_keys=True), "errors": json.dumps(errors)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, dict(parameters), about)
        except OSError as error:
            raise OutputError(f"{path}: can't be written ({error}); make room and go on with resume.") from None

    def take_up_(self, parts: Parts, spread: bool) -> Errors:
        """Put the blocks that were kept into the model, on every process where blocks are not spread.

        Returns:
            Their errors; blocks that were not kept, or whose file is damaged, are missing; the latter is logged.

        Raises:
            RecipeError: a block was trained with other options.
        """
        errors: Errors = {}
        for index, (block, parameters) in enumerate(parts.items()):
            if self.folder is not None and self._path(index).exists() and owner(index, spread) == rank():
                try:
                    errors[block] = self._read_(index, parameters)
                except CheckpointError as error:
                    log.warning("%s The block is trained again.", error)
        if not spread:
            exchange_(parts, errors, spread)
        return errors

    def _read_(self, index: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Give parameters the values of a kept block; returns its errors."""
        path = self._path(index)
        tensors, about = read_tensors(path)
        if about.get("made") != json.dumps(self.made, sort_keys=True) or tensors.keys() != parameters.keys():
            raise RecipeError(f"{path}: was trained with other options than this run's; give those, or overwrite.")
        _fill_(parameters, tensors)
        return json.loads(about["errors"])

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index}.safetensors"


def owner(index: int, spread: bool) -> int:
    """Return the rank of the process that keeps a block."""
    return index % num_processes() if spread else 0


def is_mine(index: int, spread: bool) -> bool:
    """Return whether this process trains a block."""
    return not spread or owner(index, spread) == rank()


def exchange_(parts: Parts, errors: Errors, spread: bool) -> None:
    """Give every process the finished blocks of their owners, and the errors of these."""
    for index, (block, parameters) in enumerate(parts.items() if num_processes() > 1 else ()):
        done = (errors[block], [p.detach().cpu() for p in parameters.values()]) if block in errors else None
        found = from_process(owner(index, spread), done)
        if found is not None:
            errors[block] = found[0]
            _fill_(parameters, dict(zip(parameters, found[1], strict=True)))


@torch.no_grad()
def _fill_(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters of the same names."""
    for name, p in parameters.items():
        p.copy_(tensors[name])
