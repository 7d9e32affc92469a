"""Recovery block by block: it is the plain thing done slowly, whatever is on disk, killed or spread over processes."""

import copy
import shutil
import signal
import weakref
from collections import namedtuple

import pytest
import torch

import vitrim
from tests.support.blocks import IMAGES, cut, run
from tests.support.processes import run_python
from vitrim.calibrate import activations
from vitrim.config.options import BlockwiseOptions
from vitrim.config.recipe import Recipe
from vitrim.data import open_images
from vitrim.errors import Interrupted, OutputError, RecipeError
from vitrim.metrics.fidelity import fidelity
from vitrim.repair import block_data, blockwise
from vitrim.repair.block_data import disk_bytes, read_ahead

CHAINS = ("timm-vit-scaled", "timm-packed", "timm-post-norm", "timm-parallel", "hf-vit", "llama-order")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def block_errors(case, student, inputs, images):
    """Squared error of a token of each block's output, by full forwards with hooks, in the slow obvious way."""
    blocks = list(dict.fromkeys(site.block for site in case.sites))
    seen = {}

    def note(name, model):
        def hook(module, args, kwargs, output):
            seen.setdefault((model, name), []).append(
                (args, kwargs, output[0] if isinstance(output, tuple) else output)
            )

        return hook

    for label, model in (("teacher", case.model), ("student", student)):
        handles = [
            model.get_submodule(name).register_forward_hook(note(name, label), with_kwargs=True) for name in blocks
        ]
        with torch.no_grad():
            model(images)
        for handle in handles:
            handle.remove()
    errors = {}
    for name in blocks:
        args, kwargs, target = seen["teacher", name][0]
        output = seen["student", name][0][2]
        if inputs == "teacher":
            with torch.no_grad():
                output = student.get_submodule(name)(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
        errors[name] = float((output - target).double().square().sum(-1).mean())
    return errors


@pytest.mark.parametrize("inputs", ["student", "teacher"])
@pytest.mark.parametrize("train", ["mlp", "block"])
@pytest.mark.parametrize("name", [*CHAINS, "timm-swin", "timm-hiera"])
def test_reported_errors_are_those_of_full_forwards_and_never_worse(build, name, train, inputs):
    case = build(name)
    student = cut(case)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    held_out = torch.stack([IMAGES[i][0] for i in order.tolist()[27:]])
    start = block_errors(case, student, inputs, held_out)
    report = run(case, student, train=train, inputs=inputs)
    end = block_errors(case, student, inputs, held_out)
    assert report.errors.keys() == end.keys() and report.notes == ()
    for block, errors in report.errors.items():
        assert errors["after"] <= errors["before"]
        assert errors["after"] == pytest.approx(end[block], rel=1e-3)
        if inputs == "teacher" or block == next(iter(end)):  # else blocks before it have changed by then
            assert errors["before"] == pytest.approx(start[block], rel=1e-3)
    assert sum(e["after"] for e in report.errors.values()) < 0.98 * sum(e["before"] for e in report.errors.values())


@pytest.mark.parametrize("name", ["timm-vit-scaled", "timm-packed", "hf-vit"])
@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_an_mlp_alone_learns_what_it_learns_inside_its_block(build, monkeypatch, name, inputs):
    case, found = build(name), []
    for alone in (True, False):
        monkeypatch.setattr(block_data, "stands_alone", lambda *_, alone=alone: alone)
        student = cut(case)
        run(case, student, inputs=inputs)
        found.append(weights(student))
    for tensor, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(tensor, other, atol=2e-4, rtol=1e-3)


def test_one_step_is_a_share_of_the_norm_along_the_gradient_of_a_batch_through_the_whole_block(build):
    case = build("timm-post-norm")
    student = cut(case)
    expected = copy.deepcopy(student)
    run(case, student, steps=1, train="block", inputs="teacher", lr=1e-3)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    first = int(torch.randperm(9, generator=torch.Generator().manual_seed(0))[0])
    batch = torch.stack([IMAGES[i][0] for i in order[3 * first : 3 * first + 3]])
    calls = []
    handle = case.model.blocks[0].register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        case.model(batch)
    handle.remove()
    (args, kwargs, target), block = calls[0], expected.blocks[0]
    loss = (block(*args, **kwargs) - target).square().sum(-1).mean()
    loss.backward()
    for name in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
        before, after = block.get_submodule(name), student.blocks[0].get_submodule(name)
        move = (after.weight - before.weight).detach()
        assert 0 < float(move.norm() / before.weight.detach().norm()) <= 1.1e-3, name
        assert float((move * before.weight.grad).sum()) < -0.2 * float(move.norm() * before.weight.grad.norm()), name


@pytest.mark.parametrize("name", ["timm-vit-scaled", "timm-swin", "timm-split", "hf-bert"])
@pytest.mark.parametrize("values", [{}, {"train": "block"}, {"inputs": "teacher"}])
def test_a_spilled_run_equals_one_in_memory(build, tmp_path, name, values):
    case, found = build(name), []
    images = IMAGES if name != "hf-bert" else open_images([(row, -1) for row in torch.randint(20, (30, 7))])
    for folder in (None, tmp_path / "work"):
        student = cut(case)
        report = run(case, student, folder=folder, images=images, **values)
        found.append((weights(student), report))
    assert not changed(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["blocks"]  # the activations are gone


def test_attention_and_norms_are_trained_on_request_only(build):
    case = build("timm-vit-scaled")
    student, names = cut(case), {}
    start = weights(student)
    for train in ("mlp", "block"):
        again = copy.deepcopy(student)
        run(case, again, train=train)
        names[train] = changed(start, weights(again))
    assert names["mlp"] == {name for name in start if ".mlp." in name}
    assert names["block"] == {name for name in start if name.startswith("blocks.")}


def test_modes_flags_and_the_teacher_are_left_as_they_were(build):
    case = build("timm-vit-scaled")
    student = cut(case).train()
    student.blocks[0].attn.qkv.weight.requires_grad_(False)
    teacher, flags = weights(case.model), [p.requires_grad for p in student.parameters()]
    for train in ("mlp", "block"):
        run(case, student, train=train)
        assert [p.requires_grad for p in student.parameters()] == flags
        assert all(p.grad is None for p in student.parameters()) and all(m.training for m in student.modules())
    assert not changed(teacher, weights(case.model))


def test_a_block_that_gets_worse_is_left_as_it_was(build):
    case = build("timm-vit")
    student = cut(case)
    start = weights(student)
    report = run(case, student, lr=30.0)
    assert not changed(start, weights(student))
    assert all(errors["before"] == errors["after"] > 0 for errors in report.errors.values())


@pytest.mark.parametrize("sign", [1, -1])
def test_the_whole_is_put_back_where_it_came_out_worse(build, monkeypatch, sign):
    case = build("timm-vit-scaled")
    student, held_out = cut(case), [torch.randn(4, 3, 32, 32)]
    start, real = weights(student), blockwise.relative_error
    monkeypatch.setattr(blockwise, "relative_error", lambda *args: sign * real(*args))  # -1: what is better is worse
    report = run(case, student, held_out=held_out)
    if sign == 1:
        assert report.notes == () and report.relative_error[1] < report.relative_error[0]
        assert report.relative_error[1] == pytest.approx(fidelity(student, case.model, held_out)["relative_error"])
    else:
        assert "came out worse" in report.notes[0] and "inputs: student" in report.notes[0]
        assert report.relative_error[1] == report.relative_error[0] and not changed(start, weights(student))


def test_tensors_that_other_blocks_share_are_left_alone(build):
    case = build("timm-vit")
    student = cut(case)
    student.blocks[1].mlp = student.blocks[0].mlp
    start = weights(student)
    report = run(case, student)
    assert not changed(start, weights(student)) and report.errors == {}
    assert [note.split(":")[0] for note in report.notes] == ["blocks.0", "blocks.1"]


def stop_after(monkeypatch, num_blocks, error):
    """Break a run off in the middle of the block that follows."""
    real, calls = blockwise._train_, []

    def train(*args):
        calls.append(args)
        if len(calls) > num_blocks:
            raise error
        return real(*args)

    monkeypatch.setattr(blockwise, "_train_", train)
    return calls


@pytest.mark.parametrize("values", [{}, {"inputs": "teacher", "train": "block"}])
@pytest.mark.parametrize("name", ["timm-vit-scaled", "timm-swin"])
def test_a_stopped_run_goes_on_from_its_last_finished_block(build, tmp_path, monkeypatch, name, values):
    case = build(name)
    whole, student, again = cut(case), cut(case), cut(case)
    report = run(case, whole, **values)
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        with pytest.raises(Interrupted, match=r"stopped with 1 of \d blocks done; continue with --resume"):
            run(case, student, folder=tmp_path, **values)
    assert len(list((tmp_path / "blocks").iterdir())) == 1
    calls = stop_after(monkeypatch, 99, None)
    assert run(case, again, folder=tmp_path, resume=True, **values) == report
    assert len(calls) == len(report.errors) - 1
    assert not changed(weights(whole), weights(again))
    last = cut(case)
    assert run(case, last, folder=tmp_path, resume=True, **values) == report and len(calls) == len(report.errors) - 1
    assert not changed(weights(whole), weights(last))


def test_ctrl_c_in_the_middle_of_a_block_leaves_the_block_as_it_was(build, tmp_path, monkeypatch):
    case = build("timm-vit")
    student = cut(case)
    start, real, calls = weights(student), block_data.BlockTask._errors, []

    def errors(self, batch):
        calls.append(batch)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(block_data.BlockTask, "_errors", errors)
    with pytest.raises(Interrupted, match="0 of 2 blocks"):
        run(case, student, folder=tmp_path)
    assert not changed(start, weights(student)) and not list(tmp_path.glob("activations*"))


def test_blocks_of_other_options_are_refused_and_a_damaged_one_is_trained_again(build, tmp_path, caplog):
    case = build("timm-vit")
    whole, again = cut(case), cut(case)
    report = run(case, whole, folder=tmp_path)
    with pytest.raises(RecipeError, match="other options"):
        run(case, cut(case), folder=tmp_path, resume=True, steps=13)
    with pytest.raises(RecipeError, match="other options"):
        run(case, cut(case), folder=tmp_path, resume=True, seed=1)
    kept = tmp_path / "blocks" / "0.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x11")
    assert run(case, again, folder=tmp_path, resume=True) == report and not changed(weights(whole), weights(again))
    assert "0.safetensors: can't be used" in caplog.text and "The block is trained again" in caplog.text
    run(case, cut(case), folder=tmp_path)  # without resume it starts anew


def test_bytes_are_those_of_the_files_and_a_disk_without_room_is_refused(build, tmp_path, monkeypatch):
    case, most = build("timm-vit"), 0
    real = block_data.BlockData.enter

    def measure(self, index):
        nonlocal most
        task = real(self, index)
        most = sum(path.stat().st_size for path in self.offload.rglob("*.pt"))
        return task

    monkeypatch.setattr(block_data.BlockData, "enter", measure)
    for values in ({}, {"inputs": "teacher"}, {"train": "block"}):
        options = BlockwiseOptions(**values)
        said = disk_bytes(case.model, case.sites, torch.randn(2, 3, 32, 32), num_images=30, options=options)
        run(case, cut(case), folder=tmp_path, batch_size=15, steps=1, **values)
        assert said <= most <= 1.1 * said  # torch adds a header to each file
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, said - 1))
    student = cut(case)
    with pytest.raises(
        OutputError, match=r"GB of activations there and 0\.00 GB are free; lower blockwise\.num_images"
    ):
        run(case, student, folder=tmp_path, train="block")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, said))
    run(case, student, folder=tmp_path, train="block")


@pytest.mark.parametrize("train", ["mlp", "block"])
def test_memory_holds_three_batches_however_many_there_are(build, tmp_path, monkeypatch, train):
    case, alive, most = build("timm-vit"), weakref.WeakSet(), []
    real = torch.load

    def load(*args, **kwargs):
        tensors = real(*args, **kwargs)
        for tensor in tensors:
            alive.add(tensor)
        most.append(len(alive) / len(tensors))
        return tensors

    monkeypatch.setattr(activations.torch, "load", load)
    run(case, cut(case), folder=tmp_path, train=train, steps=20)
    # Of a whole block a batch is two files: what goes in, and what should come out.
    assert len(most) > 60 and max(most) <= (3 if train == "mlp" else 6)


def test_batches_are_read_one_ahead_in_order():
    asked, given = [], []
    for value in read_ahead(lambda i: asked.append(i) or i, range(5)):
        given.append(value)
        assert len(asked) <= value + 2
    assert given == asked == [0, 1, 2, 3, 4]


DRIVER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.support.blocks import cut, run
from tests.support.models import build_case
from vitrim.repair import blockwise

case, folder, how = build_case("timm-vit-scaled"), Path(sys.argv[1]), sys.argv[2:]
if "kill" in how:
    real, calls = blockwise._train_, []
    def train(*args):
        if calls:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(args)
        return real(*args)
    blockwise._train_ = train
found = {}
for inputs in ("student", "teacher"):
    student = cut(case)
    report = run(
        case, student, folder=folder / inputs, inputs=inputs, resume="resume" in how, batch_size=6
    )
    found[inputs] = (student.state_dict(), report.errors)
torch.save(found, folder / f"result-{os.environ.get('RANK', '0')}.pt")
"""


def drive(folder, *how, processes=None):
    """Run the driver in fresh processes: how it ended, and what each of them ends with."""
    folder.mkdir(exist_ok=True)
    script = folder / "driver.py"
    script.write_text(DRIVER)
    done = run_python(script, folder, *how, processes=processes, timeout=240)
    return done, [torch.load(path, weights_only=True) for path in sorted(folder.glob("result-*.pt"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process ends with that nobody disturbs."""
    done, found = drive(tmp_path_factory.mktemp("alone"))
    assert done.returncode == 0, done.stderr
    return found[0]


def test_two_processes_share_the_blocks_or_the_images(alone, tmp_path):
    done, both = drive(tmp_path, processes=2)
    assert done.returncode == 0 and len(both) == 2, done.stderr
    for inputs, (state, errors) in both[0].items():
        assert both[1][inputs][1] == errors and not changed(both[1][inputs][0], state)
    # Blocks that know nothing of each other come out the same, wherever they are trained.
    assert both[0]["teacher"][1] == alone["teacher"][1]
    assert not changed(both[0]["teacher"][0], alone["teacher"][0])
    # Gradients over shares of a batch are summed in another order.
    state, errors = both[0]["student"]
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, alone["student"][0][name], atol=1e-4, rtol=1e-3)
    for block, values in alone["student"][1].items():
        assert errors[block] == pytest.approx(values, rel=1e-3)


def test_a_run_that_is_killed_between_blocks_ends_with_equal_tensors(alone, tmp_path):
    killed, nothing = drive(tmp_path, "kill")
    assert killed.returncode == -signal.SIGKILL and nothing == []
    assert (tmp_path / "student" / "activations-0").exists()
    resumed, (again,) = drive(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert again["student"][1] == alone["student"][1]
    assert not changed(alone["student"][0], again["student"][0])
    assert not (tmp_path / "student" / "activations-0").exists()


def test_the_main_job_trains_blocks_behind_the_cut(build):
    case = build("timm-vit-scaled")
    recipe = {"method": "magnitude", "keep_ratio": 0.5, "repair": {"refit": False}, "calibrate": {"num_images": 20}}
    blocks = {"num_images": 40, "batch_size": 4, "steps": 20}
    images = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    result = vitrim.compress(
        case.model, data=images, recipe=Recipe.parse({**recipe, "blockwise": blocks}), quiet=True, device="cpu"
    )
    found, metrics = result.metrics.blockwise, result.metrics
    assert list(found["errors"]) == ["blocks.0", "blocks.1"]
    before, after = (judged.relative_error for judged in (metrics.after_cut, metrics.after_recovery))
    assert found["relative_error"] == pytest.approx((before, after), rel=1e-4) and after < before
    assert metrics.recovery is None
    with pytest.raises(RecipeError, match="needs images"):
        vitrim.compress(case.model, recipe=Recipe.parse({"blockwise": blocks}), quiet=True)
