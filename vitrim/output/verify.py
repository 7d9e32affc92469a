"""Checks in a fresh process that an output folder loads and gives the same outputs."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.errors import OutputError
from vitrim.models.features import evaluating
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin

# Run first in the interpreter: from then on importing vitrim fails, so that a stock library has no help from it.
WITHOUT_VITRIM = """
import sys
sys.modules["vitrim"] = None
"""


# The names that a check's code uses, from the command line of the fresh process.
GIVEN = """
import sys
from safetensors.torch import load_file
folder, probe, encoder = sys.argv[1], load_file(sys.argv[2]), sys.argv[3]
"""


OWN_LOAD = """
import vitrim
model = vitrim.load(folder)
"""


COMPARE = """
import torch
module = model.to(probe["like"].dtype).float().eval().get_submodule(encoder)
with torch.inference_mode():
    output = module(probe["inputs"])
output = output if isinstance(output, torch.Tensor) else output[0]
error = float((output - probe["output"]).abs().max())
scale = float(probe["output"].abs().max())
assert error <= 1e-4 * max(scale, 1e-6), f"outputs differ by {error:.3g} at scale {scale:.3g}"
difference = error / max(scale, 1e-30)
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of a written folder, independent of where it is run.

    `code` is Python that uses the names `folder` (a path as text), `probe` and `encoder`, and sets `difference` to the
    largest difference, relative to the largest output; it raises if that is too large. With `stock` it loads the folder
    with the stock library, and vitrim must not be importable. `probe` has `inputs`, the expected `output` of `encoder`
    (a path in the model), and an empty tensor `like` of the weights' type.
    """

    code: str
    stock: bool
    folder: Path
    probe: dict[str, Tensor]
    encoder: str

    def failed(self, reason: str) -> OutputError:
        """Return the error to raise if the code failed, with its own message as the reason."""
        return OutputError(f"{self.folder}: written, but does not load back to the same outputs ({reason}).")


RunCheck = Callable[[Check], float]


def in_fresh_process(check: Check) -> float:
    """Run a check in a new interpreter on the CPU, without network.

    Args:
        check: the folder, the code that loads it, and the expected output.

    Returns:
        The relative difference that the code measured.

    Raises:
        OutputError: the code raised; its last line is the reason.
    """
    code = (WITHOUT_VITRIM if check.stock else "") + GIVEN + check.code + "print(difference)\n"
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        save_file(check.probe, probe)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, str(check.folder), str(probe), check.encoder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise check.failed((done.stderr.strip().split("\n") or ["no message"])[-1])
    return float(done.stdout.split()[-1])


_run_check: ContextVar[RunCheck] = ContextVar("run_check", default=in_fresh_process)


@contextlib.contextmanager
def checking_with(run_check: RunCheck) -> Iterator[None]:
    """Run all checks inside this context with another function than `in_fresh_process`.

    Args:
        run_check: takes a check, returns the difference, and raises `check.failed(reason)` if that is too large.
    """
    token = _run_check.set(run_check)
    try:
        yield
    finally:
        _run_check.reset(token)


def verify(folder: Path, student: nn.Module, inputs: Tensor, *, origin: Origin, stock: bool) -> float:
    """Load a folder in a fresh process and compare its outputs with the model in memory.

    Args:
        folder: the folder that `save` wrote.
        student: the whole model in memory; its encoder is run.
        inputs: a few images (or rows of token ids) to compare on.
        origin: names the library that loads the folder, and the encoder's path.
        stock: load with the stock library while vitrim can't be imported; otherwise with `load`.

    Returns:
        The largest difference relative to the largest output.

    Raises:
        OutputError: the folder does not load, or its outputs differ.
    """
    reference = copy.deepcopy(student.get_submodule(origin.encoder)).cpu()
    like = next(reference.parameters()).new_empty(0)
    reference = reference.to(like.dtype).float()  # compare bf16 in float32, but with all buffers rounded to bf16
    with evaluating(reference):
        output = reference(inputs.cpu())
    output = output if isinstance(output, Tensor) else output[0]
    backend = backend_of(origin.library)
    by_library = backend.RELOAD if stock and backend is not None else None
    check = Check(
        code=(OWN_LOAD if by_library is None else by_library) + COMPARE,
        stock=by_library is not None,
        folder=folder,
        probe={"inputs": inputs.cpu().contiguous(), "output": output.clone().contiguous(), "like": like},
        encoder=origin.encoder,
    )
    return _run_check.get()(check)
