"""Shards of the teacher cache: targets of some images, in memory until they are written, then in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitrim.errors import CheckpointError
from vitrim.recover.cache_layout import Layout
from vitrim.storage.tensor_files import TensorFiles, tensor_bytes


class Shard:
    """Cached targets of some images: in memory until they are written, then read from their file."""

    def __init__(self, layout: Layout, files: TensorFiles | None = None) -> None:
        self.names, self.files = tuple(layout.tensors()), files
        self._rows: dict[str, list[Tensor]] = {name: [] for name in self.names}

    def __len__(self) -> int:
        return len(self._rows["row"]) if self.files is None else self.files.infos["row"].shape[0]

    def extend(self, parts: Mapping[str, Tensor]) -> None:
        """Add the targets of more images, in memory."""
        for name, part in parts.items():
            self._rows[name].extend(part)

    def stacked(self) -> dict[str, Tensor]:
        """Return the targets in memory as the tensors of a file."""
        return {name: torch.stack(rows) for name, rows in self._rows.items()}

    def written(self, files: TensorFiles) -> None:
        """Drop the targets in memory, and read from these files from now on."""
        self.files, self._rows = files, {}

    def read_into(self, parts: Mapping[str, Tensor], slots: Sequence[int], positions: Sequence[int]) -> None:
        """Copy the targets at some positions of this shard into slots of larger tensors.

        Raises:
            CheckpointError: the file has become unreadable.
        """
        if self.files is None:
            for name, part in parts.items():
                for slot, position in zip(slots, positions, strict=True):
                    part[slot] = self._rows[name][position]
            return
        path = self.files.infos["row"].file
        try:
            with path.open("rb", buffering=0) as file:
                for name, part in parts.items():
                    raw, size = tensor_bytes(part), part[0].nbytes
                    for slot, position in zip(slots, positions, strict=True):
                        file.seek(self.files.infos[name].start + position * size)
                        if file.readinto(raw[slot * size : (slot + 1) * size]) != size:
                            raise OSError(0, "ends too early")
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read ({error.strerror}); remove it and go on.") from None
