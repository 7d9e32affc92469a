"""Fixtures of many tests, and what all tests are spared."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.util
import os
import random
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.support.checks import in_this_process
from tests.support.effort import defaults_of_users, quick_by_default
from tests.support.models import (
    CASES,
    KINDS,
    Case,
    build_case,
    changed_cases,
)
from vitrim.cost.latency import measure_latency
from vitrim.output.verify import checking_with, in_fresh_process


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--order 7` for a random order; `tests.support.anywhere` gives it."""
    parser.addoption("--order", type=int, metavar="SEED", help="files, and tests within files, in the order of a seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle files, and tests within files, if asked."""
    if config.option.order is not None:
        rng = random.Random(config.option.order)
        keys = {item: rng.random() for item in items}
        files = {path: rng.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (files[item.path], keys[item]))


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what would be most of the time of all tests: timing, fresh processes that load results, long refits."""
    assert measure_latency.__kwdefaults__ is not None
    measure_latency.__kwdefaults__ |= {"rounds": 1, "min_seconds": 0.0}  # no test is about how long something takes
    config.addinivalue_line("markers", "fresh: results are loaded in a fresh process, as for users; else in this one")
    config.addinivalue_line("markers", "defaults: what users have; else little is done where a test leaves that open")
    quick_by_default()
    if os.name == "posix":  # workers' sockets lie there from now on, as their paths end at 107 bytes
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tempfile, "tempdir", "/tmp")
            multiprocessing.util.get_temp_dir()
    checking = checking_with(in_this_process)  # from here on, for the fixtures that many tests share, too
    checking.__enter__()
    config.add_cleanup(lambda: checking.__exit__(None, None, None))


def pytest_collection_finish() -> None:
    """Spare the garbage collector a million objects of libraries, which it would look at thousands of times."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh processes, and the defaults of users, for the tests that are marked."""
    with contextlib.ExitStack() as stack:
        if request.node.get_closest_marker("fresh") is not None:
            stack.enter_context(checking_with(in_fresh_process))
        if request.node.get_closest_marker("defaults") is not None:
            stack.enter_context(defaults_of_users())
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs a test on every model, `kind` on one of each kind of MLP."""
    for fixture, names in (("case", list(CASES)), ("kind", list(KINDS))):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return build_case(request.param)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Case:
    return build_case(request.param)


@pytest.fixture(scope="module", autouse=True)
def cases_stay_as_they_are() -> Iterator[None]:
    """Fail a file that changes a model which others see, too: what they find would depend on the order of files."""
    yield
    assert not changed_cases(), "change a copy: case.copy()"


@pytest.fixture
def build() -> Callable[[str], Case]:
    """Builds a case by name."""
    return build_case


@pytest.fixture
def run() -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs a model of any library; its output as one tensor."""

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            output = model(batch)
        return output if isinstance(output, Tensor) else output.last_hidden_state

    return run
