"""What several processes do with states in parts, for tests/test_state_parts.py; torchrun starts it with a folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.support.two_processes import SHARDED, SHORT, stopped, train
from vitrim.distributed.processes import is_main, join_, num_processes
from vitrim.recover import state_parts
from vitrim.recover.state import load_state, save_state, start_saving

WAYS: dict[str, dict[str, Any]] = {"ddp": {}, "sharded": SHARDED}
OPTIONS = {**SHORT, "ema": 0.8}
# Rows that two and three processes can't share evenly, fewer rows than processes, and no rows.
SHAPES = [(7, 3), (1, 5), (2,), (0, 4), (6, 2, 2)]


def whole_values() -> dict[str, Any]:
    """A state of every kind of value, as one process holds it."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return {
        "spread": {"p": tensors[0], **{str(index): tensor for index, tensor in enumerate(tensors)}},
        "whole": [*tensors, torch.tensor(True), torch.ones(2, 3, dtype=torch.bfloat16).T, torch.arange(5)],
        "plain": {1: (float("inf"), None), 0.5: "é"},
    }


def shard(tensor: Tensor) -> Tensor:
    """A tensor in shards over all processes."""
    return distribute_tensor(tensor, init_device_mesh("cpu", (num_processes(),)), [Shard(0)])


def spread_values() -> dict[str, Any]:
    """The same with one half in shards."""
    values = whole_values()
    return {**values, "spread": {name: shard(tensor) for name, tensor in values["spread"].items()}}


def same(found: Any, expected: Any) -> bool:
    """Whether nested values are equal, bit for bit; shards by what this process holds of them."""
    if isinstance(expected, Tensor):
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (found, expected)]
        return type(found) is type(expected) and found.dtype == expected.dtype and torch.equal(*local)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected and type(found) is type(expected)


def as_shards(keys: Any) -> Tensor | None:
    """Ask for what stands under "spread" in shards."""
    return shard(whole_values()["spread"][keys[1]]) if keys[0] == "spread" else None


def kept(path: Path) -> None:
    """A state is kept as it was when asked for, whatever changes while it is written; no tensor is ever gathered."""
    gather, DTensor.full_tensor = DTensor.full_tensor, None
    save_state(path, {"before": torch.ones(3)})
    values = spread_values()
    saving = start_saving(path, values)
    for tensor in (*values["spread"].values(), *values["whole"]):
        tensor.zero_()
    saving.wait()
    assert same(load_state(path, as_shards), spread_values())
    assert same(load_state(path), whole_values())  # the same for one that holds all
    DTensor.full_tensor = gather


def two(folder: Path) -> None:
    """States of two processes, whole runs, stopped ones, and at the end one that is killed while it writes."""
    kept(folder / "a.state")
    for name, options in WAYS.items():
        found = train({**OPTIONS, **options}, work=folder / f"whole-{name}")
        stopped({**OPTIONS, **options}, folder / f"left-{name}")
        torch.save(found["weights"], folder / f"whole-{name}.pt")
        if is_main():
            shutil.copytree(folder / f"left-{name}", folder / f"two-{name}")
    real, seen = state_parts.write_tensors, [0]

    def killing(*args: Any) -> str:
        seen[0] += 1
        digest = real(*args)
        if dist.get_rank() == 1 and seen[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return digest

    state_parts.write_tensors = killing
    train({**OPTIONS, **SHARDED}, work=folder / "killed")


def two_again(folder: Path) -> None:
    """Two processes go on where two were stopped, and where one of them was killed."""
    for name, options in WAYS.items():
        found = train({**OPTIONS, **options}, work=folder / f"two-{name}", resume=True)
        torch.save(found["weights"], folder / f"again-{name}.pt")
    found = train({**OPTIONS, **SHARDED}, work=folder / "killed", resume=True)
    torch.save(found["weights"], folder / "again-killed.pt")


def three(folder: Path) -> None:
    """Three processes go on where two were stopped, and are stopped themselves."""
    assert same(load_state(folder / "a.state", as_shards), spread_values())
    assert same(load_state(folder / "a.state"), whole_values())
    save_state(folder / "b.state", spread_values())
    for name, options in WAYS.items():
        found = train({**OPTIONS, **options}, work=folder / f"left-{name}", resume=True)
        torch.save(found["weights"], folder / f"three-{name}.pt")
        stopped({**OPTIONS, **options}, folder / f"three-{name}")


def main(what: str, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    join_("cpu")
    {"two": two, "two_again": two_again, "three": three}[what](folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
