"""The shape of the package: imports run downward, packages export what they say, and importing does no work."""

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import vitrim
from tests.support import layers
from tests.support.layers import LAYERS

ROOT = Path(vitrim.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
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


def test_the_page_shows_the_layers():
    """Written by `python -m tests.support.layers --write`."""
    assert f"{layers.BEGIN}\n{layers.table()}\n{layers.END}" in layers.PAGE.read_text(encoding="utf-8")


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_written_and_read_as_utf_8_whatever_the_locale(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    texts = [call for call in calls if getattr(call.func, "attr", "") in ("read_text", "write_text")]
    assert [ast.unparse(call) for call in texts if "encoding" not in {word.arg for word in call.keywords}] == []


INITS = [path for path in FILES if path.name == "__init__.py" and path.parent != ROOT]


@pytest.mark.parametrize("path", INITS, ids=part_of)
def test_packages_hold_sorted_names_and_no_definitions(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    imported, exported = [], []
    for node in tree.body[1:]:
        if isinstance(node, ast.ImportFrom):
            imported += [alias.asname or alias.name for alias in node.names]
        else:
            exported = exported_by(node)
    assert exported == in_order(imported)


def exported_by(node: ast.stmt) -> list[str]:
    """What a statement puts into `__all__`, which is all that it may do."""
    assert isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    return ast.literal_eval(node.value)


def in_order(names: list[str]) -> list[str]:
    """Each name once, as ruff sorts them: constants, then classes, then the rest."""
    return sorted(set(names), key=lambda name: (not name.isupper(), not name[:1].isupper(), name))


def test_the_package_itself_holds_a_table_of_names_that_are_imported_when_they_are_used():
    """What type checkers see (imports that don't run), what is exported, and what the table finds are one list."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen, allowed = [], {"__getattr__", "__dir__"}
    for node in tree.body[1:]:
        if isinstance(node, ast.FunctionDef):
            allowed.remove(node.name)
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING"
            for line in node.body:
                if isinstance(line, ast.ImportFrom):
                    seen += [alias.asname or alias.name for alias in line.names]
                else:
                    assert ast.unparse(line) == "__version__: str"
        elif isinstance(node, ast.ImportFrom | ast.Import):
            assert not any(name.startswith("vitrim") for name in imports_of(ast.unparse(node)))
    assert not allowed
    assert vitrim.__all__ == in_order([*seen, "__version__"])
    assert [*vitrim._HOMES] == in_order(seen)


def test_the_public_names_are_these():
    """A name added or taken away here is a promise to users, so it is written down twice."""
    assert " ".join(vitrim.__all__).split() == PUBLIC.split()
    assert {name for name in vitrim.__all__ if not callable(getattr(vitrim, name))} == {
        "NOT_GIVEN",
        "__version__",
        "methods",
    }
    assert vitrim.__version__ == version("vitrim")
    assert set(vitrim.__all__) <= set(dir(vitrim))
    with pytest.raises(AttributeError, match="'vitrim' has no attribute 'compres'"):
        vitrim.compres  # noqa: B018


def test_the_package_tells_type_checkers_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()


PUBLIC = """
NOT_GIVEN
AdapterOptions AllocateOptions AtOnceOptions BlockwiseOptions BudgetError CacheOptions CalibrateOptions
CheckpointError DataError
Evaluation ExitOptions Inputs Inspection Interrupted Metrics MissingExtraError ModelError OutputError Plan Recipe
RecipeError RecoverOptions RepairOptions Result SiteNotFoundError Step VitrimError
__version__ compress doctor evaluate evaluate_together export inspect leaderboard load methods prune_ prune_checkpoint
push retrieval slice tune_text zero_shot
"""


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
for name in vitrim.__all__:  # imports what defines it
    getattr(vitrim, name)
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


# What the tests import


TESTS = Path(__file__).parent
TEST_FILES = sorted(TESTS.rglob("*.py"))
# Also in the strings of tests that are programs for other processes.
FROM_A_TEST = re.compile(r"^\s*(?:from|import)\s+(?:tests\.|tests\s+import\s+)?(?:test_\w+|conftest)\b", re.MULTILINE)


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_from_another_test(path):
    """What several tests use lies in tests/support/, and fixtures of several in conftest.py."""
    assert path == Path(__file__) or FROM_A_TEST.findall(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from test_distill import run", True),
        ("import conftest", True),
        ("from tests.test_distill import run", True),
        ("from tests import conftest", True),
        ('CODE = """\n    from test_distill import *\n"""', True),
        ("from tests.support.distillation import run", False),
        ("import vitrim  # not from test_distill", False),
    ],
)
def test_the_check_of_tests_itself_sees_what_it_should(source, wrong):
    assert bool(FROM_A_TEST.findall(source)) == wrong


# Sizes

LONGEST_FUNCTION, LONGEST_FILE = 40, 400
# Longer on 2026-11-27. Both lists may only shrink: a name that is short enough now has to go from its list.
LONG_FUNCTIONS: set[str] = set()
LONG_FILES = {
    f"tests/test_{name}.py"
    for name in (
        "adapters",
        "blockwise",
        "data_streams",
        "elastic",
        "fips",
        "load",
        "low_rank",
        "teacher_cache",
        "towers",
    )
}


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement behind the docstring to the last."""
    body = node.body[ast.get_docstring(node) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def long_functions(source: str) -> set[str]:
    """Names of the functions and methods of a file that are too long."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name for node in nodes if body_lines(node) > LONGEST_FUNCTION}


def test_functions_have_at_most_forty_lines():
    found = {f"{path.relative_to(ROOT)}:{name}" for path in FILES for name in long_functions(path.read_text())}
    assert found == LONG_FUNCTIONS


def test_files_have_at_most_four_hundred_lines():
    long = [path for path in (*FILES, *TEST_FILES) if len(path.read_text().splitlines()) > LONGEST_FILE]
    assert {path.relative_to(ROOT.parent).as_posix() for path in long} == LONG_FILES


@pytest.mark.parametrize(("lines", "long"), [(40, set()), (41, {"f"})])
def test_the_lines_of_a_function_are_those_behind_its_docstring(lines, long):
    body = "\n".join(["        pass"] * lines)
    assert long_functions(f'class A:\n    def f(self):\n        """Two\n\n        lines."""\n{body}\n') == long


# What takes seconds

NO_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "numpy"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
"""


def run_without_torch(script: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", NO_TORCH + script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", ["catalog", "cli", "errors", "progress", "types"])
def test_what_help_needs_does_not_import_torch(name):
    run_without_torch(f"import vitrim.{name}")


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["methods"], ["--version"]], ids=" ".join)
def test_help_and_the_list_of_methods_do_not_import_torch(arguments):
    done = run_without_torch(f"from vitrim.cli import run; sys.exit(run({arguments}))")
    assert done.stdout and not done.stderr


def test_the_import_hook_of_these_tests_refuses_torch():
    done = subprocess.run([sys.executable, "-c", NO_TORCH + "import vitrim; vitrim.compress"], capture_output=True)
    assert done.returncode == 1 and b"torch was imported" in done.stderr


def test_files_import_each_other_in_no_circle():
    """Also inside a part: what a file takes from others, those take nothing of it, in types neither."""
    names = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in FILES}
    arrows = {}
    for name, path in names.items():
        found = imports_of(path.read_text())
        arrows[name] = {each for each in names if any(f"{one}.".startswith(f"{each}.") for one in found)} - {name}
    left = {name: goes for name, goes in arrows.items() if not name.endswith("__init__")}
    while ends := {name for name, goes in left.items() if not goes & left.keys()}:
        left = {name: goes for name, goes in left.items() if name not in ends}
    assert left == {}
