"""Proves in a fresh process that an output folder loads back to the same outputs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.errors import OutputError
from vitrim.models.features import evaluating
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin

# Run in a fresh interpreter: the stock check in one where importing vitrim fails, so that nothing of it can help.
STOCK_CHECK = """
import sys
sys.modules["vitrim"] = None
folder = sys.argv[1]
"""


OWN_CHECK = """
import sys, vitrim
model = vitrim.load(sys.argv[1])
"""


COMPARE = """
import torch
from safetensors.torch import load_file
probe = load_file(sys.argv[2])
encoder = model.to(probe["like"].dtype).float().eval().get_submodule(sys.argv[3])
with torch.inference_mode():
    output = encoder(probe["inputs"])
output = output if isinstance(output, torch.Tensor) else output[0]
error = float((output - probe["output"]).abs().max())
scale = float(probe["output"].abs().max())
assert error <= 1e-4 * max(scale, 1e-6), f"outputs differ by {error:.3g} at scale {scale:.3g}"
print(error / max(scale, 1e-30))
"""


def verify(folder: Path, student: nn.Module, inputs: Tensor, *, origin: Origin, stock: bool) -> float:
    """Load a folder in a fresh process and compare its outputs with the model in memory.

    Args:
        folder: what `save` wrote.
        student: the model in memory, whole; its encoder is run.
        inputs: a few images (or rows of token ids) to compare on.
        origin: the library that loads the folder, and the encoder's path.
        stock: load with the stock library, vitrim not importable; otherwise with `load`.

    Returns:
        Largest difference relative to the largest output.

    Raises:
        OutputError: the folder does not load, or loads to something else.
    """
    reference = copy.deepcopy(student.get_submodule(origin.encoder)).cpu()
    like = next(reference.parameters()).new_empty(0)
    reference = reference.to(like.dtype).float()  # bf16 is compared in float32, but with all buffers rounded to it
    with evaluating(reference):
        output = reference(inputs.cpu())
    output = output if isinstance(output, Tensor) else output[0]
    backend = backend_of(origin.library)
    load_it = STOCK_CHECK + backend.RELOAD if stock and backend is not None else OWN_CHECK
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        tensors = {"inputs": inputs.cpu().contiguous(), "output": output.clone().contiguous(), "like": like}
        save_file(tensors, probe)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", load_it + COMPARE, str(folder), str(probe), origin.encoder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().split("\n") or ["no message"])[-1]
        raise OutputError(f"{folder}: written, but does not load back to the same outputs ({reason}).")
    return float(done.stdout.split()[-1])
