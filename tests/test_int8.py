"""Int8 layers: what they compute, what stands in a file, and that recovery can run behind them."""

from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file

import vitrim
from vitrim.compression.cut import cut_
from vitrim.config.options import RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.cost.count import count_macs
from vitrim.data import open_images
from vitrim.layers.int8 import Int8Linear, rounded
from vitrim.recover.distill import recover_
from vitrim.surgery import reshape_


def layer(activations=False):
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40)
    values, scale = rounded(linear.weight)
    made = Int8Linear(24, 40, activations=activations)
    made.load_state_dict({"weight": values, "scale": scale, "bias": linear.bias.detach()})
    return linear, made


def cut(build, **options):
    case = build("timm-vit")
    student = case.copy()
    recipe = Recipe.parse(options.pop("recipe", {"method": "int8", "options": options}))
    return case, student, cut_(student, case.model, case.sites, recipe, case.batches, quiet=True)


def test_each_row_is_rounded_to_the_nearest_of_its_255_steps():
    linear, made = layer()
    step_M = linear.weight.detach().abs().amax(1, keepdim=True) / 127.5  # torchao's scale: the range over 255
    torch.testing.assert_close(made.scale.detach(), step_M, rtol=1e-3, atol=0)
    nearest = (linear.weight.detach() / made.scale).round().clamp(-128, 127)
    assert (made.weight - nearest).abs().max() <= 1 and (made.weight == nearest).float().mean() > 0.99


@pytest.mark.parametrize("activations", [False, True])
def test_the_product_is_that_of_the_rounded_weight_and_its_gradient_too(activations):
    _, made = layer(activations)
    inputs = torch.randn(2, 5, 24, requires_grad=True)
    weight = made.weight.float() * made.scale
    slow_inputs = inputs.detach().clone().requires_grad_()
    slow = torch.nn.functional.linear(slow_inputs, weight, made.bias)
    found = made(inputs)
    torch.testing.assert_close(found, slow, atol=0.05 if activations else 1e-5, rtol=1e-5)
    assert not (activations and torch.allclose(found, slow, atol=1e-5))
    with torch.no_grad():  # the same with and without a graph
        torch.testing.assert_close(made(inputs), found.detach(), atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (slow * direction).sum().backward()
    torch.testing.assert_close(inputs.grad, slow_inputs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activations", [False, True])
def test_a_whole_model_stays_close_and_costs_as_many_products(build, run, activations):
    case, student, report = cut(build, activations=activations)
    assert {edit.layer.path.rpartition(".")[2] for edit in report.plan.edits} == {"qkv", "proj", "fc1", "fc2"}
    assert isinstance(student.head, torch.nn.Linear) and any("2 layers stay" in note for note in report.notes)
    expected = run(case.model, case.batches[0])
    error = (run(student, case.batches[0]) - expected).norm() / expected.norm()
    assert 0 < error < (0.05 if activations else 0.02)
    assert count_macs(student, case.batches[0]) == count_macs(case.model, case.batches[0])


def test_behind_low_rank_both_factors_are_rounded_but_not_those_of_what_is_skipped(build, run):
    low_rank = {"method": "low-rank", "options": {"rank": 2}, "repair": False}
    case, student, report = cut(build, recipe={"steps": [low_rank, {"method": "int8", "options": {"skip": ["proj"]}}]})
    _, alone, _ = cut(build, recipe=low_rank)
    paths = {edit.layer.path for edit in report.plan.edits if edit.KIND == "int8"}
    assert "blocks.0.mlp.fc1.down" in paths and "blocks.0.mlp.fc1.up" in paths and "head" in paths
    assert not any("attn.proj" in path for path in paths)
    again = case.copy()
    reshape_(again, report.plan.edits)
    again.load_state_dict(student.state_dict())
    expected = run(alone, case.batches[0])
    assert 0 < (run(again, case.batches[0]) - expected).norm() / expected.norm() < 0.02


def test_recovery_behind_it_leaves_the_integers_and_trains_the_rest(build):
    stacked = {"steps": [{"method": "magnitude", "keep_ratio": 0.25, "repair": False}, {"method": "int8"}]}
    case, student, report = cut(build, recipe=stacked)
    assert [edit.KIND for edit in report.plan.edits] == ["keep_units"] * 2 + ["int8"] * 8
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    images = open_images([(image, 0) for batch in case.batches for image in batch])
    options = RecoverOptions(steps=12, batch_size=12, lr=3e-4, num_validations=12)
    found = recover_(
        student, case.model, images, held_out=case.batches[:1], options=options, context=RunContext(quiet=True)
    )
    assert found.best_step > 0
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "blocks.0.mlp.fc1.bias" in changed
    assert not any(before[name].dtype == torch.int8 for name in changed)


def test_behind_a_cut_the_file_is_a_quarter_and_loads_again(tmp_path):
    asset = str(files("vitrim") / "assets" / "digits-vit")
    first = vitrim.compress(asset, method="magnitude", mlp_ratio=1, out=tmp_path / "small", quiet=True)
    second = vitrim.compress(str(tmp_path / "small"), method="int8", data="digits", out=tmp_path / "int8", quiet=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "int8")]
    assert sizes[1] < 0.35 * sizes[0]
    kept = load_file(tmp_path / "int8" / "model.safetensors")
    assert kept["blocks.0.mlp.fc1.weight"].dtype == torch.int8
    assert second.metrics.after_cut.fidelity["relative_error"] < 1e-2
    assert [len(first.plan.edits), len(second.plan.edits)] == [6, 24]
