"""Sequences of skeletons: parquet files, folders of NumPy arrays, or arrays, as an `ImageSet` of tensors (3, T, V).

What is preprocessed is a recording (T, V, 3). Its frames are resampled, each axis is scaled to -1..1 over the whole of
it, and what the model takes is made of that: joints, bones (a joint less the one that it hangs on), or the motion of
either. Training draws a rotation and which frames are taken. A random scale, which papers draw as well, would be undone
by the scaling of each axis, so there is none.

Shapes: T frames, V joints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrim.data.decode import Raw, Seen
from vitrim.data.folders import walk
from vitrim.data.images import ImageSet
from vitrim.data.labels import number_labels
from vitrim.data.parts import Part, meaning_of
from vitrim.data.sources import Rows, unpack
from vitrim.errors import DataError
from vitrim.models.skeleton import PARENTS, Stream

Joints = NDArray[np.float32]
ALLOWED = (
    "pass a parquet file with columns joints, num_frames and label, a folder of .npy arrays (frames, joints, 3) in "
    "folders of classes or beside a labels.csv, or pairs of an array and a label"
)
TABLE = "use float32 bytes of (frames, joints, 3), and a whole number of frames"
COLUMNS = ("joints", "num_frames", "label")
NUMBERS = "fiu"  # kinds of arrays that hold joints
LABELS = "labels.csv"  # lines of a file's name and a label
VIEW = re.compile(r"_v0*(\d+)$")  # how names of NW-UCLA end
TEST_VIEW = 3
MAX_ANGLE = 60.0  # degrees, to either side, around the vertical and around the horizontal axis
MIRROR = (0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15)
TOP_DOWN = (2, 1, 0, *range(3, 20))  # each joint behind the one that it hangs on
# Somebody who stands, x and y of the middle of the body, the left arm and the left leg.
MIDDLE = ((0.0, 0.0), (0.0, 0.2), (0.0, 0.6), (0.0, 1.0))
LEFT_ARM = ((-0.3, 0.55), (-0.45, 0.2), (-0.5, -0.1), (-0.5, -0.2))
LEFT_LEG = ((-0.15, -0.05), (-0.2, -0.5), (-0.2, -0.9), (-0.3, -1.0))


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A sequence that is not read yet: its name, its joints or the file that holds them, and its label."""

    name: str
    joints: Joints | Path
    label: Any = -1


def open_skeletons(
    source: Any, *, num_joints: int, transform: Any, split: str | None, limit: int | None, default: str
) -> ImageSet:
    """Open sequences of skeletons; the third view of NW-UCLA is its test part wherever it stands beside others.

    Args:
        source: what `ALLOWED` says.
        num_joints: how many joints the model takes.
        transform: from a recording (T, V, 3) to a tensor (3, T, V).
        split: part to read of a source that has parts.
        limit: read only this many sequences, evenly spaced.
        default: part to read of a source that has parts where no split is given.

    Raises:
        DataError: the source is of none of these kinds, or a sequence has no frames, other joints, or fewer values than
            it says.
    """
    part = Part(asked=split, default=default)
    found, name = _recordings(source, part)
    if not found:
        raise DataError(f"{name}: no sequences found; {ALLOWED}.")
    found = _of_view(found, part, name)
    for each in found:
        _check(each, name, num_joints)
    rows = _Recordings(found, name)
    images = ImageSet(rows, name=name, transform=transform, seen=Seen(len(rows), part.notes))
    return images if limit is None else images.spaced(limit)


class _Recordings(Rows):
    """Recordings in order, read when they are asked for."""

    def __init__(self, found: Sequence[Recording], name: str) -> None:
        self._found = found
        self._labels, self.classes = number_labels([each.label for each in found], name)

    def __len__(self) -> int:
        return len(self._found)

    def read(self, row: int) -> tuple[Raw, int]:
        joints = self._found[row].joints
        joints_TVC = np.load(joints) if isinstance(joints, Path) else joints
        bad = ~np.isfinite(joints_TVC).all((1, 2))
        if bad.any():
            raise OSError(f"frame {int(bad.argmax())} holds a joint that is not finite, and {int(bad.sum())} frames do")
        return Raw(torch.tensor(joints_TVC, dtype=torch.float32)), self._labels[row]

    def where(self, row: int) -> str:
        return self._found[row].name


def _recordings(source: Any, part: Part) -> tuple[list[Recording], str]:
    """Return the recordings of a source, and a name to show."""
    if not isinstance(source, str | Path):
        name = type(source).__name__
        part.without(name)
        if not isinstance(source, Iterable):
            raise DataError(f"{name}: no source of sequences; {ALLOWED}.")
        pairs = [unpack(item) for item in source]
        return [Recording(name=f"item {n}", joints=_array(each), label=y) for n, (each, y) in enumerate(pairs)], name
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; {ALLOWED}.")
    tree = [((), [path])] if path.is_file() else list(walk(path))
    files = sorted(file for _, inside in tree for file in inside)
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    if tables:
        chosen = tables if path.is_file() else part.of_files(tables, path)
        return [each for file in chosen for each in _of_table(file)], str(path)
    return _of_folder(path, [file for file in files if file.suffix.lower() == ".npy"], part), str(path)


def _array(given: Any) -> Joints:
    """Return an array of joints, or what is none as an empty one, to be refused."""
    if not isinstance(given, np.ndarray | Tensor):
        return np.empty((0, 0, 0), np.float32)
    array = np.asarray(given)
    return array.astype(np.float32) if array.dtype.kind in NUMBERS else array


def _of_table(file: Path) -> list[Recording]:
    """Read the recordings of a parquet file: float32 bytes of (T, V, 3), and T."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error}); write or download it again.") from None
    names = set(table.column_names)
    if not {"joints", "num_frames"} <= names:
        raise DataError(f"{file}: has columns {', '.join(sorted(names))}; {ALLOWED}.")
    found = []
    for number, row in enumerate(table.select([c for c in (*COLUMNS, "name") if c in names]).to_pylist()):
        name, frames, held = row.get("name", f"row {number}"), row["num_frames"] or 0, row["joints"] or b""
        if not (isinstance(held, bytes) and isinstance(frames, int)):
            raise DataError(
                f"{file}: {name} has {type(held).__name__} joints, {type(frames).__name__} frames; {TABLE}."
            )
        values = np.frombuffer(held[: len(held) // 4 * 4], np.float32)
        if frames < 1:
            raise DataError(f"{file}: {name} has {frames or 'no'} frames; leave empty sequences out.")
        if len(held) % 4 or len(values) % (frames * 3):
            raise DataError(
                f"{file}: {name} says {frames} frames and holds {len(held)} bytes, no whole number of joints for "
                "each; write it again with the frames that are missing."
            )
        joints = values.reshape(frames, -1, 3)
        found.append(Recording(name=str(name), joints=joints, label=row.get("label", -1)))
    return found


def _of_folder(root: Path, files: Sequence[Path], part: Part) -> list[Recording]:
    """Find the recordings of a folder of arrays: parts are first-level folders, then classes, or a labels.csv says."""
    first = {file.relative_to(root).parts[0] for file in files if file.parent != root}
    if first and all(meaning_of(name) for name in first):
        chosen = part.pick(first, str(root))
        return [each for name in sorted(chosen) for each in _labelled(root / name, files)]
    return _labelled(root, files)


def _labelled(root: Path, files: Sequence[Path]) -> list[Recording]:
    """Return the recordings below a folder, with labels from its labels.csv, or from its folders."""
    mine = [file for file in files if root in file.parents]
    known: dict[str, Any] = {}
    if (root / LABELS).is_file():
        for line in (root / LABELS).read_text(encoding="utf-8").splitlines():
            name, _, label = line.partition(",")
            known[name.strip().removesuffix(".npy")] = int(label) if label.strip().isdigit() else label.strip()
        missing = [file.stem for file in mine if file.stem not in known]
        if missing:
            raise DataError(f"{root / LABELS}: names no label for {missing[0]}.npy; give every sequence one.")
        return [Recording(name=file.stem, joints=file, label=known[file.stem]) for file in mine]
    loose = any(file.parent == root for file in mine)
    return [
        Recording(name=file.stem, joints=file, label=-1 if loose else file.relative_to(root).parts[0]) for file in mine
    ]


def _of_view(found: list[Recording], part: Part, where: str) -> list[Recording]:
    """Return the part of recordings from several cameras: the third view tests, the others train."""
    views = [None if (seen := VIEW.search(each.name)) is None else int(seen[1]) for each in found]
    if None in views or TEST_VIEW not in views or len(set(views)) < 2:
        if not part.notes:
            part.without(where)
        return found
    [chosen] = part.pick({"train", "test"}, f"{where}: by views")
    return [each for each, view in zip(found, views, strict=True) if (view == TEST_VIEW) == (chosen == "test")]


def _check(each: Recording, where: str, num_joints: int) -> None:
    """Refuse a recording without frames, or with other joints than the model takes."""
    try:
        joints = np.load(each.joints, mmap_mode="r") if isinstance(each.joints, Path) else each.joints
    except (OSError, ValueError) as error:
        raise DataError(f"{each.joints}: can't be read as an array ({error}); {ALLOWED}.") from None
    name = each.joints if isinstance(each.joints, Path) else f"{where}: {each.name}"
    if joints.ndim != 3 or joints.shape[2] != 3 or joints.dtype.kind not in NUMBERS:
        raise DataError(f"{name} is an array {joints.shape} of {joints.dtype}; use numbers (frames, {num_joints}, 3).")
    if not len(joints):
        raise DataError(f"{name} has no frames; leave empty sequences out.")
    if joints.shape[1] != num_joints:
        said = f"{joints.shape[1]} joints in each of {len(joints)} frames"
        raise DataError(f"{name} has {said}, and the model takes {num_joints}; pass others, or the frames that lack.")


class SkeletonTransform:
    """From a recording (T, V, 3) to the tensor (3, T, V) that a model takes; picklable, for processes that read.

    Args:
        num_frames: how many frames it takes.
        stream: what of them.
        augment: draw a rotation and the frames, from torch's generator.
        flip: mirror half of the recordings as well, left and right joints exchanged.
    """

    def __init__(self, num_frames: int, stream: Stream, *, augment: bool = False, flip: bool = False) -> None:
        self.num_frames, self.stream, self.augment, self.flip = num_frames, stream, augment, flip

    def __call__(self, joints_TVC: Tensor) -> Tensor:
        """Return joints, bones or their motion, from -1 to 1 at each axis of the joints."""
        if self.augment:
            joints_TVC = (joints_TVC - joints_TVC[0].mean(0)) @ random_turn()
            if self.flip and bool(torch.rand(()) < 0.5):
                joints_TVC = joints_TVC[:, list(MIRROR)] * torch.tensor([-1.0, 1.0, 1.0])
        rows_TVC = _scaled(joints_TVC)[self._frames(len(joints_TVC))]
        if self.stream.startswith("bone"):
            rows_TVC = rows_TVC - rows_TVC[:, list(PARENTS)]
        if self.stream.endswith("motion"):
            rows_TVC = torch.cat([rows_TVC[1:] - rows_TVC[:-1], torch.zeros_like(rows_TVC[:1])])
        return rows_TVC.permute(2, 0, 1).contiguous()

    def _frames(self, count: int) -> Tensor:
        """Return which frames are taken: evenly spaced ones, or drawn ones in order."""
        if self.augment:
            return torch.randint(count, (self.num_frames,)).sort().values
        return torch.linspace(0, count - 1, self.num_frames).round().long()


def _scaled(joints_TVC: Tensor) -> Tensor:
    """Scale each axis of a recording to -1..1; one that never varies becomes 0."""
    low_C, high_C = joints_TVC.amin((0, 1)), joints_TVC.amax((0, 1))
    span_C = high_C - low_C
    return torch.where(span_C > 0, 2 * (joints_TVC - low_C) / span_C.clamp(min=1e-12) - 1, torch.zeros(()))


def poses_of_stream(inputs_CTV: Tensor, stream: Stream) -> Tensor:
    """Return poses (T, V, C) to draw of what a model takes.

    Bones give poses whose root stays in its place. Motion says nothing of the first frame, so somebody stands there.
    """
    rows_TVC = inputs_CTV.permute(1, 2, 0)
    if stream.endswith("motion"):
        start_VC = _standing() if stream == "joint-motion" else _standing() - _standing()[list(PARENTS)]
        rows_TVC = start_VC + torch.cat([torch.zeros_like(rows_TVC[:1]), rows_TVC[:-1]]).cumsum(0)
    if not stream.startswith("bone"):
        return rows_TVC
    poses_TVC = rows_TVC.clone()
    for joint in TOP_DOWN[1:]:
        poses_TVC[:, joint] += poses_TVC[:, PARENTS[joint]]
    return poses_TVC


def _standing() -> Tensor:
    """Return the joints (V, C) of somebody who stands."""
    places_V2 = torch.tensor([*MIDDLE, *LEFT_ARM, *LEFT_ARM, *LEFT_LEG, *LEFT_LEG])
    places_V2[[*range(8, 12), *range(16, 20)], 0] *= -1
    return torch.cat([places_V2, torch.zeros(len(places_V2), 1)], dim=1)


def random_turn() -> Tensor:
    """Draw a rotation around the vertical axis and then around the horizontal one."""
    vertical, horizontal = ((2 * float(torch.rand(())) - 1) * math.radians(MAX_ANGLE) for _ in range(2))
    (c, s), (d, t) = ((math.cos(angle), math.sin(angle)) for angle in (vertical, horizontal))
    around_y = torch.tensor([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])
    return around_y @ torch.tensor([[1.0, 0.0, 0.0], [0.0, d, -t], [0.0, t, d]])
