"""One student for several widths: each equals a model that was really cut, in training and when it is sliced out."""

import copy
import json
import textwrap
from dataclasses import replace
from importlib.resources import files

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from tests.support.distillation import HELD_OUT, assert_equal, make_images, make_student, make_teacher, weights
from tests.support.elastic import OPTIONS, elastic_run, widths_for
from tests.support.processes import run_python
from vitrim.compression.cut import cut_
from vitrim.compression.slicing import slice_output
from vitrim.config.options import RecoverOptions, RepairOptions
from vitrim.config.recipe import Recipe
from vitrim.config.run_context import RunContext
from vitrim.errors import BudgetError, CheckpointError, OutputError, RecipeError
from vitrim.metrics.judging import features_on_cpu, relative_error
from vitrim.models.load import origin_of
from vitrim.models.sites import find_mlps
from vitrim.output.load import open_model
from vitrim.output.save import save, write_configs
from vitrim.recover.distill import recover_
from vitrim.recover.elastic import Slice, Widths
from vitrim.recover.elastic_files import read_widths, save_widths
from vitrim.recover.elastic_fit import Fitting, fit_widths
from vitrim.recover.range_test import start_
from vitrim.recover.run import Run
from vitrim.surgery import KeepUnits, Plan, TopKActivation, apply_, transform

DIGITS = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"


def widths_of(sites, ratios):
    """Widths by share of the units that the sites have."""
    units = {ratio: {site.path: max(1, int(ratio * site.d_hidden)) for site in sites} for ratio in ratios}
    return Widths(sites=tuple(sites), units=units)


def really_cut(model, widths, ratio):
    student = copy.deepcopy(model)
    apply_(student, widths.edits(ratio))
    return student


def output_of(model, batch):
    output = model(batch)
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def gradients_of(model, batch):
    """Output and gradients of a loss in which no element counts like another."""
    model.zero_grad()
    output = output_of(model, batch)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_held_equals_cut(model, widths, ratio, batch, run=gradients_of):
    expected, wanted = gradients_of(really_cut(model, widths, ratio), batch)
    with widths.held(model, ratio):
        found, gradients = run(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    cut = dict(transform(gradients, widths.edits(ratio)))
    assert cut.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-5 * float(1 + gradient.abs().max()), rtol=1e-4)
        assert gradients[name].count_nonzero() == cut[name].count_nonzero(), f"{name}: units beyond the width"


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_a_held_width_gives_the_outputs_and_gradients_of_a_model_that_was_really_cut(case, ratio):
    model, widths = case.copy(), widths_of(case.sites, (0.3, 1.0))
    assert_held_equals_cut(model, widths, ratio, case.batches[0])


def test_a_block_that_runs_again_in_the_backward_pass_runs_at_the_same_width(build):
    case = build("timm-vit-scaled")
    model, widths = case.copy(), widths_of(case.sites, (0.3, 1.0))

    def checkpointed(model, batch):
        model.set_grad_checkpointing(True)
        return gradients_of(model, batch)

    assert_held_equals_cut(model, widths, 0.3, case.batches[0], run=checkpointed)


def test_a_held_width_costs_what_a_model_cut_to_it_costs(kind):
    model, widths = kind.copy(), widths_of(kind.sites, (0.5, 1.0))

    def flops(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(kind.batches[0])
        return counter.get_total_flops()

    with widths.held(model, 0.5):
        held = flops(model)
    assert held == flops(really_cut(model, widths, 0.5)) < flops(model)


def test_a_model_is_as_it_was_afterwards_also_after_an_error(kind):
    model, widths = kind.copy(), widths_of(kind.sites, (0.5, 1.0))
    parameters = dict(model.named_parameters())
    shapes = [str(module) for module in model.modules()]
    with pytest.raises(RuntimeError), widths.held(model, 0.5):
        model(kind.batches[0][:, :1])
    with pytest.raises(RuntimeError), widths.held(model, 0.5):
        handle = model.get_submodule(kind.sites[0].output).register_forward_pre_hook(lambda *_: (torch.ones(2, 2),))
        model(kind.batches[0])
    handle.remove()
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert [str(module) for module in model.modules()] == shapes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(output_of(model, kind.batches[0]), output_of(kind.model, kind.batches[0]))


def test_every_width_gets_its_turn_in_an_order_that_seed_and_step_alone_decide():
    widths = widths_of(find_mlps(make_teacher()), (0.2, 0.5, 1.0))
    turns = [[widths.at(step, 3) for step in range(start, start + 3)] for start in range(0, 90, 3)]
    assert all(sorted(turn) == [0.2, 0.5, 1.0] for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 6
    assert turns == [[widths.at(step, 3) for step in range(start, start + 3)] for start in range(0, 90, 3)]
    assert turns != [[widths.at(step, 4) for step in range(start, start + 3)] for start in range(0, 90, 3)]


def test_a_step_changes_the_units_of_its_width_alone_and_what_all_widths_share():
    teacher = make_teacher()
    student = make_student(teacher, 64)
    options = RecoverOptions(**OPTIONS, warmup_ratio=0.0)
    widths = widths_for(options)
    given = {"images": make_images(), "held_out": HELD_OUT, "options": options, "context": RunContext(quiet=True)}
    run, trained = Run(student, teacher, **given, widths=widths), set()
    with run.trainable():
        start_(run)
        for batches in run.batches(0, 3):
            before, ratio = weights(student), run.ratio
            run.optimizer.state.clear()  # what Adam remembers of wider steps moves their units on
            run.train_step(batches)
            width = widths.units[ratio]["blocks.0.mlp"]
            trained.add(width)
            changed = {name: before[name] != tensor for name, tensor in student.state_dict().items()}
            for name, dim in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
                per_unit = changed[f"blocks.0.mlp.{name}"].movedim(dim, 0).flatten(1 if "weight" in name else 0)
                per_unit = per_unit.any(1) if "weight" in name else per_unit
                assert per_unit[:width].all() and not per_unit[width:].any()
            assert changed["blocks.0.attn.qkv.weight"].any() and changed["blocks.0.mlp.fc2.bias"].any()
    assert trained == {16, 32, 64}


def test_the_curve_has_the_error_of_each_width_and_a_state_is_kept_that_makes_none_worse():
    teacher = make_teacher()
    student = make_student(teacher, 64)
    result, widths, slices = elastic_run(student, teacher, options={"steps": 24, "num_validations": 8, "lr": 1e-4})
    names = [f"mlp_ratio={ratio:g}" for ratio in widths.units]
    first, scores = result.curve[0], []
    for point in result.curve:
        assert point["relative_error"] == pytest.approx(sum(point[name] for name in names) / 3)
        scores.append(max(point[name] / first[name] for name in names))
    best = result.curve[scores.index(min(scores))]
    assert result.best_step == best["step"] > 0 and result.best_error == best["relative_error"]
    judged = [(batch, features_on_cpu(teacher, batch, "final")) for batch in HELD_OUT]
    for (ratio, each), name in zip(slices.items(), names, strict=True):
        plain = really_cut(student, widths, ratio)
        assert each.errors["sliced"] == pytest.approx(relative_error(plain, judged, "final"), rel=1e-5)
        assert each.errors.get("trained", each.errors["sliced"]) == pytest.approx(best[name], rel=1e-5)
        assert each.errors["repaired"] <= best[name] * (1 + 1e-6) < first[name]


def test_a_state_that_is_better_for_one_width_and_worse_for_another_is_not_kept(monkeypatch):
    judged = [(0.4, 0.1), (0.1, 0.11), (0.39, 0.099), (0.1, 0.1001)]  # at the start and three times on the way
    errors = (error for pair in judged for error in pair)
    monkeypatch.setattr("vitrim.recover.judge.relative_error", lambda *_: next(errors))
    options = RecoverOptions(**{**OPTIONS, "elastic": (0.5, 1.0)})
    teacher, widths = make_teacher(), widths_for(options)
    student = make_student(teacher, 32)
    result = recover_(student, teacher, make_images(), held_out=HELD_OUT, options=options, widths=widths)
    assert result.best_step == 4 and result.best_error == pytest.approx((0.39 + 0.099) / 2)


def test_a_width_that_starts_perfect_does_not_make_the_others_look_diverged():
    teacher = make_teacher()
    student = copy.deepcopy(teacher)
    result, *_ = elastic_run(student, teacher, options={"elastic": (0.25, 4.0), "steps": 12})
    assert not any("went back" in note or "diverged" in note for note in result.notes)
    assert result.curve[0]["mlp_ratio=4"] < 1e-9


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    teacher = make_teacher()
    whole, stopped, again = (make_student(teacher, 64) for _ in range(3))
    expected, *_, slices = elastic_run(whole, teacher, options={"steps": 9, "num_validations": 9})

    def stop(found):
        if found.step == 5:
            raise KeyboardInterrupt

    options = {"steps": 9, "num_validations": 9}
    with pytest.raises(KeyboardInterrupt):
        elastic_run(stopped, teacher, options=options, work=tmp_path, on_validation=stop)
    result, *_, others = elastic_run(again, teacher, options=options, work=tmp_path, resume=True)
    assert_equal(weights(whole), weights(again))
    assert result.curve == expected.curve
    assert all(slices[ratio].errors == others[ratio].errors for ratio in slices)
    assert_equal(slices[0.5].tensors, others[0.5].tensors)


def test_two_processes_train_the_same_widths_as_one_also_in_shards(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, torch
            torch.set_num_threads(1)
            from tests.support.distillation import make_student, make_teacher, weights
            from tests.support.elastic import elastic_run
            for shard in (False, True):
                teacher = make_teacher()
                student = make_student(teacher, 64)
                options = {"lr": 1e-4, "gradient_accumulation_steps": 2, "batch_size": 4, "fsdp": shard}
                *_, slices = elastic_run(student, teacher, options=options)
                if int(os.environ.get("RANK", 0)) == 0:
                    own = {f"own {name}": tensor for name, tensor in slices[0.5].tensors.items()}
                    torch.save({**weights(student), **own}, f"{sys.argv[1]}-{shard}.pt")
            """
        )
    )
    for processes, out in ((None, "alone"), (2, "together")):
        done = run_python(script, tmp_path / out, processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
    first, *others = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in ("alone-False", "together-False", "together-True")
    )
    for other in others:
        assert first.keys() == other.keys() and any(name.startswith("own ") for name in first)
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, other[name], atol=2e-5, rtol=1e-4)


def fitting_for(case, *, repairs=True):
    options = RepairOptions(ridge=1e-2) if repairs else None
    return Fitting(teacher=case.model, batches=case.batches[:-1], held_out=case.batches[-1:], options=options)


def with_tensors(model, tensors):
    model.load_state_dict({**model.state_dict(), **tensors})
    return model


def test_fitted_widths_are_never_worse_than_their_prefix_and_are_what_is_said(kind):
    student, widths, fitting = kind.copy(), widths_of(kind.sites, (0.25, 0.5, 1.0)), fitting_for(kind)
    before = weights(student)
    found = fit_widths(student, widths, fitting)
    assert_equal(before, weights(student))
    assert list(found) == [0.25, 0.5, 1.0] and not found[1.0].tensors
    for ratio, each in found.items():
        plain = really_cut(student, widths, ratio)
        assert each.errors["sliced"] == relative_error(plain, fitting.judged, "final")
        fitted = with_tensors(plain, each.tensors)
        assert each.errors["repaired"] == relative_error(fitted, fitting.judged, "final") <= each.errors["sliced"]
    untouched = fit_widths(student, widths, fitting_for(kind, repairs=False))
    for ratio in (0.25, 0.5):
        assert untouched[ratio].errors["sliced"] == untouched[ratio].errors["repaired"]
        expected = really_cut(student, widths, ratio).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in untouched[ratio].tensors.items())


@pytest.mark.parametrize("name", ["timm-vit-scaled", "timm-packed"])
def test_a_fit_is_taken_where_it_is_better_and_left_where_it_is_not(build, name):
    case = build(name)
    student, widths, fitting = case.copy(), widths_of(case.sites, (0.25, 1.0)), fitting_for(case)
    fitted = fit_widths(student, widths, fitting)[0.25]
    assert fitted.errors["repaired"] < fitted.errors["sliced"]
    worse = {key: torch.full_like(tensor, 9.0) for key, tensor in fitted.tensors.items()}
    again = fit_widths(student, widths, fitting, start={0.25: worse})[0.25]
    assert again.errors["trained"] > again.errors["sliced"] and again.errors["repaired"] == fitted.errors["repaired"]
    better = fit_widths(student, widths, fitting, start={0.25: fitted.tensors})[0.25]
    assert better.errors["trained"] == fitted.errors["repaired"] >= better.errors["repaired"]


def test_output_weights_of_a_width_train_with_it_and_leave_no_trace(kind):
    student, widths = kind.copy(), widths_of(kind.sites, (0.25, 0.5, 1.0))
    before, names = weights(student), list(dict(student.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    own = {ratio: each.tensors for ratio, each in fit_widths(student, widths, fitting_for(kind, repairs=False)).items()}
    own = {r: {n: torch.randn(t.shape, generator=generator) for n, t in tensors.items()} for r, tensors in own.items()}
    cut = with_tensors(really_cut(student, widths, 0.5), own[0.5])
    expected, wanted = gradients_of(cut, kind.batches[0])
    with widths.with_own_outputs(student, own):
        assert all(torch.equal(own[0.5][name], tensor) for name, tensor in widths.own_outputs(student)[0.5].items())
        with widths.held(student, 0.5):
            found, gradients = gradients_of(student, kind.batches[0])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        outputs = set(own[0.5])
        assert {f"{name}_of_width_1" for name in outputs} == gradients.keys() - set(names)
        assert outputs.isdisjoint(gradients)
        cut_gradients = dict(transform({n: g for n, g in gradients.items() if n in names}, widths.edits(0.5)))
        cut_gradients |= {name: gradients[f"{name}_of_width_1"] for name in outputs}
        for name, gradient in wanted.items():
            scale = float(1 + gradient.abs().max())
            torch.testing.assert_close(cut_gradients[name], gradient, atol=1e-5 * scale, rtol=1e-4)
        with widths.held(student, 1.0):
            assert torch.equal(output_of(student, kind.batches[0]), output_of(kind.model, kind.batches[0]))
    assert list(dict(student.named_parameters())) == names
    assert_equal(before, weights(student))


def test_widths_are_written_and_read_back_and_damage_is_one_line(tmp_path):
    teacher = make_teacher()
    weight, path = teacher.blocks[0].mlp.fc2.weight.detach(), "blocks.0.mlp"
    slices = {
        0.5: Slice(units={path: 16}, tensors={f"{path}.fc2.weight": weight[:, :16]}, errors={"sliced": 2.0}),
        1.0: Slice(units={path: 32}),
    }
    assert read_widths(tmp_path) == {}
    save_widths(tmp_path, teacher.bfloat16(), slices)
    found = read_widths(tmp_path)
    assert found[1.0] == slices[1.0] and found[0.5].units == {path: 16} and found[0.5].errors == {"sliced": 2.0}
    assert torch.equal(found[0.5].tensors[f"{path}.fc2.weight"], weight[:, :16].bfloat16())
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}
    for text in ("{", '{"format": "vitrim-elastic/9"}', '{"format": "vitrim-elastic/1", "widths": [{}]}'):
        (tmp_path / "elastic.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
            read_widths(tmp_path)


def cut_digits(model=DIGITS, **budget):
    """The digits model, or an output, cut on weights alone: student, origin, plan."""
    model, origin = open_model(str(model))
    student = copy.deepcopy(model)
    recipe = Recipe.parse({"method": "dgmr-paper", **budget})
    return student, origin, cut_(student, model, find_mlps(model), recipe, None, quiet=True).plan


def write_digits(folder, model=DIGITS, **budget):
    student, origin, plan = cut_digits(model, **budget)
    folder.mkdir()
    save(folder, student, origin=origin, plan=plan)
    return folder


@pytest.mark.parametrize("method", ["dgmr-paper", "magnitude", "random"])
def test_the_units_of_a_smaller_width_are_the_first_of_a_larger(method):
    small, large = (cut_digits(method=method, hidden_dim=width)[2].edits for width in (24, 150))
    assert all(narrow.keep == wide.keep[:24] for narrow, wide in zip(small, large, strict=True))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    recipe = Recipe.parse(
        {
            "model": DIGITS,
            "calibrate": {"num_images": 96, "batch_size": 32},
            "repair": {"refit_steps": 10, "max_tokens": 2048},
            "recover": {"steps": 6, "batch_size": 16, "lr": 1e-4, "elastic": [1, 0.5, 2], "num_validations": 2},
        }
    )
    out = tmp_path_factory.mktemp("elastic") / "out"
    return vitrim.compress(DIGITS, data="digits", recipe=recipe, out=out, quiet=True)


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_output_is_the_largest_width_with_the_others_beside_it(output):
    assert set(output.plan.widths.values()) == {192}
    stock = timm.create_model(f"local-dir:{output.out}", pretrained=True).eval()
    assert torch.equal(stock(IMAGES), output.model(IMAGES))
    assert list(read_widths(output.out)) == [0.5, 1.0, 2.0]
    errors = json.loads((output.out / "metrics.json").read_text())["elastic"]
    assert errors["0.5"]["repaired"] < errors["0.5"]["sliced"]
    assert errors["2"]["repaired"] == errors["2"]["sliced"] < errors["1"]["repaired"] < errors["0.5"]["repaired"]
    assert {"mlp_ratio=0.5", "mlp_ratio=1", "mlp_ratio=2"} <= output.metrics.recovery["curve"][-1].keys()
    assert output.metrics.after_recovery.fidelity["relative_error"] < 0.01


def test_a_stored_width_is_sliced_with_its_own_output_weights_and_loads_with_stock_timm(tmp_path, output):
    sliced = slice_output(output.out, tmp_path / "half", mlp_ratio=0.5)
    assert {path.name for path in sliced.out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "vitrim.json",
        "metrics.json",
        "README.md",
    }
    stock = timm.create_model(f"local-dir:{sliced.out}", pretrained=True).eval()
    assert stock.blocks[0].mlp.fc1.out_features == 48
    assert torch.equal(stock(IMAGES), sliced.model(IMAGES))
    assert torch.equal(vitrim.load(sliced.out)(IMAGES), sliced.model(IMAGES))
    own, kept = load_file(output.out / "elastic.safetensors"), load_file(sliced.out / "model.safetensors")
    assert own and all(
        torch.equal(kept[name.removeprefix("0.5/")], own[name]) for name in own if name.startswith("0.5/")
    )
    whole = load_file(output.out / "model.safetensors")
    assert torch.equal(kept["blocks.0.mlp.fc1.weight"], whole["blocks.0.mlp.fc1.weight"][:48])
    for narrow, wide in zip(sliced.plan.edits, output.plan.edits, strict=True):
        assert narrow.site == wide.site and narrow.keep == wide.keep[:48]
    assert sliced.metrics.stock and sliced.metrics.notes == () and sliced.metrics.reload_difference <= 1e-5
    assert sliced.metrics.elastic == {"0.5": output.metrics.elastic["0.5"]}


def test_the_largest_width_is_the_output_itself(tmp_path, output):
    sliced = slice_output(output.out, tmp_path / "largest", mlp_ratio=2)
    assert torch.equal(sliced.model(IMAGES), output.model(IMAGES)) and sliced.metrics.notes == ()


def test_a_width_that_was_not_trained_is_a_plain_prefix_and_says_so(tmp_path, output):
    sliced = slice_output(output.out, tmp_path / "between", mlp_ratio=1.5)
    (note,) = sliced.metrics.notes
    assert "1.5 was not trained or repaired for" in note
    expected = vitrim.load(output.out)
    widths = widths_of([*find_mlps(expected)], (0.75, 1.0))
    assert torch.equal(sliced.model(IMAGES), really_cut(expected, widths, 0.75)(IMAGES))


def test_an_output_that_is_not_elastic_can_be_sliced_and_a_slice_sliced_again(tmp_path):
    made = write_digits(tmp_path / "made", mlp_ratio=1)
    once = slice_output(made, tmp_path / "once", mlp_ratio=0.5)
    twice = slice_output(once.out, tmp_path / "twice", mlp_ratio=0.25)
    direct, _, plan = cut_digits(mlp_ratio=0.25)
    assert [edit.keep for edit in twice.plan.edits] == [edit.keep for edit in plan.edits]
    assert all(torch.equal(tensor, twice.model.state_dict()[name]) for name, tensor in direct.state_dict().items())
    assert "not trained or repaired" in twice.metrics.notes[0]


def test_an_output_of_an_output_is_sliced_by_its_last_cut(tmp_path):
    first = write_digits(tmp_path / "first", hidden_dim=100)
    again = write_digits(tmp_path / "again", model=first, method="magnitude", hidden_dim=16)
    sliced = slice_output(again, tmp_path / "narrower", mlp_ratio=0.1)
    expected = cut_digits(first, method="magnitude", hidden_dim=10)[0]  # 9.6, fewer than a multiple of 16
    assert torch.equal(vitrim.load(sliced.out)(IMAGES), expected.eval()(IMAGES))


@pytest.mark.parametrize("what", ["no cut of hidden units", "active a token"])
def test_an_output_with_other_edits_than_cuts_of_hidden_units_is_refused(tmp_path, what):
    student, origin, plan = cut_digits(hidden_dim=32)
    site = replace(plan.edits[0].site, d_hidden=32)
    edits = () if what.startswith("no") else (*plan.edits, TopKActivation(site=site, num_active=4))
    write_configs(tmp_path, student, origin=origin, plan=replace(plan, edits=edits))
    with pytest.raises(CheckpointError, match=f"{what}.*compress the original") as caught:
        slice_output(tmp_path, tmp_path / "out", mlp_ratio=0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ratio, words",
    [
        (3.0, r"mlp_ratio=3 .*use 1\.\.192"),
        (-1.0, r"mlp_ratio is -1.0; .*above 0"),
        ("1", r"mlp_ratio is '1'; .*above 0"),
        (float("nan"), "above 0"),
        (float("inf"), "above 0"),
    ],
)
def test_a_width_above_the_largest_is_refused_in_one_line(tmp_path, output, ratio, words):
    with pytest.raises(BudgetError, match=words) as caught:
        slice_output(output.out, tmp_path / "out", mlp_ratio=ratio)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_slicing_refuses_what_is_no_output_and_never_overwrites(tmp_path, output):
    with pytest.raises(CheckpointError, match=r"vitrim\.json"):
        slice_output(tmp_path, tmp_path / "out", mlp_ratio=0.5)
    with pytest.raises(OutputError, match="exists already"):
        slice_output(output.out, output.out, mlp_ratio=0.5)


def test_a_module_that_only_its_owner_can_build_is_sliced_with_it(tmp_path):
    def build():
        torch.manual_seed(0)
        mlp = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Linear(24, 12))
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 12), mlp).eval()

    student = build()
    edits = tuple(KeepUnits(site=site, keep=tuple(range(17, -1, -1))) for site in find_mlps(student))
    apply_(student, edits)
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", student, origin=origin_of(build()), plan=Plan(edits=edits, method="random"))
    sliced = slice_output(tmp_path / "out", tmp_path / "small", mlp_ratio=1, model=build())
    images = torch.randn(2, 3, 3, 3)
    assert torch.equal(vitrim.load(sliced.out, model=build())(images), sliced.model(images))


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"elastic": [1]}, RecipeError, "at least two different MLP ratios"),
        ({"elastic": [1, 1]}, RecipeError, "at least two different MLP ratios"),
        ({"elastic": [0, 1]}, RecipeError, "MLP ratios above 0"),
        ({"elastic": [1, float("inf")]}, RecipeError, "finite number"),
        ({"elastic": [1, 2], "hidden_dim": 8}, RecipeError, "names MLP ratios; drop hidden_dim"),
        ({"elastic": [1, 2], "keep_ratio": 0.5}, RecipeError, "names MLP ratios; drop keep_ratio"),
        ({"elastic": [1, 2], "params_ratio": 0.5}, RecipeError, "names MLP ratios; drop params_ratio"),
        ({"elastic": [1, 2], "mlp_ratio": 1}, RecipeError, "largest of recover.elastic is 2"),
        ({"elastic": [1, 9]}, BudgetError, r"mlp_ratio=9 .*use 1\.\.384"),
        ({"elastic": [0.9, 0.91, 1]}, BudgetError, r"0\.9 and 0\.91 come to the same widths"),
    ],
)
def test_widths_that_make_no_sense_are_refused_before_anything_is_cut(given, error, words):
    recover = {"steps": 1, "elastic": given.pop("elastic")}
    with pytest.raises(error, match=words) as caught:
        vitrim.compress(DIGITS, data="digits", recipe=Recipe.parse({"recover": recover, **given}), quiet=True)
    assert "\n" not in str(caught.value)


def test_the_budget_may_be_said_twice_if_it_is_the_same():
    recipe = Recipe.parse({"mlp_ratio": 2, "recover": {"steps": 1, "elastic": [2, 0.5]}})
    site = find_mlps(make_teacher())[0]
    without = Recipe.parse({"recover": {"steps": 1, "elastic": [0.5, 2]}})
    assert recipe.width().of(site) == without.width().of(site) == 64
    assert Widths.of(recipe, [site]).units[0.5] == {site.path: 16} and recipe.recover.elastic == (0.5, 2.0)


def test_distillation_without_its_widths_is_refused():
    teacher = make_teacher()
    with pytest.raises(RecipeError, match=r"Widths\.of"):
        recover_(teacher, teacher, make_images(), held_out=HELD_OUT, options=RecoverOptions(**OPTIONS))
