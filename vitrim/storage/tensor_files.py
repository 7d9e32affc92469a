"""Read checkpoints tensor by tensor: only what is asked for enters memory, and nothing is unpickled.

safetensors files are read with plain reads at the offsets in their headers, because a memory map of an 8 GB file counts
as resident memory page by page. The safetensors library checks the header first. A torch file is mapped by torch
(`weights_only=True`): the system may drop its pages when memory is short. What training loops wrap around the weights
is taken off in `training_files`. Nothing but regular files is opened: a FIFO or a device would never end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitrim.errors import DAMAGED, CheckpointError
from vitrim.storage.training_files import Which, read_training_file

CHUNK_BYTES = 32 * 2**20
MAX_NAME = 200  # of a shard; file systems end at 255 bytes, and raise for more
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
KINDS, INDEX = (".safetensors", ".pth", ".bin"), ".index.json"
# Where libraries put their weights, in one file or in shards with an index; the first that is there wins.
FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "model.pth",
)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """File, dtype, shape and position of a stored tensor, known without reading it.

    `start` is the offset of its values in a safetensors file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles(Mapping[str, Tensor]):
    """A mapping of names to the tensors of one or more files, each read on access.

    `said` is what the files say of how the model was built and trained, `notes` what was chosen when they were opened.
    """

    def __init__(
        self,
        infos: Mapping[str, TensorInfo],
        mapped: Mapping[str, Tensor] | None = None,
        *,
        said: Mapping[str, Any] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.infos, self._mapped, self.said, self.notes = dict(infos), mapped or {}, said or {}, notes

    def __len__(self) -> int:
        return len(self.infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __getitem__(self, name: str) -> Tensor:
        info = self.infos[name]
        if name in self._mapped:
            return self._mapped[name].detach().clone()
        values = bytearray(info.num_bytes)
        view, done = memoryview(values), 0
        for chunk in self.chunks(name):
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        if not values:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(values, dtype=info.dtype).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """Yield the raw little-endian bytes of a tensor, in pieces of bounded size.

        Raises:
            CheckpointError: the file can't be read, or ends before the tensor does.
        """
        info = self.infos[name]
        if name in self._mapped:
            flat = self._mapped[name].detach().contiguous().reshape(-1)
            step = max(1, CHUNK_BYTES // max(1, flat.element_size()))
            for start in range(0, flat.numel(), step):
                yield tensor_bytes(flat[start : start + step])
            return
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.start)
                left = info.num_bytes
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise CheckpointError(f"{info.file}: can't be read ({error.strerror}); check the disk.") from None
        if left:
            raise CheckpointError(f"{info.file}: ends inside tensor {name}; fetch the file again.")

    def finite_chunks(self, name: str, *, masks: bool = False) -> Iterator[memoryview]:
        """Yield the same bytes as `chunks`, after checking that their values are finite; `masks` as in `check_finite`.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file can't be read.
        """
        dtype, kept = self.infos[name].dtype, bytearray()
        for chunk in self.chunks(name):
            kept += chunk
            whole = len(kept) // dtype.itemsize * dtype.itemsize  # a read may end inside a value
            if whole:
                check_finite(name, torch.frombuffer(kept[:whole], dtype=dtype), masks=masks)
                yield memoryview(kept)[:whole]
            kept = kept[whole:]

    def fakes(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device: shapes and dtypes, no values."""
        return {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, i in self.infos.items()}

    def renamed(self, names: Mapping[str, str], *notes: str) -> TensorFiles:
        """Return the tensors under other names; those that `names` (old to new) does not hold are left out."""
        infos = {new: self.infos[old] for old, new in names.items()}
        mapped = {new: self._mapped[old] for old, new in names.items() if old in self._mapped}
        return TensorFiles(infos, mapped, said=self.said, notes=(*self.notes, *notes))


def open_tensors(path: Path, *, prefer: str = "", weights: Which = "auto") -> TensorFiles:
    """Open a checkpoint: a safetensors or torch file, an index of shards, or a folder that holds one of these.

    Args:
        path: file or folder.
        prefer: start of the preferred file name, for a folder that holds the weights of several libraries.
        weights: which weights of a training checkpoint to take: "auto" takes averaged ones (EMA) where there are any,
            "raw" those that were trained.

    Raises:
        CheckpointError: there are no weights or several candidates, a shard is missing, or a file is damaged.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: is no regular file; pass a .safetensors, .pth or .bin file, or a model folder.")
    found = find_weights(path, prefer=prefer)
    if len(found) == 1:
        return _open_shards(found[0], weights) if found[0].name.endswith(INDEX) else _open_file(found[0], weights)
    what = f"{len(found)} weight files and no index" if found else "no weights"
    raise CheckpointError(f"{path}: holds {what}; pass a .safetensors, .pth or .bin file, or a model folder.")


def user_path(text: str) -> Path:
    """Return a path with `~` as the user's home; as it is where nobody knows that home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user, or no HOME and a user without a name
        return Path(text)


def find_weights(path: Path, *, prefer: str = "") -> list[Path]:
    """Return the weight file or index to open; none or several where a folder leaves it open.

    Args:
        path: file or folder.
        prefer: start of the preferred file name, as for `open_tensors`.
    """
    if path.is_file():
        return [path]
    for name in sorted(FILES, key=lambda name: not (prefer and name.startswith(prefer))):
        for file in (path / name, path / f"{name}{INDEX}"):
            if file.is_file():
                return [file]
    indices, *files = ([file for file in sorted(path.glob(f"*{kind}")) if file.is_file()] for kind in (INDEX, *KINDS))
    return indices or [file for found in files for file in found]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy())) if flat.numel() else memoryview(b"")


def not_finite(tensor: Tensor, *, masks: bool = False) -> str | None:
    """Return in words that a tensor holds NaN or infinite values, and how many; None if it does not.

    Args:
        tensor: of any type; whole numbers are always finite.
        masks: allow infinity, which buffers hold as the mask of an attention or the open end of a range (Gemma 4).
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return None
    values = tensor.detach()
    values = values.float() if values.dtype.itemsize == 1 else values  # of 8 bits torch can't ask this
    finite = torch.isfinite(values)
    if masks:
        finite |= values.isinf()
    if bool(finite.all()):
        return None
    return f"holds NaN or infinite values ({int((~finite).sum()):,} of {tensor.numel():,})"


def check_finite(name: str, tensor: Tensor, *, masks: bool = False) -> None:
    """Check that a weight holds finite values only; with `masks` it may hold infinity.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if (what := not_finite(tensor, masks=masks)) is not None:
        raise CheckpointError(f"{name}: {what}; fetch the checkpoint again.")


def _open_shards(index: Path, weights: Which) -> TensorFiles:
    """Open the shards that an index names, and take each tensor from the shard that the index gives for it."""
    try:
        weight_map = {
            str(name): str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        }
    except DAMAGED as error:
        raise CheckpointError(f"{index}: is no index of shards ({error!r}); fetch it again.") from None
    infos: dict[str, TensorInfo] = {}
    mapped: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or len(shard) > MAX_NAME:
            raise CheckpointError(f"{index}: names {shard[:80]!r}, which is not a file beside it; fetch it again.")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index.parent / shard}: missing, named by {index.name}; fetch it again.")
        opened = _open_file(index.parent / shard, weights)
        for name in [name for name, where in weight_map.items() if where == shard]:
            if name not in opened.infos:
                raise CheckpointError(f"{index}: says that {shard} holds {name}, and it does not; fetch both again.")
            infos[name] = opened.infos[name]
            mapped |= {name: opened._mapped[name]} if name in opened._mapped else {}
    return TensorFiles({name: infos[name] for name in weight_map}, mapped)


def _open_file(path: Path, weights: Which) -> TensorFiles:
    """Open one safetensors or torch file."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path, weights)


def _open_safetensors(path: Path) -> TensorFiles:
    """Open a safetensors file, after the library itself has checked its header."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch the file again.") from None
    header.pop("__metadata__", None)
    infos = {}
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if said["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} has type {said['dtype']}; allowed are {', '.join(DTYPES)}.")
        start = 8 + length + said["data_offsets"][0]
        infos[name] = TensorInfo(file=path, dtype=DTYPES[said["dtype"]], shape=tuple(said["shape"]), start=start)
    return TensorFiles(infos)


def _open_torch(path: Path, weights: Which) -> TensorFiles:
    """Open what torch saved: a state dict, or a training checkpoint that holds one."""
    found = read_training_file(path, weights)
    infos = {name: TensorInfo(file=path, dtype=t.dtype, shape=tuple(t.shape)) for name, t in found.tensors.items()}
    return TensorFiles(infos, found.tensors, said=found.said, notes=found.notes)
