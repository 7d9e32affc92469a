"""Talks between the processes of one run: which is the main one, and how values and errors reach the others.

One process is the usual case, and then every function here does the plain thing at once. Several are started by
torchrun. Messages go over a gloo group of their own, because some processes wait while the main one measures and
writes, which takes longer than collectives between GPUs may. Gradients and shards are not dealt with here.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitrim.errors import VitrimError
from vitrim.surgery import Plan, reshape_

T = TypeVar("T")

# How long a process waits for the main one, which may have a large model to write and to load back.
PATIENCE = timedelta(hours=24)


def join_(device: str) -> None:
    """Join the processes that torchrun started; without torchrun, do nothing. Each process then has a GPU of its own.

    Args:
        device: as in a recipe; on "cpu" the processes talk over gloo even where there are GPUs.
    """
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(cpu=device == "cpu")
        atexit.register(_leave)


def _leave() -> None:
    """Leave the group before Python ends, so that its threads are joined.

    A thread of gloo that lets go of a tensor then waits for Python's lock, is ended by Python, and takes the process
    with it ("terminate called without an active exception"), though all work is done. The groups end when the last
    reference to them goes: those of the cache, and those of trained models in cycles.
    """
    _group_beside.cache_clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def num_processes() -> int:
    """Return how many processes take part in the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; 0 is the main one."""
    return 0 if num_processes() == 1 else dist.get_rank()


def is_main() -> bool:
    """Return whether this process is the one that writes, reports and prints."""
    return rank() == 0


def from_main(value: T) -> T:
    """Return the main process's value on every process; the others' own values are dropped."""
    return from_process(0, value)


def from_process(source: int, value: T) -> T:
    """Return the value of process `source` on every process."""
    if num_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=_control())
    return box[0]


def on_main(work: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a function on the main process alone; every process gets what it returned.

    Args:
        work: what to do; its value has to be small and plain.
        args: what it is called with.
        options: the same, by name.

    Raises:
        VitrimError: on every process, whatever the main one raised; what is no error of ours reaches the others as a
            VitrimError with its text.
    """
    if num_processes() == 1:
        return work(*args, **options)
    done: list[T] = []
    error: Exception | None = None
    if is_main():
        try:
            done.append(work(*args, **options))
        except Exception as caught:  # the others hear of it before it is raised, or they would wait for ever
            error = caught
    said = from_main(_words(error))
    if error is not None:
        raise error
    if said is not None:
        raise said
    return from_main(done[0] if done else None)  # type: ignore[return-value]


@contextmanager
def entered_on_main(context: AbstractContextManager[T]) -> Iterator[T]:
    """Enter and leave a context on the main process alone; every process gets its value and its errors."""
    with ExitStack() as stack:
        yield on_main(lambda: stack.enter_context(context))
        on_main(stack.close)


def any_process(flag: bool) -> bool:
    """Return whether the flag is True on any process."""
    return mean(float(flag)) > 0


def mean(value: float) -> float:
    """Return the mean of a number over the processes; NaN if it is NaN on one of them."""
    if num_processes() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=_control())
    return float(total) / num_processes()


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Give tensors the main process's values; every process passes the same shapes in the same order."""
    if num_processes() == 1:
        return
    for tensor in tensors:
        values = tensor.detach().contiguous()
        dist.broadcast(values, src=0, group=_control() if values.device.type == "cpu" else None)
        tensor.copy_(values)


@torch.no_grad()
def mean_(tensors: Iterable[Tensor]) -> None:
    """Put the mean over the processes into tensors; every process passes the same shapes in the same order."""
    for tensor in tensors if num_processes() > 1 else ():
        dist.all_reduce(tensor, group=_control() if tensor.device.type == "cpu" else None)
        tensor.div_(num_processes())


@torch.no_grad()
def sum_(tensors: Iterable[Tensor]) -> None:
    """Put the sum over the processes into tensors, the same bits on each; as for `mean_`."""
    for tensor in tensors if num_processes() > 1 else ():
        dist.all_reduce(tensor, group=_control() if tensor.device.type == "cpu" else None)


def gathered(value: T) -> list[T]:
    """Return the values of all processes, in their order."""
    if num_processes() == 1:
        return [value]
    every: list[Any] = [None] * num_processes()
    dist.all_gather_object(every, value, group=_control())
    return every


def plan_from_main(plan: Plan | None, student: nn.Module) -> Plan | None:
    """Give every process the main process's plan and student.

    Args:
        plan: the plan by which the student was cut; None where it is uncut.
        student: cut by the same plan but for rounding, or uncut and then cut here; gets the main process's values.

    Returns:
        The plan, its tensors on the CPU where they came from another process; None if the main process has none.
    """
    if num_processes() == 1:
        return plan
    bare = from_main(None if plan is None else plan.without_tensors())
    if bare is None:
        return None
    if plan is None:
        reshape_(student, bare.edits)
    broadcast_([*student.parameters(), *student.buffers()])
    edits = []
    for index, edit in enumerate(bare.edits):  # one at a time, since they hold weights
        tensors = plan.edits[index].tensors if plan is not None and is_main() else {}
        edits.append(replace(edit, tensors=from_main({name: tensor.cpu() for name, tensor in tensors.items()})))
    return replace(bare, edits=tuple(edits))


def _words(error: Exception | None) -> VitrimError | None:
    """Turn an error into one that can be sent to other processes."""
    if error is None or isinstance(error, VitrimError):
        return error
    return VitrimError(f"the main process failed ({type(error).__name__}: {error}); its own message says where.")


def states_group() -> dist.ProcessGroup:
    """Return a group for states alone, which are written while other messages pass; all processes have to ask."""
    return _group_beside(dist.group.WORLD, "states")


def _control() -> dist.ProcessGroup:
    """Return the group for messages between processes."""
    return _group_beside(dist.group.WORLD, "control")


@cache
def _group_beside(world: Any, purpose: str) -> dist.ProcessGroup:
    """Make a group, once for each purpose and each group of all processes."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group
