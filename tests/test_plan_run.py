"""Plans of runs: what a step takes on paper is what it takes, and what is said of memory is what two processes hold."""

import json
import shlex

import pytest
import timm
import torch

from tests.support.distillation import make_student, make_teacher
from tests.support.processes import ROOT, run_python
from vitrim.cli import app, run
from vitrim.compression import plan_run as module
from vitrim.compression.plan_run import Pair, plan_run
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs
from vitrim.cost.gpus import GPUS
from vitrim.cost.rehearsal import rehearse
from vitrim.cost.training import Setup, Sizes, sent_bytes
from vitrim.errors import BudgetError, RecipeError
from vitrim.models.features import features
from vitrim.recover.losses import feature_loss

IMAGE = torch.zeros(3, 16, 16)
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
GIVEN = ["--images", "1000", "--gpus", "2", "--gpu", "l40s"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    model = timm.create_model("vit_tiny_patch16_224", **SIZE)
    timm.models.save_for_hf(model, folder, model_args=SIZE, safe_serialization=True)
    return str(folder)


def pair_of(teacher):
    return Pair(teacher=teacher, student=make_student(teacher), image_CHW=IMAGE, sites=[], widths={})


def test_a_step_on_paper_holds_and_multiplies_what_a_real_one_does():
    pair, setup = pair_of(make_teacher()), Setup(processes=1, batch=8, bf16=False, on_gpu=False)
    paper = pair.rehearsed(setup, RecoverOptions(steps=1))
    images = torch.randn(8, 3, 16, 16)

    def step():
        with torch.no_grad():
            target = features(pair.teacher, images)
        return feature_loss(features(pair.student, images), target)

    real = rehearse(step, pair.teacher, pair.student)
    assert paper.peak == real.peak > 8 * 17 * 32 * 4 * 20  # of two blocks at least ten activations each
    assert sum(each.flops for each in paper.operators) == sum(each.flops for each in real.operators)
    macs = count_macs(pair.teacher, images) + 3 * count_macs(pair.student, images)
    assert sum(each.flops for each in paper.operators) == pytest.approx(2 * 8 * macs, rel=0.1)


def test_half_the_bits_and_blocks_that_run_again_take_less():
    pair, options = pair_of(make_teacher()), RecoverOptions(steps=1)
    peaks = [
        pair.rehearsed(Setup(processes=1, batch=64, bf16=bf16, checkpointed=again), options).peak
        for bf16, again in ((False, False), (True, False), (True, True))
    ]
    assert peaks[0] > 1.3 * peaks[1] and peaks[1] > 1.3 * peaks[2]


def test_what_is_held_and_sent_follows_from_counts():
    sizes = Sizes(teacher=1000, student=100, teacher_block=10, student_block=5, largest=2)
    whole = Setup(processes=4, batch=8)
    held = whole.device_bytes(sizes, activations=5000)
    assert list(held.values()) == [1600, 4000, 400, 5000]  # weights, two moments, best state; teacher; buckets
    assert whole.device_bytes(sizes, 10)["a step: activations, gradients"] == 800  # gradients, and AdamW's roots
    assert whole.main_bytes(sizes) == 400 and sent_bytes(whole, sizes) == 600
    spread = Setup(processes=4, batch=8, fsdp=True, parts=2)
    held = spread.device_bytes(sizes, activations=5000)
    assert list(held.values()) == [400, 500, 0, 5000 + 2 * (8 * 5 + 2 * 10) + 100]
    assert spread.micro == 1 and spread.main_bytes(sizes) == 400 + 4400
    assert sent_bytes(spread, sizes) == 2 * 0.75 * (1200 + 2000)


def test_the_fastest_way_that_fits_is_chosen(source, monkeypatch):
    """Less and less memory: first blocks run again, then shards, then parts, then more devices are asked for."""

    def planned(memory, gpus=2):
        monkeypatch.setitem(GPUS, "l40s", GPUS["l40s"].__class__(**{**GPUS["l40s"].__dict__, "memory": memory}))
        monkeypatch.setattr(module, "RUNTIME_BYTES", 0)
        monkeypatch.setattr(module._Planner, "cut", lambda planner, processes: 0.0)
        recipe = Recipe.parse({"mlp_ratio": 1, "recover": {"epochs": 2, "batch_size": 256, "lr": 1e-4}})
        return plan_run(source, recipe, images=1000, gpus=gpus, gpu="l40s")

    most = planned(10**9)
    assert most.options == {"batch_size": 256, "epochs": 2} and most.least == 1 and most.num_steps == 6
    size = most.peak
    assert planned(0.9 * size).options["checkpoint_activations"]
    again = planned(0.9 * size).peak
    found = planned(0.97 * again)
    assert found.options["fsdp"] and found.peak < again
    parts = planned(0.8 * found.peak).options
    assert parts["gradient_accumulation_steps"] * parts["batch_size"] == 256
    with pytest.raises(BudgetError, match=r"gpus: the run does not fit into .* on each of 1 l40s; give "):
        planned(0.1 * found.peak, gpus=1)


def test_the_command_says_what_was_planned_and_parses(source, capsys):
    given = ["--mlp-ratio", "1", "--recover-epochs", "2", "--lr", "2e-5", "--batch-size", "64"]
    assert run(["plan-run", source, *GIVEN, *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    words = shlex.split(found["command"])
    assert words[:6] == ["torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", "vitrim"]
    assert words[7:] == [source, "--data", "photos/", "--out", "small", *given[:4], "--lr", "2e-05", *given[6:]]
    app.parse_args(words[6:], exit_on_error=False, print_error=False)
    assert found["num_steps"] == 30 and 0 < found["peak"] < 10**9 and found["step"]["products"] >= 0
    assert run(["plan-run", source, *GIVEN[:-3], "16", *GIVEN[-2:], *given]) == 0
    said = capsys.readouterr().out
    assert "fewest that it fits on: 1" in said and "--nnodes 2" in said and "--nproc_per_node 8" in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--images", "0"], "images: 0 is not allowed; give 1 or more"),
        (["--gpus", "12"], "gpus: 12 don't fill machines of 8; give 8"),
        (["--gpu", "v100"], "v100"),
        (["--adapter", "lora", "--recover-steps", "2"], "recover.adapter: what this takes is not planned for"),
        (["--recover-steps", "0"], "recover.steps"),
    ],
)
def test_bad_input_gets_one_line(source, capsys, given, words):
    named = dict(zip(GIVEN[::2], GIVEN[1::2], strict=True)) | dict(zip(given[::2], given[1::2], strict=True))
    assert run(["plan-run", source, *[word for pair in named.items() for word in pair]]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_kind_that_is_not_known_is_refused(source):
    with pytest.raises(RecipeError, match="gpu: 'tpu' is not known; use h100, a100, l40s"):
        plan_run(source, Recipe(), images=1, gpus=1, gpu="tpu")


def test_what_is_said_of_memory_is_what_two_processes_hold(tmp_path):
    done = run_python(ROOT / "benchmarks" / "plan_run.py", "--quick", "--out", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["whole", "shards"]
    for row in rows:
        assert row["ratio"] == pytest.approx(1, abs=0.15), row
