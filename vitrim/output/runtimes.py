"""The runtimes that a model is exported to: what each needs, how its own exporter writes a file, how that runs here.

All start from one graph of `torch.export`, but LiteRT, whose converter traces by itself. Each is a row of RUNTIMES.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.models.origin import require
from vitrim.types import Form, Precision

Run = Callable[[Tensor], tuple[Tensor, ...]]
INPUT = "images"
ANY_BATCH, PLANNED_BATCH = 4096, 8


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A model to be written: it takes images and returns a tuple of tensors; `names` are what these are called."""

    model: nn.Module
    example: Tensor
    names: tuple[str, ...]
    largest: int
    opset: int | None = None
    input_name: str = INPUT

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The graph, for batches of 1 to the largest."""
        return self.traced(self.model)

    def traced(self, model: nn.Module) -> torch.export.ExportedProgram:
        """The graph of another form of the model."""
        shapes = ({0: torch.export.Dim("batch", min=1, max=self.largest)},)
        return torch.export.export(model, (self.example,), dynamic_shapes=shapes)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a model is written for a runtime, and run.

    Args:
        suffix: of the file, or of the folder that takes its place.
        needs: packages, and the extra of vitrim that installs them.
        write: writes a traced model in a precision.
        load: returns what runs a file on this machine's CPU; None where it can't run here, and `check` reads the file.
        precisions: of the weights, and of the arithmetic where the runtime's own way has it so.
        largest: images in a batch, at most.
        check: raises ValueError if a file is not what was asked for.
        stands_in: what runs the file here in the runtime's place; its time says nothing of the runtime's.
        other: what to do for a precision that can't be had.
    """

    suffix: str
    write: Callable[[Traced, Path, Precision], None]
    load: Callable[[Path], Run] | None
    needs: Mapping[str, str] = field(default_factory=dict)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    largest: int = ANY_BATCH
    check: Callable[[Traced, Path], None] | None = None
    stands_in: str | None = None
    other: str = ""


def _write_onnx(traced: Traced, path: Path, precision: Precision) -> None:
    program = torch.onnx.export(
        traced.program,
        (traced.example,),
        dynamo=True,
        opset_version=traced.opset,
        input_names=[traced.input_name],
        output_names=list(traced.names),
        verbose=False,
    )
    assert program is not None
    if precision == "fp32":
        return program.save(path)
    whole = path.with_name("whole.onnx")
    program.save(whole)
    if precision == "fp16":
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(whole), keep_io_types=True), path)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # Convolutions in integers are slow in ONNX Runtime, and there is but one, of the patches.
        kinds = ["MatMul", "Gemm"]
        with _silent():
            quantize_dynamic(whole, path, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=kinds)
    for file in path.parent.glob("whole.onnx*"):
        file.unlink()


def opset_of(path: Path) -> int:
    """The opset of an ONNX file."""
    import onnx

    return next(found.version for found in onnx.load(path, load_external_data=False).opset_import if not found.domain)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: tuple(torch.from_numpy(found) for found in session.run(None, {name: inputs.numpy()}))


def _write_openvino(traced: Traced, path: Path, precision: Precision) -> None:
    import openvino

    file = path.with_suffix(".onnx")
    _write_onnx(traced, file, "fp32")
    model = openvino.convert_model(file)
    if precision == "int8":
        with _silent():
            model = require("nncf", "export").compress_weights(model)
    openvino.save_model(model, path, compress_to_fp16=precision == "fp16")
    file.unlink()


def _load_openvino(path: Path) -> Run:
    import openvino

    # By default it runs in bf16 on CPUs that support it.
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(path, "CPU", settings)
    return lambda inputs: tuple(torch.from_numpy(found) for found in compiled(inputs.numpy()).values())


def _write_torch(traced: Traced, path: Path, precision: Precision) -> None:
    archive = io.BytesIO()  # given a path, torch aborts the process when the disk is full
    torch.export.save(traced.program, archive)
    path.write_bytes(archive.getbuffer())


def _load_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: tuple(module(inputs))


class _Half(nn.Module):
    """A model in float16 between inputs and outputs in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(found.float() for found in self.model(images.half()))


def _write_executorch(traced: Traced, path: Path, precision: Precision) -> None:
    xnnpack, program = "executorch.backends.xnnpack", traced.program
    partition = require(f"{xnnpack}.partition.xnnpack_partitioner", "executorch")
    if precision == "fp16":
        program = traced.traced(_Half(program.module()))
    elif precision == "int8":
        quantizer = require(f"{xnnpack}.quantizer.xnnpack_quantizer", "executorch")
        pt2e = require("torchao.quantization.pt2e.quantize_pt2e", "executorch")
        config = quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
        prepared = pt2e.prepare_pt2e(program.module(), quantizer.XNNPACKQuantizer().set_global(config))
        prepared(traced.example)
        program = traced.traced(pt2e.convert_pt2e(prepared))
    with _silent():
        lower = require("executorch.exir", "executorch").to_edge_transform_and_lower
        lowered = lower(program, partitioner=[partition.XnnpackPartitioner()]).to_executorch()
    path.write_bytes(lowered.buffer)


class _ExecuTorch:
    """A program with the bytes that it was read from: its method points into both, and keeps neither."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.program = require("executorch.runtime", "executorch").Runtime.get().load_program(self.data)
        self.method = self.program.load_method("forward")

    def __call__(self, inputs: Tensor) -> tuple[Tensor, ...]:
        # What comes back are views of memory that the next pass writes over.
        return tuple(found.clone() for found in self.method.execute([inputs.contiguous()]))


def _write_coreml(traced: Traced, path: Path, precision: Precision) -> None:
    with _silent():
        ct = require("coremltools", "coreml")
        numbers = ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32
        model = ct.convert(
            traced.program.run_decompositions({}),
            convert_to="mlprogram",
            outputs=[ct.TensorType(name=name) for name in traced.names],
            compute_precision=numbers,
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
        if precision == "int8":
            optimize = require("coremltools.optimize.coreml", "coreml")
            config = optimize.OpLinearQuantizerConfig(mode="linear_symmetric")
            model = optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=config))
        model.save(str(path))


def _check_coreml(traced: Traced, path: Path) -> None:
    """Read the specification back, which is all of it that another system than Apple's can do."""
    with _silent():
        said = require("coremltools", "coreml").models.MLModel(str(path), skip_model_load=True).get_spec().description
    taken, names = said.input[0], tuple(found.name for found in said.output)
    ranges = [(found.lowerBound, found.upperBound) for found in taken.type.multiArrayType.shapeRange.sizeRanges]
    wanted = [(1, traced.largest), *((size, size) for size in traced.example.shape[1:])]
    if ranges != wanted or names != traced.names or taken.name != INPUT:
        raise ValueError(f"its specification says {taken.name} {ranges} and {names}, not {wanted} and {traced.names}")


def _write_litert(traced: Traced, path: Path, precision: Precision) -> None:
    with _silent():
        example = {INPUT: traced.example[:1]}
        require("litert_torch", "litert").convert(traced.model, sample_kwargs=example).export(str(path))
        if precision == "fp32":
            return
        made = require("ai_edge_quantizer.quantizer", "litert").Quantizer(str(path))
        made.load_quantization_recipe(require("ai_edge_quantizer.recipe", "litert").dynamic_wi8_afp32())
        made.quantize().export_model(str(path), overwrite=True)


def _load_litert(path: Path) -> Run:
    interpreter = require("ai_edge_litert.interpreter", "litert").Interpreter
    run = interpreter(str(path), num_threads=torch.get_num_threads()).get_signature_runner()

    def one(inputs: Tensor) -> tuple[Tensor, ...]:
        found = run(**{INPUT: inputs.numpy()})
        return tuple(torch.from_numpy(found[name]) for name in sorted(found, key=lambda n: int(n.rpartition("_")[2])))

    return one


def trtexec(path: Path, example: Tensor, precision: Precision) -> str:
    """The command with which TensorRT builds its engine of an ONNX file."""
    sizes = "x".join(str(size) for size in example.shape[1:])
    shapes = " ".join(
        f"--{which}Shapes={INPUT}:{count}x{sizes}" for which, count in (("min", 1), ("opt", 8), ("max", 64))
    )
    half = " --fp16" if precision == "fp16" else ""
    return f"trtexec --onnx={path} --saveEngine={path.with_suffix('.engine')} {shapes}{half}"


def _write_tensorrt(traced: Traced, path: Path, precision: Precision) -> None:
    _write_onnx(traced, path, "fp32")  # trtexec chooses the numbers


ONNX = {"onnxscript": "export", "onnxruntime": "export"}
RUNTIMES: Mapping[Form, Runtime] = {
    "onnx": Runtime(suffix=".onnx", needs=ONNX, write=_write_onnx, load=_load_onnx),
    "openvino": Runtime(
        suffix=".xml",
        needs={"onnxscript": "export", "openvino": "export"},
        write=_write_openvino,
        load=_load_openvino,
    ),
    "torch": Runtime(
        suffix=".pt2",
        write=_write_torch,
        load=_load_torch,
        precisions=("fp32",),
        other="load it and call .half(), or use compress with --method int8",
    ),
    "executorch": Runtime(
        suffix=".pte",
        needs={"executorch": "executorch"},
        write=_write_executorch,
        load=_ExecuTorch,
        largest=PLANNED_BATCH,  # its memory is planned for the largest batch
    ),
    "coreml": Runtime(
        suffix=".mlpackage",
        needs={"coremltools": "coreml"},
        write=_write_coreml,
        load=None,
        check=_check_coreml,
        largest=PLANNED_BATCH,
    ),
    "litert": Runtime(
        suffix=".tflite",
        needs={"litert_torch": "litert"},
        write=_write_litert,
        load=_load_litert,
        precisions=("fp32", "int8"),
        largest=1,
        other="LiteRT's GPU delegate takes a float32 file and runs it in fp16",
    ),
    "tensorrt": Runtime(
        suffix=".onnx",
        needs=ONNX,
        write=_write_tensorrt,
        load=_load_onnx,
        stands_in="ONNX Runtime",
        precisions=("fp32", "fp16"),
        other="int8 needs a calibration by TensorRT's own tools",
    ),
}


@contextmanager
def _silent() -> Iterator[None]:
    """Hold back what converters log, warn of and draw, which is about their own parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def installed(to: Form) -> None:
    """Import what a runtime needs.

    Raises:
        MissingExtraError: a package is not installed.
    """
    with _silent():
        for package, extra in RUNTIMES[to].needs.items():
            require(package, extra)


def write(traced: Traced, path: Path, to: Form, precision: Precision) -> None:
    """Write a traced model for a runtime; tracing warns about libraries' own code, which is not the user's."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        RUNTIMES[to].write(traced, path, precision)


def load(path: Path, to: Form) -> Any:
    """Return what runs a file here, or None."""
    found = RUNTIMES[to].load
    with _silent():
        return None if found is None else found(path)
