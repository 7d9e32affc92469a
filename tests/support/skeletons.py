"""Made-up recordings of skeletons: stick figures that wave, kick or stand, seen by three cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitrim.models.skeleton import PARENTS


def recording(label: int, seed: int, frames: int = 12) -> np.ndarray:
    """Return (T, 20, 3) metres: class 0 moves one arm, 1 a leg, 2 nothing, all with noise and a turn of the body."""
    rng = np.random.default_rng(seed)
    rest = np.zeros((20, 3))
    for joint in (2, 1, 0, *range(3, 20)):
        if joint != 2:
            rest[joint] = rest[PARENTS[joint]] + [0.2 * np.sin(3 * joint), 0.1 if joint == 3 else -0.25, 0]
    joints = np.repeat(rest[None], frames, 0)
    swing = 0.6 * np.sin(np.linspace(0, 6, frames))
    for joint in {0: (9, 10, 11), 1: (17, 18, 19), 2: ()}[label]:
        joints[:, joint, 1] += swing
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    return ((joints + 0.01 * rng.standard_normal(joints.shape)) @ turn + [0, 0, 3]).astype(np.float32)


def pairs(count: int = 30) -> list[tuple[np.ndarray, int]]:
    """Return recordings of different lengths with their labels."""
    return [(recording(n % 3, n, 8 + n % 7), n % 3) for n in range(count)]


def write_table(path: Path, found: list[tuple[np.ndarray, int]], views: tuple[int, ...] = (1, 2)) -> Path:
    """Write recordings as a parquet file of the shared kind."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "name": [f"a{label:02d}_s01_e{n:02d}_v{views[n % len(views)]:02d}" for n, (_, label) in enumerate(found)],
        "label": [label for _, label in found],
        "num_frames": [len(joints) for joints, _ in found],
        "joints": [joints.tobytes() for joints, _ in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path
