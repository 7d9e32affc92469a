"""Trackers get what the log gets, in one run also where that was stopped."""

import copy
import json
from collections import defaultdict
from importlib.metadata import version

import pytest
import timm
import torch
from packaging.version import Version

from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import open_images
from vitrim.errors import MissingExtraError, RecipeError
from vitrim.models.sites import find_mlps
from vitrim.recover.distill import recover_
from vitrim.recover.trackers import check_trackers
from vitrim.surgery import KeepUnits, apply_


def run(folder, *, report_to, steps=6, resume=False, **kwargs):
    """A recovery with its log and trackers in a folder."""
    torch.manual_seed(0)
    teacher = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0
    ).eval()
    student = copy.deepcopy(teacher)
    apply_(student, [KeepUnits(site=site, keep=tuple(range(16))) for site in find_mlps(student)])
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    options = RecoverOptions(steps=steps, batch_size=4, lr=1e-3, num_validations=3, report_to=report_to)
    return recover_(
        student,
        teacher,
        open_images(images[4:]),
        held_out=[images[:4]],
        options=options,
        context=RunContext(work=folder, resume=resume, quiet=True),
        **kwargs,
    )


def in_log(folder):
    """Values by name and step, as the JSONL log has them."""
    found = defaultdict(dict)
    for line in map(json.loads, (folder / "recovery.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "step":
                found[name][line["step"]] = pytest.approx(value, rel=1e-6)
    return dict(found)


def in_tensorboard(folder):
    """The same, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "vitrim"))
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert all(len({event.step for event in found}) == len(found) for found in scalars.values())
    return {name: {event.step: event.value for event in found} for name, found in scalars.items()}


def test_tensorboard_shows_what_the_log_says(tmp_path):
    run(tmp_path, report_to=("tensorboard",))
    logged = in_log(tmp_path)
    assert set(logged) == {"loss", "lr", "images_per_s", "relative_error"} and list(logged["loss"]) == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert in_tensorboard(tmp_path) == logged


def stand_in(monkeypatch, name):
    """A tracker under a name of accelerate's or a new one, and what it was told."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    told = defaultdict(dict)

    class StandIn(tracking.GeneralTracker):
        requires_logging_directory = False

        def __init__(self, project, **kwargs):
            super().__init__()
            told["made"] = {"project": project, **kwargs}

        @property
        def tracker(self):
            return self

        def start(self):
            told["finished"] = False

        def store_init_configuration(self, values):
            told["options"] = values

        def log(self, values, step=None, **_):
            for name, value in values.items():
                told["values"].setdefault(name, {})[step] = value

        def finish(self):
            told["finished"] = True

    StandIn.name = name
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, StandIn)
    monkeypatch.setattr(
        tracking, "get_available_trackers", lambda: [LoggerType(name)] if name in LoggerType.list() else []
    )
    return told


def stop(found):
    if found.step == 4:
        raise KeyboardInterrupt  # step 3 is logged, and the last state is that of step 2


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report_to=("tensorboard",), on_validation=stop)
    assert list(in_tensorboard(tmp_path)["loss"]) == [1, 2, 3]
    run(tmp_path, report_to=("tensorboard",), resume=True)
    assert in_tensorboard(tmp_path) == in_log(tmp_path)


@pytest.mark.parametrize("name", ["mlflow", "notebook"])
def test_other_trackers_are_used_by_name(tmp_path, monkeypatch, name):
    if name == "notebook" and Version(version("accelerate")) < Version("1.15"):
        pytest.skip("accelerate takes trackers that it was told of by name since 1.15")
    told = stand_in(monkeypatch, name)
    run(tmp_path, report_to=(name,))
    assert told["made"] == {"project": "vitrim"} and told["options"]["batch_size"] == 4
    assert told["values"] == in_log(tmp_path)
    assert told["finished"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report_to=(name,), on_validation=stop)
    assert told["finished"]


def test_a_resumed_run_is_the_same_run_of_weights_and_biases(tmp_path, monkeypatch):
    told = stand_in(monkeypatch, "wandb")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, report_to=("wandb",), on_validation=stop)
    first = dict(told["made"])
    assert first["resume"] == "allow" and first["dir"] == str(tmp_path / "logs") and len(first["id"]) == 8
    run(tmp_path, report_to=("wandb",), resume=True)
    assert told["made"] == first
    run(tmp_path, report_to=("wandb",))
    assert told["made"]["id"] != first["id"]


def test_trackers_that_cannot_be_used_are_refused_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(
        RecipeError, match=r"unknown tracker 'tensorbord'; accelerate knows .*mlflow.*tensorboard.*wandb"
    ):
        check_trackers(("tensorbord",), folder=tmp_path)
    with pytest.raises(RecipeError, match="tensorboard writes files and this run writes none; give an output folder"):
        check_trackers(("tensorboard",), folder=None)
    stand_in(monkeypatch, "tensorboard")  # and nothing else is available
    with pytest.raises(MissingExtraError, match="comet_ml is not installed; pip install comet-ml"):
        check_trackers(("tensorboard", "comet_ml"), folder=tmp_path)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(MissingExtraError, match=r"tensorboard is not installed; pip install 'vitrim\[trackers\]'"):
        check_trackers(("tensorboard",), folder=tmp_path)
    with pytest.raises(RecipeError, match="unknown tracker 'all'"):
        run(tmp_path, report_to=("all",))


def test_without_trackers_there_is_the_log_alone(tmp_path):
    run(tmp_path, report_to=())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"recovery.jsonl", "recover.state", "recover.state.before"}
