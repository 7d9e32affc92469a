"""Writes a model's encoder in a form that runs without its library: ONNX, OpenVINO, or torch's own export.

The file is loaded by its runtime and compared with PyTorch, also on batch sizes that were not traced; a file that
differs is removed. Weights in the file are always float32. Of a pair (CLIP) or a VLM the part that takes the images is
exported. Matrices that share a basis are multiplied out. A JSON file beside it says what the model's own library would
know: preprocessing, labels, tag and licence.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitrim.cost.latency import Latency, measure_latency
from vitrim.data.inputs import open_set, random_inputs
from vitrim.errors import ModelError, OutputError, RecipeError, reason_of
from vitrim.inputs import Inputs, run_on
from vitrim.layers.fips import SharedBasisLinear
from vitrim.layers.moefication import ExpertMlp
from vitrim.layers.recursive import RecursiveLinear, Shared
from vitrim.models.features import are_names, evaluating, features, first_tensor, kept_patches
from vitrim.models.live import with_its_classes
from vitrim.models.load import backend_of
from vitrim.models.origin import Origin, require
from vitrim.output.card import licence_of
from vitrim.output.load import Model, open_model
from vitrim.output.stage import refuse_existing
from vitrim.storage.documents import write_json
from vitrim.surgery.edits import replace_
from vitrim.torch_state import own_torch_state

Form = Literal["onnx", "openvino", "torch"]
SUFFIXES: Mapping[Form, str] = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
NEEDS: Mapping[Form, tuple[str, ...]] = {
    "onnx": ("onnxscript", "onnxruntime"),
    "openvino": ("onnxscript", "openvino"),
    "torch": (),
}
# Largest difference from PyTorch, as a share of the largest output, that still counts as equal.
TOLERANCE = 1e-4
# Number of images to trace with, and batch sizes on which the file is compared and timed.
TRACED, COMPARED, TIMED = 2, (1, 3, 8), (1, 8)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export: the file, its outputs, how far they are from PyTorch's, and the latency of both.

    `differences` are the largest ones, relative to the largest output, on noise and, if there was data, on images.
    """

    path: Path
    form: Form
    outputs: tuple[str, ...]
    opset: int | None
    num_bytes: int
    differences: Mapping[str, float]
    latency: Mapping[str, Mapping[int, Latency]]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return {**asdict(self), "path": str(self.path), "tolerance": TOLERANCE}


@own_torch_state()
def export(
    model: Model,
    out: str | Path,
    *,
    to: Form = "onnx",
    data: Any = None,
    tokens: bool = False,
    opset: int | None = None,
    latency: bool = True,
) -> Exported:
    """Write a model in a form that runs without its library.

    Args:
        model: a module, a name, or a folder that vitrim wrote.
        out: the file to write; it must not exist. Beside it stand its description, `.json` added to the name, and
            OpenVINO's weights in a `.bin`.
        to: `onnx`, `openvino` or `torch` (an archive of `torch.export`).
        data: images to compare on, in addition to noise.
        tokens: export the pooled vector and the patch tokens instead of the model's own output.
        opset: ONNX opset; by default the one that torch prefers.
        latency: time the file and PyTorch, by turns.

    Returns:
        The result: the file, and how it compares with PyTorch.

    Raises:
        MissingExtraError: a package that writes or runs the form is not installed.
        ModelError: the model's image size is not known, or a part of the model can't be exported.
        OutputError: `out` exists or can't be written, or the file's outputs differ from the model's.
        RecipeError: the form is unknown.

    Example:
        >>> from importlib.resources import files
        >>> import vitrim
        >>> digits = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> exported = vitrim.export(digits, folder / "digits.pt2", to="torch", latency=False)
        >>> exported.path.name, exported.outputs
        ('digits.pt2', ('output',))
    """
    out = Path(out)
    _check_request(out, to)
    whole, origin = open_model(model)
    encoder, live = whole.get_submodule(origin.encoder), isinstance(model, nn.Module)
    noise = random_inputs(origin, max(COMPARED))
    if noise is None:
        raise ModelError(f"{origin.name}: the size of its inputs is not known, so it can't be traced.")
    if isinstance(noise, Inputs):
        raise ModelError(f"{origin.name}: takes {', '.join(noise.tensors)}; only models of one tensor are exported.")
    inputs = {"noise": noise}
    if data is not None:
        batch = next(iter(open_set(data, origin, limit=max(COMPARED)).loader(batch_size=max(COMPARED))))
        inputs["images"] = batch.images_BCHW
    wrapped = _Tensors(_multiplied_out(copy.deepcopy(encoder).cpu().float().eval()), tokens=tokens)
    with _placed(out) as path, evaluating(wrapped):
        opset = _write(wrapped, noise[:TRACED], path, to, opset)
        session = _Session(_runner(path, to))
        differences = {name: _difference(wrapped, session, batch) for name, batch in inputs.items()}
        if max(differences.values()) > TOLERANCE:
            raise OutputError(f"{out}: puts out something else than PyTorch ({differences}; allowed {TOLERANCE:g}).")
        models = {"pytorch": wrapped, to: session} if latency else {}
        times = measure_latency(list(models.values()), noise[:1], batch_sizes=TIMED)
        num_bytes = sum(file.stat().st_size for file in path.parent.iterdir())
        said = with_its_classes(whole, origin) if live else origin
        _describe(_about(path), said, wrapped.names, kept_patches(encoder))
    return Exported(
        path=out,
        form=to,
        outputs=wrapped.names,
        opset=opset,
        num_bytes=num_bytes,
        differences=differences,
        latency=dict(zip(models, times, strict=True)),
    )


def _check_request(out: Path, to: Form) -> None:
    """Refuse a form that is unknown or can't be written here, and a file that is not named as its form is."""
    if to not in get_args(Form):
        raise RecipeError(f"to: {to!r} is no form to export to; use one of {', '.join(get_args(Form))}.")
    for package in NEEDS[to]:
        require(package, "export")
    if out.suffix != SUFFIXES[to]:
        raise OutputError(f"{out}: a file of {to} ends in {SUFFIXES[to]}; name it {out.with_suffix(SUFFIXES[to])}.")


def _about(out: Path) -> Path:
    """Return the place of the file that describes an exported one; `a.onnx` and `a.xml` have one each."""
    return out.with_name(f"{out.name}.json")


def _describe(path: Path, origin: Origin, outputs: Sequence[str], kept: Sequence[int] | None) -> None:
    """Write what no runtime's file says, in the words of the original's library; what is not known is left out."""
    backend = backend_of(origin.library)
    said = {} if backend is None else backend.says(origin)
    if not are_names((said.get("id2label") or {}).values()):
        said.pop("id2label", None)
    about = {"preprocessing": origin.without_place().preprocessing, "license": licence_of(origin)}
    about |= {key: value for key, value in said.items() if value is not None}
    about["token_positions"] = None if kept is None else list(kept)
    known = {key: value for key, value in about.items() if value is not None}
    write_json(path, {**known, "model": origin.name, "outputs": list(outputs)})


def _multiplied_out(model: nn.Module) -> nn.Module:
    """Replace each layer that shares its matrix by a plain one, since a graph would multiply it out at every run."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Shared):
            replace_(model, path, copy.deepcopy(module.others[0]))
        elif isinstance(module, SharedBasisLinear | RecursiveLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            tensors = {"weight": module.weight.detach(), "bias": module.bias}
            plain.load_state_dict({name: t for name, t in tensors.items() if t is not None}, assign=True)
            replace_(model, path, plain)
    return model


class _Tensors(nn.Module):
    """An encoder that returns plain tensors, whatever its library's own outputs are."""

    def __init__(self, encoder: nn.Module, *, tokens: bool) -> None:
        super().__init__()
        self.encoder, self.tokens = encoder, tokens
        self.names: tuple[str, ...] = ("output",)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        if self.tokens:
            found = features(self.encoder, inputs)
            patches = () if found.patches_BND is None else (found.patches_BND,)
            self.names = ("pooled", "patches")[: 1 + len(patches)]
            return (found.pooled_BD, *patches)
        return (first_tensor(run_on(self.encoder, inputs)),)


class _Session(nn.Module):
    """A runtime with a file loaded, wrapped as a module so that it can be timed like one."""

    def __init__(self, run: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return self.run(inputs)


@contextmanager
def _placed(out: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder beside `out`; at the end all files there are moved into place, or none."""
    for path in (out, _about(out)):
        refuse_existing(path, kind="file")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}.", dir=out.parent) as folder:
            yield Path(folder) / out.name
            made = sorted(Path(folder).iterdir(), key=lambda file: file.name == out.name)  # weights first
            for file in made:
                refuse_existing(out.parent / file.name, kind="file")
            for file in made:
                file.rename(out.parent / file.name)
    except OSError as error:
        raise OutputError(f"{out}: can't be written ({error.strerror or error}); choose another place.") from error


def _write(model: _Tensors, example: Tensor, path: Path, to: Form, opset: int | None) -> int | None:
    """Trace the model and write it; return the ONNX opset, None for other forms."""
    model(example)  # sets the names of the outputs
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing warns about libraries' own code, which is not the user's
            if to == "torch":
                archive = io.BytesIO()  # given a path, torch aborts the process when the disk is full
                torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), archive)
                path.write_bytes(archive.getbuffer())
                return None
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=["images"],
                output_names=list(model.names),
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # torch.export raises errors of many kinds, none of them public
        raise _not_traceable(model, error) from error
    assert program is not None
    file = path.with_suffix(".onnx")
    program.save(file)
    if to == "onnx":
        return program.model.opset_imports[""]
    import openvino

    openvino.save_model(openvino.convert_model(file), path, compress_to_fp16=False)
    file.unlink()
    return None


def _runner(path: Path, to: Form) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return a function that runs a written file on the CPU, with as many threads as torch uses."""
    if to == "torch":
        module = torch.export.load(path).module()
        return lambda inputs: tuple(module(inputs))
    if to == "openvino":
        import openvino

        # By default it runs in bf16 on CPUs that support it.
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.compile_model(path, "CPU", settings)
        return lambda inputs: tuple(torch.from_numpy(found) for found in compiled(inputs.numpy()).values())
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: tuple(torch.from_numpy(found) for found in session.run(None, {"images": inputs.numpy()}))


def _difference(model: nn.Module, session: nn.Module, inputs: Tensor) -> float:
    """Return the largest difference of an output over several batch sizes, relative to the largest value."""
    largest = 0.0
    for size in COMPARED:
        batch = inputs[:size]
        for mine, theirs in zip(model(batch), session(batch), strict=True):
            largest = max(largest, float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1e-30)))
    return largest


def _not_traceable(model: nn.Module, error: Exception) -> ModelError:
    """Return the error that says in one line why a model can't be exported."""
    experts = [name for name, module in model.named_modules() if isinstance(module, ExpertMlp)]
    if experts:
        where = experts[0].removeprefix("encoder.")
        return ModelError(
            f"{where}: which experts a token runs is decided while it runs, which no static graph can say; "
            "export a model that was made by another method."
        )
    reason = reason_of(error.__cause__ or error)
    return ModelError(f"{type(model.get_submodule('encoder')).__name__}: can't be traced by torch.export ({reason}).")
