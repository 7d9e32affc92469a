"""The shape of the package: imports run downward, packages export what they say, and importing does no work."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vitrim

ROOT = Path(vitrim.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Lowest first. A file may import from lower layers, and a file of a package from that package.
LAYERS = (
    ("catalog", "errors", "progress"),
    ("types", "storage"),
    ("ops", "layers"),
    ("surgery",),
    ("models", "methods"),
    ("config",),
    ("calibrate", "data", "metrics", "report"),
    ("cost", "distributed"),
    ("repair", "recover"),
    ("output",),
    ("clip", "evaluation"),
    ("compression",),
    ("inspection", "leaderboard", "doctor"),
    ("demo",),
    ("cli", "__init__"),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
# What takes long to import, or reaches out to the network or a device when it is.
HEAVY = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "onnxruntime",
    "open_clip",
    "openvino",
    "peft",
    "sklearn",
    "tensorboard",
    "timm",
    "torch_pruning",
    "transformers",
    "webdataset",
)


def part_of(path: Path) -> str:
    """The package or module of vitrim that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(source: str) -> list[str]:
    """Full names of what a file imports, inside functions too; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def upward(part: str, source: str) -> list[str]:
    """The imports of a file that do not run strictly downward."""
    wrong = []
    for name in imports_of(source):
        library, _, rest = name.partition(".")
        target = rest.split(".")[0] or "__init__"
        if library == "vitrim" and target != part and HEIGHT.get(target, len(LAYERS)) >= HEIGHT[part]:
            wrong.append(name)
    return wrong


def test_every_module_has_its_layer():
    assert {part_of(path) for path in FILES} <= HEIGHT.keys()
    assert len(HEIGHT) == sum(len(layer) for layer in LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_strictly_downward(path):
    assert upward(part_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("ops", "from vitrim.surgery import apply_", True),
        ("ops", "def f():\n    import vitrim.compression.cut", True),
        ("compression", "from vitrim import inspection", True),
        ("errors", "import vitrim", True),
        ("types", "from vitrim import load", True),
        ("ops", "from vitrim.ops.gram_schmidt import select_units", False),
        ("compression", "from vitrim.repair import refit", False),
        ("errors", "import vitrimmer, torch.nn", False),
    ],
)
def test_the_check_itself_sees_what_it_should(part, source, wrong):
    assert bool(upward(part, source)) == wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_are_imported_inside_functions_only(path):
    """But for the figures, which are matplotlib's throughout; who needs those imports them inside a function."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [name for node in body for name in imports_of(ast.unparse(node))]
    heavy = {name.split(".")[0] for name in names} & set(HEAVY)
    assert heavy == ({"matplotlib"} if path.name == "figures.py" else set())


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=part_of)
def test_packages_hold_sorted_names_and_no_definitions(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    imported, exported = [], []
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom):
            imported += [alias.asname or alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            exported = ast.literal_eval(node.value)
    assert sorted(exported) == sorted(set(imported))  # in the order that ruff wants, which puts constants first


def test_the_public_names_are_these():
    """A name added or taken away here is a promise to users, so it is written down twice."""
    assert vitrim.__all__ == [
        "Inspection",
        "Recipe",
        "Result",
        "VitrimError",
        "compress",
        "evaluate",
        "inspect",
        "load",
        "prune_checkpoint",
    ]
    assert all(callable(getattr(vitrim, name)) for name in vitrim.__all__)


IMPORT = """
import json, sys
import numpy, torch

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        raise SystemExit(f"import did {event} {args}")

def state():
    return [
        str(torch.get_default_dtype()),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.initial_seed(),
        torch.rand(1, generator=torch.Generator().set_state(torch.get_rng_state())).item(),
        hash(numpy.random.get_state()[1].tobytes()),
    ]

before = state()
sys.addaudithook(watch)
import vitrim, vitrim.cli
print(json.dumps({
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "changed": [pair for pair in zip(before, state()) if pair[0] != pair[1]],
    "device": torch.cuda.is_initialized(),
}))
"""


def test_import_touches_no_device_no_network_no_flag_and_no_heavy_library():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["changed"] == [] and not seen["device"]
    assert set(seen["modules"]) & set(HEAVY) == set()
