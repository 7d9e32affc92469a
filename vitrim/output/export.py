"""Writes a model's encoder in a form that runs without its library: for one of the runtimes of `runtimes.py`.

The file is loaded by its runtime and compared with PyTorch, also on batch sizes that were not traced; a file that
differs is removed. Of a pair (CLIP) or a VLM the part that takes the images is exported. Matrices that share a basis
are multiplied out. A JSON file beside it says what the model's own library would know: preprocessing, labels, tag and
licence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

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
from vitrim.models.origin import Origin
from vitrim.output.card import licence_of
from vitrim.output.load import Model, open_model
from vitrim.output.runtimes import INPUT, RUNTIMES, Traced, installed, load, opset_of, trtexec, write
from vitrim.output.stage import beside, move_into, refuse_existing
from vitrim.output.transformers_js import DTYPES, INPUT_NAME, file_in, folder_for_js
from vitrim.storage.documents import write_json
from vitrim.surgery.edits import replace_
from vitrim.torch_state import own_torch_state
from vitrim.types import Form, Layout, Precision

# Largest difference from PyTorch, as a share of the largest output, that still counts as equal.
TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.25}
# Number of images to trace with, and batch sizes on which the file is compared and timed.
TRACED, COMPARED, TIMED = 2, (1, 3, 8), (1, 8)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of an export: the file, its outputs, how far they are from PyTorch's, and the latency of both.

    `differences` are the largest ones, relative to the largest output, on noise and, if there was data, on images.
    There are none, and no latency, where the runtime does not run on this system. `next_step` is the command that comes
    next, where there is one.
    """

    path: Path
    form: Form
    precision: Precision
    outputs: tuple[str, ...]
    opset: int | None
    num_bytes: int
    largest_batch: int
    differences: Mapping[str, float]
    latency: Mapping[str, Mapping[int, Latency]]
    next_step: str | None = None

    @property
    def tolerance(self) -> float:
        """The largest difference that counts as equal."""
        return TOLERANCES[self.precision]

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return {**asdict(self), "path": str(self.path), "tolerance": self.tolerance}


@own_torch_state()
def export(
    model: Model,
    out: str | Path,
    *,
    to: Form = "onnx",
    precision: Precision = "fp32",
    layout: Layout = "file",
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
        to: `onnx`, `openvino`, `torch` (an archive of `torch.export`), `executorch`, `coreml`, `litert`, or `tensorrt`
            (ONNX, and the command that builds an engine of it).
        precision: `fp32`, `fp16` or `int8` (weights), by the runtime's own way.
        layout: `transformers-js` makes `out` a folder that Transformers.js loads, with an ONNX file of this precision
            in `onnx/`; a second export adds another precision.
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
        RecipeError: the form is unknown, or can't be had in this precision.

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
    for_js = layout == "transformers-js"
    _check_request(out, to, precision, opset)
    _check_layout(out, layout, to, tokens=tokens)
    whole, origin = open_model(model)
    encoder, live = whole.get_submodule(origin.encoder), isinstance(model, nn.Module)
    inputs = _compared_on(origin, data)
    wrapped = _Tensors(_multiplied_out(copy.deepcopy(encoder).cpu().float().eval()), tokens=tokens, own_names=for_js)
    said = with_its_classes(whole, origin) if live else origin
    place = folder_for_js(out, precision, whole, said) if for_js else _placed(out)
    with place as path, evaluating(wrapped):
        traced = _write(wrapped, inputs["noise"], path, to, precision, opset, INPUT_NAME if for_js else INPUT)
        run = load(path, to)
        session = None if run is None else _Session(run)
        differences = _differences(wrapped, session, inputs, out, precision, traced.largest)
        sizes = [size for size in TIMED if size <= traced.largest]
        timed = latency and session is not None and RUNTIMES[to].stands_in is None
        models: dict[str, nn.Module] = {"pytorch": wrapped, to: session} if timed else {}  # type: ignore[dict-item]
        times = measure_latency(list(models.values()), inputs["noise"][:1], batch_sizes=sizes) if models else []
        num_bytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        if not for_js:  # its config says it
            _describe(_about(path), said, wrapped.names, kept_patches(wrapped.encoder))
        version = opset_of(path) if path.suffix == ".onnx" else None
    return Exported(
        path=file_in(out, precision) if for_js else out,
        form=to,
        precision=precision,
        outputs=wrapped.names,
        opset=version,
        num_bytes=num_bytes,
        largest_batch=traced.largest,
        differences=differences,
        latency=dict(zip(models, times, strict=True)),
        next_step=_next_step(out, to, precision, traced, for_js=for_js),
    )


def _next_step(out: Path, to: Form, precision: Precision, traced: Traced, *, for_js: bool) -> str | None:
    """Return the command, or the argument, that the file is for."""
    if for_js:
        return f'give Transformers.js this folder, with {{ dtype: "{DTYPES[precision]}" }}'
    return trtexec(out, traced.example, precision) if to == "tensorrt" else None


def _check_request(out: Path, to: Form, precision: Precision, opset: int | None) -> None:
    """Refuse a form that is unknown or can't be written here, and a file that is not named as its form is."""
    if to not in get_args(Form):
        raise RecipeError(f"to: {to!r} is no form to export to; use one of {', '.join(get_args(Form))}.")
    if precision not in get_args(Precision):
        raise RecipeError(f"precision: {precision!r} is not known; use one of {', '.join(get_args(Precision))}.")
    runtime = RUNTIMES[to]
    if precision not in runtime.precisions:
        raise RecipeError(f"precision: {to} files are {' or '.join(runtime.precisions)}; {runtime.other}.")
    if opset is not None and runtime.suffix != ".onnx":
        raise RecipeError(f"opset: is of ONNX, and {to} files have none; leave it out.")
    installed(to)


def _check_layout(out: Path, layout: Layout, to: Form, *, tokens: bool) -> None:
    """Refuse a layout that is unknown or of another form, and a file that is not named as its form is."""
    suffix = RUNTIMES[to].suffix
    if layout not in get_args(Layout):
        raise RecipeError(f"layout: {layout!r} is not known; use one of {', '.join(get_args(Layout))}.")
    if layout == "file":
        if out.suffix != suffix:
            raise OutputError(f"{out}: a file of {to} ends in {suffix}; name it {out.with_suffix(suffix)}.")
    elif to != "onnx":
        raise RecipeError(f"layout: {layout} is of ONNX files, not of {to}; leave to (--to) out.")
    elif tokens:
        raise RecipeError(f"layout: {layout} puts out what transformers does; leave tokens (--tokens) out.")
    elif out.suffix == suffix:
        raise OutputError(f"{out}: {layout} is a folder; name it {out.with_suffix('')}.")


def _compared_on(origin: Origin, data: Any) -> dict[str, Tensor]:
    """Return what a file is compared on: noise, and images if there are any."""
    noise = random_inputs(origin, max(COMPARED))
    if noise is None:
        raise ModelError(f"{origin.name}: the size of its inputs is not known, so it can't be traced.")
    if isinstance(noise, Inputs):
        raise ModelError(f"{origin.name}: takes {', '.join(noise.tensors)}; only models of one tensor are exported.")
    if data is None:
        return {"noise": noise}
    batch = next(iter(open_set(data, origin, limit=max(COMPARED)).loader(batch_size=max(COMPARED))))
    return {"noise": noise, "images": batch.images_BCHW}


def _write(
    model: _Tensors, noise: Tensor, path: Path, to: Form, precision: Precision, opset: int | None, input_name: str
) -> Traced:
    """Trace the model, write it, and check what can be checked without running it."""
    model(noise[:TRACED])  # sets the names of the outputs
    runtime = RUNTIMES[to]
    about = {"names": model.names, "input_name": input_name, "largest": runtime.largest, "opset": opset}
    traced = Traced(model=model, example=noise[:TRACED], **about)
    try:
        write(traced, path, to, precision)
    except OSError:
        raise
    except Exception as error:  # exporters raise errors of many kinds, none of them public
        raise _not_traceable(model, to, error) from error
    if runtime.check is not None:
        try:
            runtime.check(traced, path)
        except ValueError as error:
            raise OutputError(f"{path.name}: is not what was asked for: {error}.") from error
    return traced


def _differences(
    model: nn.Module,
    session: nn.Module | None,
    inputs: Mapping[str, Tensor],
    out: Path,
    precision: Precision,
    largest: int,
) -> dict[str, float]:
    """Return how far a file's outputs are from the model's, and refuse too much."""
    if session is None:
        return {}
    sizes = [size for size in COMPARED if size <= largest]
    found = {name: _difference(model, session, batch, sizes) for name, batch in inputs.items()}
    if not max(found.values()) <= TOLERANCES[precision]:
        allowed = f"{found}; allowed {TOLERANCES[precision]:g} in {precision}"
        raise OutputError(f"{out}: puts out something else than PyTorch ({allowed}).")
    return found


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
    """An encoder that returns plain tensors, whatever its library's own outputs are; `own_names` of transformers."""

    def __init__(self, encoder: nn.Module, *, tokens: bool, own_names: bool = False) -> None:
        super().__init__()
        self.encoder, self.tokens, self.own_names = encoder, tokens, own_names
        self.names: tuple[str, ...] = ("output",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.tokens:
            found = features(self.encoder, images)
            names = ("pooled", "patches", *(f"map{number + 1}" for number in range(len(found.maps))))
            self.names = names[: len(found.tensors)]
            return tuple(found.tensors)
        output = run_on(self.encoder, images)
        if self.own_names:
            known = {name: found for name, found in output.items() if isinstance(found, Tensor)}
            self.names = tuple(known)
            return tuple(known.values())
        return (first_tensor(output),)


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
    with beside(out) as folder:
        yield folder / out.name
        move_into(out.parent, folder, last=out.name)


def _difference(model: nn.Module, session: nn.Module, inputs: Tensor, sizes: Sequence[int]) -> float:
    """Return the largest difference of an output over several batch sizes, relative to the largest value."""
    largest = 0.0
    for size in sizes:
        batch = inputs[:size]
        for mine, theirs in zip(model(batch), session(batch), strict=True):
            found = float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1e-30))
            largest = max(largest, float("inf") if found != found else found)  # nan is no number to be near
    return largest


def _not_traceable(model: nn.Module, to: Form, error: Exception) -> ModelError:
    """Return the error that says in one line why a model can't be exported."""
    experts = [name for name, module in model.named_modules() if isinstance(module, ExpertMlp)]
    if experts:
        where = experts[0].removeprefix("encoder.")
        return ModelError(
            f"{where}: which experts a token runs is decided while it runs, which no static graph can say; "
            "export a model that was made by another method."
        )
    reason, name = reason_of(error.__cause__ or error), type(model.get_submodule("encoder")).__name__
    return ModelError(f"{name}: can't be written for {to} by its exporter ({reason}).")
