"""A state in a folder, of which each process writes its part: torch's distributed checkpoint over files of our own.

`torch.distributed.checkpoint` copies what a process has to write, writes it in a thread while training goes on, and
finds on resume which pieces of which files another number of processes needs. What it stores with is replaced: its own
format reads an index through `pickle`, which executes what it finds. Here a part is a safetensors file with a digest,
and the index is JSON with one. So nothing is ever unpickled, and a flipped bit is found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from vitrim.distributed.processes import gathered, num_processes, rank, states_group
from vitrim.errors import CheckpointError
from vitrim.recover.nesting import unpacked
from vitrim.storage.sealed import read_sealed, read_tensors, write_sealed, write_tensors
from vitrim.storage.tensor_files import CODES, DTYPES, TensorFiles, open_tensors

FORMAT, INDEX = "vitrim-state/2", "index.json"
FIELDS = {"format": str, "parts": dict, "tensors": dict}
# Returns for the keys that lead to a tensor what it is to be spread like, or None where each process holds the whole.
Like = Callable[[Sequence[Any]], Tensor | None]


def start_parts(folder: Path, nesting: Any, tensors: Sequence[Tensor], done: Callable[[], None]) -> Any:
    """Copy this process's part of a state, and write it in a thread; every process has to call this.

    Args:
        folder: empty, on a disk that all processes see.
        nesting: the state with numbers in the place of tensors.
        tensors: equal on all processes but for shards; they may change once this has returned.
        done: called on the main process once all parts and the index are on disk.

    Returns:
        A future, the same outcome on every process.
    """
    writers = _writers(tensors)
    mine = {
        str(number): tensor
        for number, tensor in enumerate(tensors)
        if isinstance(tensor, DTensor) or writers[number] == rank()
    }
    return async_save(mine, storage_writer=_Writer(folder, nesting, done), process_group=states_group())


def _writers(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return which process writes each tensor that all of them hold whole: the largest first, to whom has the least."""
    whole = {number: tensor.nbytes for number, tensor in enumerate(tensors) if not isinstance(tensor, DTensor)}
    found, held = {}, [0] * num_processes()
    for number, size in sorted(whole.items(), key=lambda item: -item[1]):
        found[number] = min(range(len(held)), key=lambda process: held[process])
        held[found[number]] += size
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a state.

    Raises:
        CheckpointError: it can't be read, or was changed.
    """
    index = read_sealed(folder / INDEX, FIELDS)
    if index["format"] != FORMAT:
        raise CheckpointError(f"{folder}: its format is {index['format']!r}; this version reads {FORMAT!r}.")
    return index


def damage_of(folder: Path, index: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the parts of a state, None if they are whole; each process reads some of them."""
    said = None
    for part, digest in sorted(index["parts"].items())[rank() :: num_processes()]:
        try:
            read_tensors(folder / part, digest=digest)
        except CheckpointError as error:
            said = said or str(error)
    return next(filter(None, gathered(said)), None)


def load_parts(folder: Path, index: Mapping[str, Any], like: Like) -> Any:
    """Read of a state what this process holds of it; every process has to call this.

    Args:
        folder: the state.
        index: what `read_index` returned.
        like: see `Like`; what it returns is not changed.
    """
    tensors: dict[str, Any] = {}

    def empty(name: str, keys: Sequence[Any]) -> Tensor:
        said = index["tensors"][name]
        tensors[name] = _empty(tuple(said["shape"]), DTYPES[said["dtype"]], like(keys))
        return tensors[name]

    state = unpacked(index["nesting"], empty)
    alone = num_processes() == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        load(
            tensors,
            storage_reader=_Reader(folder, index),
            process_group=None if alone else states_group(),
            no_dist=alone,
        )
    return state


def _empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """Return a tensor without values, spread as another one is where that is in shards and of the same shape."""
    if isinstance(like, DTensor) and tuple(like.shape) == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


class _Writer(StorageWriter):
    """Writes each process's pieces of tensors into one file, and behind all of them an index."""

    def __init__(self, folder: Path, nesting: Any, done: Callable[[], None]) -> None:
        self.folder, self.nesting, self.done = folder, nesting, done

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a writer writes once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder, where it is not there on this machine's disk or not seen yet."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's pieces, and return once they are on disk."""
        pieces: dict[str, Tensor] = {}
        for item in plan.items:
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor)
            pieces[_piece(item.index)] = data
        part = f"part-{rank()}.safetensors"
        digest = write_tensors(self.folder / part, pieces)
        where = (part, digest)
        results = [
            WriteResult(index=item.index, size_in_bytes=pieces[_piece(item.index)].nbytes, storage_data=where)
            for item in plan.items
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the main process, once all parts are on disk.

        Raises:
            CheckpointError: the main process does not see a part.
        """
        written = [result for each in results for result in each]
        parts = dict(sorted({result.storage_data for result in written}))
        for part in parts:
            if not (self.folder / part).is_file():
                raise CheckpointError(f"{part} is not seen by the main process: every machine has to see this folder")
        parts_of: dict[str, list[Any]] = {}
        for result in written:
            parts_of.setdefault(result.index.fqn, []).append([list(result.index.offset or ()), result.storage_data[0]])
        tensors = {
            name: _described(about, parts_of[name])
            for name, about in metadata.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }
        write_sealed(
            self.folder / INDEX, {"format": FORMAT, "nesting": self.nesting, "parts": parts, "tensors": tensors}
        )
        self.done()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return True: a writer is made for its folder."""
        return True


def _described(about: TensorStorageMetadata, pieces: Sequence[Any]) -> dict[str, Any]:
    """Return what the index says of a tensor; each piece as its start, its size and its file."""
    sizes = {tuple(chunk.offsets): list(chunk.sizes) for chunk in about.chunks}
    said = [[start, sizes[tuple(start)], part] for start, part in sorted(pieces)]
    return {"dtype": CODES[about.properties.dtype], "shape": list(about.size), "pieces": said}


def _piece(index: MetadataIndex) -> str:
    """Return the name of a piece of a tensor in its file."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


class _Reader(StorageReader):
    """Reads what `_Writer` wrote, of each tensor the pieces that a process asks for."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.parts: dict[str, TensorFiles] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a reader reads once."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keep where each piece is."""
        self.where: Mapping[MetadataIndex, str] = metadata.storage_data

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index as torch knows it."""
        tensors, where = {}, {}
        for name, said in self.index["tensors"].items():
            chunks = []
            for start, size, part in said["pieces"]:
                chunks.append(ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(size)))
                where[MetadataIndex(name, start)] = part
            properties = TensorProperties(dtype=DTYPES[said["dtype"]])
            tensors[name] = TensorStorageMetadata(properties=properties, size=torch.Size(said["shape"]), chunks=chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=where)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the pieces of a plan, one at a time, and put each where it belongs."""
        for item in plan.items:
            part = self.where[item.storage_index]
            if part not in self.parts:
                self.parts[part] = open_tensors(self.folder / part)
            piece = self.parts[part][_piece(item.storage_index)]
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(dim, start, length)
            target = planner.resolve_tensor(item)
            target.detach().copy_(piece)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return True: a reader is made for its folder."""
        return True
