"""Checks in a fresh process that an output folder loads, gives the same outputs, and says what the original said.

What it says is its preprocessing, labels, tag and licence. They are compared as they are written, and by what the
library's own transform makes of an image file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.errors import NotFiniteError, OutputError, reason_of
from vitrim.inputs import Inputs, run_on
from vitrim.models.features import evaluating, first_tensor
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin
from vitrim.models.remote_code import RELOAD, has_remote_code

log = logging.getLogger("vitrim")

# Run first in the interpreter: from then on importing vitrim fails, so that a stock library has no help from it.
WITHOUT_VITRIM = """
import sys
sys.modules["vitrim"] = None
"""


# The names that a check's code uses, from the command line of the fresh process.
GIVEN = """
import json, sys
from safetensors.torch import load_file
folder, scratch, encoder = sys.argv[1:]
probe, original = load_file(scratch + "/probe.safetensors"), json.load(open(scratch + "/original.json"))
image_file = scratch + "/image.png"
"""


OWN_READS = """
from pathlib import Path
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin
from vitrim.output.load import read_about
origin = Origin.from_json(read_about(Path(folder))["origin"]).placed_at(folder)
said, transform = backend_of(origin.library).says(origin), backend_of(origin.library).transform(origin)
"""


OWN_LOAD = """
import vitrim
model = vitrim.load(folder)
"""


COMPARE_CONFIG = """
import json
said = json.loads(json.dumps(said, default=str))
for key, value in original.items():
    found = said.get(key)
    if isinstance(value, dict) and isinstance(found, dict):
        key, value, found = next(((k, value.get(k), found.get(k)) for k in {**found, **value}
                                  if value.get(k) != found.get(k)), (key, 0, 0))
    assert found == value, f"{key} is {str(found):.80} there, {str(value):.80} in the original"
if "pixels" in probe:
    from PIL import Image
    pixels = transform(Image.open(image_file))
    unlike = "an image file becomes other pixels there than with the original's preprocessing"
    assert pixels.shape == probe["pixels"].shape, unlike
    assert float((pixels - probe["pixels"]).abs().max()) <= 1e-4 * float(probe["pixels"].abs().max()), unlike
difference = 0.0
"""


COMPARE = """
import torch
module = model.to(probe["like"].dtype).float().eval().get_submodule(encoder)
named = {name.removeprefix("inputs."): probe[name] for name in probe if name.startswith("inputs.")}
def difference_of(expected, *inputs, **named):
    with torch.inference_mode():
        output = module(*inputs, **named)
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    error, scale = float((output - expected).abs().max()), float(expected.abs().max())
    assert error <= 1e-4 * max(scale, 1e-6), f"outputs differ by {error:.3g} at scale {scale:.3g}"
    return error / max(scale, 1e-30)
difference = difference_of(probe["output"], *([] if named else [probe["inputs"]]), **named)
if "output_of_image" in probe:
    difference = max(difference, difference_of(probe["output_of_image"], pixels[None]))
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of a written folder, independent of where it is run.

    `code` is Python that uses the names `folder` (a path as text), `probe`, `encoder`, `original` and `image_file`, and
    sets `difference` to the largest difference, relative to the largest output; it raises if that is too large, or if
    the folder says something else than `original`. With `stock` a library loads the folder by itself (or transformers,
    with the modeling file in it), and vitrim must not be importable. `probe` has `inputs` (or `inputs.NAME` for each of
    several), the expected `output` of `encoder` (a path in the model), an empty tensor `like` of the weights' type,
    and, where the original turns `image` (a PNG) into inputs, `pixels` and `output_of_image`.
    """

    code: str
    stock: bool
    folder: Path
    probe: dict[str, Tensor]
    encoder: str
    original: Mapping[str, Any]
    image: bytes = b""

    def failed(self, reason: str) -> OutputError:
        """Return the error to raise if the code failed, with its own message as the reason."""
        return OutputError(f"{self.folder}: written, but does not load back as the same model ({reason}).")


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
        save_file(check.probe, Path(scratch) / "probe.safetensors")
        (Path(scratch) / "original.json").write_text(json.dumps(dict(check.original)), encoding="utf-8")
        (Path(scratch) / "image.png").write_bytes(check.image)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        environment["HF_MODULES_CACHE"] = scratch  # where transformers copies a modeling file to
        command = [sys.executable, "-c", code, str(check.folder), scratch, check.encoder]
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


def verify(folder: Path, student: nn.Module, inputs: Tensor | Inputs, *, origin: Origin, stock: bool) -> float:
    """Load a folder in a fresh process and compare its outputs with the model in memory, and what it says.

    A folder with a modeling file is loaded by transformers, without vitrim.

    Args:
        folder: the folder that `save` wrote.
        student: the whole model in memory; its encoder is run.
        inputs: a few images (or rows of token ids) to compare on.
        origin: the original: its library loads the folder, and its preprocessing, labels, tag and licence are expected.
        stock: load with the stock library while vitrim can't be imported; otherwise with `load`.

    Returns:
        The largest difference relative to the largest output.

    Raises:
        OutputError: the folder does not load, its outputs differ, or it says something else than the original.
        NotFiniteError: the model in memory is not finite.
    """
    reference = copy.deepcopy(student.get_submodule(origin.encoder)).cpu()
    like = next(reference.parameters()).new_empty(0)
    reference = reference.to(like.dtype).float()  # compare bf16 in float32, but with all buffers rounded to bf16
    inputs = inputs.cpu()
    named = inputs.tensors if isinstance(inputs, Inputs) else {}
    probe = {"output": _output(reference, inputs, folder), "like": like}
    probe |= {f"inputs.{name}": tensor for name, tensor in named.items()}
    if not isinstance(inputs, Inputs):
        probe["inputs"] = inputs.contiguous()
    image, pixels = _image_of(origin)
    if pixels is not None:
        probe["pixels"] = pixels
        if not isinstance(inputs, Inputs) and pixels.shape == inputs.shape[1:]:
            probe["output_of_image"] = _output(reference, pixels[None], folder)
    return _run_check.get()(_check(folder, origin, probe, image, stock=stock, load=True))


def verify_config(folder: Path, *, origin: Origin, stock: bool) -> None:
    """Compare what a folder says in a fresh process with the original, without loading weights.

    Args:
        folder: the folder that `write_configs` wrote.
        origin: the original, whose preprocessing, labels, tag and licence are expected.
        stock: read it with the stock library while vitrim can't be imported.

    Raises:
        OutputError: it says something else than the original.
    """
    image, pixels = _image_of(origin)
    probe = {} if pixels is None else {"pixels": pixels}
    _run_check.get()(_check(folder, origin, probe, image, stock=stock, load=False))


def _check(folder: Path, origin: Origin, probe: dict[str, Tensor], image: bytes, *, stock: bool, load: bool) -> Check:
    """Return the check of a folder, by its own library or by vitrim."""
    backend = backend_of(origin.library)
    assert backend is not None
    by_library, code = stock and bool(backend.RELOAD), backend.RELOAD
    if has_remote_code(folder):
        by_library, code = True, RELOAD
    reads = (backend.READS if by_library else OWN_READS) + COMPARE_CONFIG
    loads = (code if by_library else OWN_LOAD) + COMPARE
    return Check(
        code=reads + (loads if load else ""),
        stock=by_library,
        folder=folder,
        probe=probe,
        encoder=origin.encoder,
        original=backend.says(origin),
        image=image,
    )


def _image_of(origin: Origin) -> tuple[bytes, Tensor | None]:
    """Return an image as a PNG, and what the original's own transform makes of it; None if it has none for images."""
    from PIL import Image

    backend, size = backend_of(origin.library), origin.preprocessing.get("input_size", ())
    transform = None if backend is None or len(size) != 3 or size[0] not in (1, 3) else backend.transform(origin)
    if transform is None:
        return b"", None
    generator = torch.Generator().manual_seed(0)  # neither square nor of the input's size: both resize and crop show
    height, width = size[1] * 5 // 4 + 1, size[2] * 3 // 2 + 1
    noise = torch.randint(256, (height, width, size[0]), generator=generator, dtype=torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(noise if size[0] == 3 else noise[..., 0]).save(file, format="PNG")
    try:
        return file.getvalue(), torch.as_tensor(transform(Image.open(file))).float().contiguous()
    except Exception as error:  # the library's own code, and a configuration of anyone's
        reason = reason_of(error)
        log.warning("%s: its own transform takes no image (%s); only tensors are compared.", origin.name, reason)
        return b"", None


def _output(model: nn.Module, inputs: Tensor | Inputs, folder: Path) -> Tensor:
    """Run a model in memory.

    Raises:
        NotFiniteError: its output is not finite.
    """
    with evaluating(model):
        output = run_on(model, inputs)
    output = first_tensor(output)
    if not bool(output.isfinite().all()):
        raise NotFiniteError(f"{folder}: the model is not finite: {_first_not_finite(model, inputs)}.")
    return output.clone().contiguous()


def _first_not_finite(model: nn.Module, inputs: Tensor | Inputs) -> str:
    """Name the first tensor of a model that holds NaN or infinity: a weight, or the first output that it runs into."""
    for name, parameter in model.named_parameters():
        wrong = int((~parameter.isfinite()).sum())
        if wrong:
            return f"{name} holds {wrong:,} NaN or infinite of {parameter.numel():,} values"
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        with evaluating(model):
            run_on(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return f"its weights are, but the output of {found[0] if found else 'the model'} is not"
