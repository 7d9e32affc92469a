"""Adapters: what LoRA and OP-LoRA promise, on every library's layers, and that nothing of them is left afterwards."""

import json
import os
import signal
import sys
import textwrap
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import vitrim
from tests.support.distillation import (
    HELD_OUT,
    assert_equal,
    make_images,
    make_student,
    make_teacher,
    poison,
    run,
    weights,
)
from tests.support.processes import run_python
from vitrim.config.options import AdapterOptions, RecoverOptions
from vitrim.config.recipe import Recipe
from vitrim.errors import Interrupted, MissingExtraError, OutputError, RecipeError
from vitrim.layers.adapters import OpLora, find_adapters, merge_adapters_
from vitrim.models.features import features
from vitrim.recover.adapters import adapted, attach_, without_decay
from vitrim.recover.losses import feature_loss
from vitrim.recover.peft_layout import WEIGHTS, check_peft, save_adapter

BATCH = HELD_OUT[0]
both = pytest.mark.parametrize("how", ["lora", "op-lora"])


def options(how, **kwargs):
    return AdapterOptions(kind=how, **{"rank": 4, "alpha": 8, "hidden": 8, "latent": 6, **kwargs})


def train_(model, batch, *, steps=1, rate=1e-2):
    """Some steps towards other features, by what trains now."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    with torch.no_grad():
        start = features(model, batch)
        target = replace(start, pooled_BD=start.pooled_BD + torch.linspace(-1, 1, start.pooled_BD.shape[-1]))
    for _ in range(steps):
        optimizer.zero_grad()
        feature_loss(features(model, batch), target).backward()
        optimizer.step()


def adapters(model):
    return {place.name: (place, adapter) for place, adapter in find_adapters(model)}


def adapted_student(how, *, steps=3, **kwargs):
    """A student with trained adapters, and its weights before."""
    student = make_student(make_teacher())
    student.head.requires_grad_(False)  # as recovery does with what the loss doesn't reach
    before = weights(student)
    attach_(student, options(how, **kwargs))
    if steps:
        train_(student, BATCH, steps=steps)
    return student, before


def clip_tower():
    """An open_clip vision tower: attention is torch's own, which hands its packed weight to a function."""
    torch.manual_seed(0)
    tower = open_clip.transformer.VisionTransformer(
        image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=12, output_tokens=True
    )
    return tower.eval()


@both
def test_op_lora_2412_10362_starts_at_the_base_and_merges_into_it_on_every_library(case, how):
    """To the bit at step 0, to 1e-5 after merging, and every module is again what it was."""
    model, batch = case.copy(), case.batches[0]
    base, structure = features(model, batch), [(n, type(m), *m._parameters) for n, m in model.named_modules()]
    features(model, batch).pooled_BD.sum().backward()
    for p in model.parameters():
        p.requires_grad_(p.grad is not None)
    identities = {name: id(p) for name, p in model.named_parameters()}
    attach_(model, options(how, rank=2))
    assert torch.equal(features(model, batch).pooled_BD, base.pooled_BD)
    train_(model, batch, steps=2)
    after = features(model, batch).pooled_BD
    assert (after - base.pooled_BD).abs().max() > 1e-3
    merge_adapters_(model)
    torch.testing.assert_close(features(model, batch).pooled_BD, after, atol=1e-5, rtol=1e-5)
    assert [(n, type(m), *m._parameters) for n, m in model.named_modules()] == structure
    assert {name: id(p) for name, p in model.named_parameters()} == identities


@both
def test_torch_attention_of_open_clip_is_adapted_and_merged(how):
    tower = clip_tower()
    base = tower(BATCH)[0]
    attach_(tower, options(how))
    assert {name.split(".", 3)[3] for name in adapters(tower)} == {
        "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj",
    }  # fmt: skip
    assert torch.equal(tower(BATCH)[0], base)
    train_(tower, BATCH, steps=2)
    assert all(adapter.factors()[1].any() for _, adapter in adapters(tower).values())
    with torch.no_grad():  # torch's fused kernel, which reads the packed weight itself
        after = tower(BATCH)[0]
        merge_adapters_(tower)
        torch.testing.assert_close(tower(BATCH)[0], after, atol=1e-5, rtol=1e-5)
    assert (after - base).abs().max() > 1e-3


def test_op_lora_2412_10362_emits_its_factors_as_the_formula_says():
    """vec(A, B) = W2 relu(W1 z + b1) + b2, written out; and R (M + N) (H + 1) + H Z + H + Z values train."""
    m, n, r, h, z = 5, 7, 3, 4, 6
    adapter = OpLora(torch.zeros(m, n), rank=r, alpha=6.0, hidden=h, latent=z, generator=torch.Generator())
    adapter.requires_grad_(False)
    torch.manual_seed(0)
    for p in adapter.parameters():
        p.copy_(torch.randn_like(p))
    hidden = [max(0.0, sum(float(adapter.W1[i, j] * adapter.z[j]) for j in range(z)) + float(adapter.b1[i]))
              for i in range(h)]  # fmt: skip
    flat = [
        sum(float(adapter.W2[i, j]) * hidden[j] for j in range(h)) + float(adapter.b2[i]) for i in range(r * (m + n))
    ]
    a_RN, b_MR = adapter.factors()
    torch.testing.assert_close(a_RN, torch.tensor(flat[: r * n]).reshape(r, n))
    torch.testing.assert_close(b_MR, torch.tensor(flat[r * n :]).reshape(m, r))
    weight = torch.randn(m, n)
    torch.testing.assert_close(adapter(weight), weight + 6.0 / 3 * b_MR @ a_RN)
    assert sum(p.numel() for p in adapter.parameters()) == r * (m + n) * (h + 1) + h * z + h + z
    assert 0 < adapter.num_dead() == sum(value == 0 for value in hidden)


def test_op_lora_2412_10362_starts_with_lora_s_own_spread_all_units_alive_and_a_gradient_where_b_comes_from():
    student, _ = adapted_student("op-lora", steps=0, hidden=32, latent=32)
    feature_loss(features(student, BATCH), features(make_teacher(), BATCH)).backward()
    for place, adapter in adapters(student).values():
        num_a = adapter.rank * adapter.num_in
        assert adapter.num_dead() == 0
        assert (adapter.W2.grad[num_a:] != 0).all(1).any() and adapter.b2.grad[num_a:].abs().max() > 0
        assert not adapter.W2[num_a:].any() and not adapter.b2[num_a:].any()
        a_RN, _ = adapter.factors()
        spread = float(a_RN.detach().std()) * (3 * adapter.num_in) ** 0.5  # 1 for LoRA's uniform start
        assert spread == pytest.approx(1, abs=0.35), place.name


@both
def test_op_lora_2412_10362_moves_each_weight_in_one_step_by_rank_r_and_leaves_w0_alone(how):
    student, before = adapted_student(how, steps=1)
    for name, (place, adapter) in adapters(student).items():
        original = place.module.parametrizations.weight.original
        assert torch.equal(original, before[f"{name}.weight"]) and original.grad is None
        change = (place.module.weight - original).double()
        assert change.abs().max() > 0
        values = torch.linalg.svdvals(change)
        assert values[adapter.rank] < 1e-5 * values[0]
    train_(student, BATCH, steps=4)
    kept = {name.replace(".parametrizations.weight.original", ".weight"): t for name, t in weights(student).items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


@both
def test_op_lora_2412_10362_merged_weights_are_w0_plus_scale_b_a_and_no_trace_is_left(how):
    student, before = adapted_student(how)
    factors = {name: adapter.factors() for name, (_, adapter) in adapters(student).items()}
    assert len(factors) == 8
    merge_adapters_(student)
    after = weights(student)
    assert after.keys() == before.keys() and not any(type(m).__name__.startswith("Param") for m in student.modules())
    for name, tensor in before.items():
        if name.removesuffix(".weight") in factors:
            a_RN, b_MR = factors[name.removesuffix(".weight")]
            expected = tensor.double() + 8 / 4 * b_MR.double() @ a_RN.double()
            torch.testing.assert_close(after[name].double(), expected, atol=1e-5, rtol=0)
        else:
            assert torch.equal(after[name], tensor)


@both
def test_op_lora_2412_10362_keeps_r_times_m_plus_n_values_a_weight(how, tmp_path):
    student, before = adapted_student(how)
    shapes = [before[f"{name}.weight"].shape for name in adapters(student)]
    save_adapter(student, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) == sum(4 * (m + n) for m, n in shapes)
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
    done = attach_(make_student(make_teacher()), options(how, targets=["qkv", "proj", "fc1", "fc2"]))
    assert done["num_weights"] == 8  # a convolution (patch_embed.proj) is none
    assert done["num_in_factors"] == sum(4 * (m + n) for m, n in shapes)


def peft_on(base, folder, batch):
    """What the base says with the written adapter merged into it, by PEFT itself."""
    import peft

    wrapped = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        apart, merged = (features(m, batch) for m in (wrapped.base_model.model, wrapped.merge_and_unload()))
    torch.testing.assert_close(apart.pooled_BD, merged.pooled_BD, atol=1e-5, rtol=1e-5)
    return merged


@both
def test_op_lora_2412_10362_written_factors_reproduce_the_adapted_model_in_peft(how, tmp_path):
    student, _ = adapted_student(how)
    save_adapter(student, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 4, 8.0, "none")
    with torch.no_grad():
        expected = features(student, BATCH)
    found = peft_on(make_student(make_teacher()), tmp_path / "adapter", BATCH)
    torch.testing.assert_close(found.pooled_BD, expected.pooled_BD, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.patches_BND, expected.patches_BND, atol=1e-6, rtol=0)


@both
def test_written_factors_of_torch_attention_reproduce_the_adapted_model_in_peft(how, tmp_path):
    """PEFT adapts both of its matrices or none, so its output projection gets one that adds nothing."""
    tower = clip_tower()
    attach_(tower, options(how, targets=["attn.in_proj", "c_fc"]))
    train_(tower, BATCH, steps=3)
    check_peft(tower)
    save_adapter(tower, tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    ends = ("attn", "mlp.c_fc")
    assert sorted(targets) == [f"transformer.resblocks.{block}.{end}" for block in range(2) for end in ends]
    found = peft_on(clip_tower(), tmp_path, BATCH)
    with torch.no_grad():
        torch.testing.assert_close(found.pooled_BD, features(tower, BATCH).pooled_BD, atol=1e-6, rtol=0)


class Pool(nn.Module):
    """Attention whose keys have a width of their own: three matrices in place of a packed one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=12, vdim=12, batch_first=True)

    def forward(self, tokens):
        return self.attn(tokens[..., :8], tokens, tokens)[0]


def test_attention_with_separate_matrices_is_adapted_but_has_no_peft_layout():
    torch.manual_seed(0)
    model, tokens = Pool().eval(), torch.randn(2, 3, 12)
    expected = model(tokens)
    attach_(model, options("lora"))
    assert set(adapters(model)) == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"}
    assert torch.equal(model(tokens), expected)
    with pytest.raises(RecipeError, match=r"save: attn.q_proj: PEFT has no layout for separate"):
        check_peft(model)
    merge_adapters_(model)
    torch.testing.assert_close(model(tokens), expected)


def test_output_projections_of_torch_attention_are_not_written_because_peft_adds_them_twice():
    tower = clip_tower()
    attach_(tower, options("lora"))
    with pytest.raises(RecipeError, match=r"attn.out_proj: PEFT adds it twice .*name other targets"):
        check_peft(tower)


def test_weights_that_functions_read_are_adapted_too():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x):
            return functional.linear(x, self.layer.weight) + self.layer(x)

    model, x = Functional(), torch.randn(3, 6)
    attach_(model, options("lora"))
    (place, adapter) = adapters(model)["layer"]
    with torch.no_grad():
        adapter.B += 1
        weight = place.module.parametrizations.weight.original + 8 / 4 * adapter.B @ adapter.A
        torch.testing.assert_close(model(x), 2 * x @ weight.T + model.layer.bias)


def test_a_layer_used_twice_has_one_adapter_and_a_tied_weight_none():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.looped = nn.Linear(6, 6), nn.Linear(6, 6)
            self.again, self.last = self.looped, nn.Linear(6, 6)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.again(self.looped(self.first(x))))

    model = Tied()
    done = attach_(model, options("lora"))
    assert set(adapters(model)) == {"looped"}
    assert done["skipped"] == dict.fromkeys(["first", "last"], "is tied to another layer's weight")


def test_the_sum_is_taken_in_float32_under_autocast_and_in_the_weight_s_own_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
        attach_(model, options("lora"))
        (place, adapter) = adapters(model)["0"]
        nn.init.normal_(adapter.B)
        original = place.module.parametrizations.weight.original
        expected = (original.double() + 2 * adapter.B.double() @ adapter.A.double()).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            weight = place.module.weight
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=0.01 if dtype == torch.bfloat16 else 1e-5)


@both
def test_recovery_through_adapters_leaves_a_plain_model_with_other_linear_weights_alone(how):
    teacher = make_teacher()
    student = make_student(teacher)
    student.norm.weight.requires_grad_(False)
    before, kinds = weights(student), [type(module) for module in student.modules()]
    result = run(student, teacher, options={"adapter": options(how), "steps": 30, "lr": 5e-3})
    assert result.best_error < 0.95 * result.curve[0]["relative_error"]
    changed = {name for name, tensor in weights(student).items() if not torch.equal(tensor, before[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert weights(student).keys() == before.keys() and [type(module) for module in student.modules()] == kinds
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["norm.weight"]
    assert all(p.grad is None for p in student.parameters())


@both
def test_what_adapters_cost_is_reported(how):
    teacher = make_teacher()
    student = make_student(teacher)
    shapes = [before.shape for name, before in weights(student).items() if ".attn." in name or ".mlp." in name]
    shapes = [shape for shape in shapes if len(shape) == 2]
    about = run(student, teacher, options={"adapter": options(how)}).adapter
    per_weight = [
        4 * (m + n) * (9 if how == "op-lora" else 1) + (8 * 6 + 8 + 6) * (how == "op-lora") for m, n in shapes
    ]
    assert about["num_weights"] == 8 and about["num_trained"] == sum(per_weight)
    assert about["num_in_factors"] == sum(4 * (m + n) for m, n in shapes)
    expected = (16 * sum(per_weight) + 4 * sum(m * n for m, n in shapes)) / 2**20
    assert about["training_mib"] == pytest.approx(expected, abs=0.051)
    assert about["skipped"] == {} and ("num_dead_units" in about) == (how == "op-lora")


def test_norms_and_biases_train_beside_adapters_when_asked():
    teacher = make_teacher()
    student = make_student(teacher)
    before = weights(student)
    run(student, teacher, options={"adapter": options("lora", train_vectors=True)})
    changed = {name for name, tensor in weights(student).items() if not torch.equal(tensor, before[name])}
    assert {"norm.weight", "blocks.0.norm1.bias", "blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc1.weight"} <= changed
    assert not {"cls_token", "pos_embed", "head.bias", "patch_embed.proj.weight"} & changed


@both
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_stopped_run_with_adapters_goes_on_bit_for_bit(tmp_path, how, ema):
    teacher = make_teacher()
    whole, stopped, again = (make_student(teacher) for _ in range(3))
    chosen = {"steps": 9, "num_validations": 9, "ema": ema, "adapter": options(how), "lr": 5e-3}
    expected = run(whole, teacher, options=chosen)

    def interrupt(found):
        if found.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"step [45] of 9"):
        run(stopped, teacher, options=chosen, work=tmp_path, on_validation=interrupt)
    assert not adapters(stopped)
    result = run(again, teacher, options=chosen, work=tmp_path, resume=True)
    assert expected.best_step > 4
    assert_equal(weights(whole), weights(again))
    assert (result.curve, result.adapter) == (expected.curve, expected.adapter)


@both
def test_the_rate_is_found_and_a_run_that_diverges_goes_back_with_adapters_on(how, monkeypatch):
    teacher = make_teacher()
    student = make_student(teacher)
    found = run(student, teacher, options={"lr": None, "steps": 20, "adapter": options(how)})
    assert next(iter(found.rate_test)) == {"lora": "0.02", "op-lora": "0.002"}[how]  # LoRA stands higher ones
    again = make_student(teacher)
    run(again, teacher, options={"lr": found.lr, "steps": 20, "adapter": options(how)})
    assert_equal(weights(student), weights(again))  # the range test leaves no trace
    third = make_student(teacher)
    poison(monkeypatch, at={4})
    (note,) = run(third, teacher, options={"adapter": options(how)}).notes
    assert "went back to step 2" in note
    assert all(bool(tensor.isfinite().all()) for tensor in third.state_dict().values())


def test_recovery_through_adapters_never_returns_worse_than_the_start():
    teacher = make_teacher()
    student = make_student(teacher)
    before = weights(student)
    assert run(student, teacher, options={"adapter": options("op-lora"), "lr": 10.0}).best_step == 0
    after = weights(student)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_op_lora_2412_10362_weight_decay_leaves_the_generator_alone_unless_asked():
    for how, decays, expected in (("lora", False, 0), ("op-lora", False, 5 * 8), ("op-lora", True, 0)):
        student, _ = adapted_student(how, steps=0)
        assert len(without_decay(student, options(how, decay_generator=decays))) == expected
    teacher, found = make_teacher(), {}
    for decays in (False, True):
        for decay in ((0.0, 0.0), (0.5, 0.5)):
            student = make_student(teacher)
            adapter = options("op-lora", decay_generator=decays)
            run(student, teacher, options={"adapter": adapter, "weight_decay": decay, "lr": 5e-3})
            found[decays, decay[0]] = student.blocks[0].mlp.fc1.weight.detach().clone()
    assert torch.equal(found[False, 0.0], found[False, 0.5]) and torch.equal(found[True, 0.0], found[False, 0.0])
    assert not torch.equal(found[True, 0.0], found[True, 0.5])


def test_targets_choose_layers_and_one_that_names_none_says_what_there_is():
    student = make_student(make_teacher())
    attach_(student, options("lora", targets=["mlp.fc1", "blocks.1.attn.qkv"]))
    assert set(adapters(student)) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "blocks.1.attn.qkv"}
    with pytest.raises(RecipeError, match=r"ends in 'c1'; there are attn.proj, attn.qkv, .*mlp.fc1"):
        attach_(make_student(make_teacher()), options("lora", targets=["c1"]))


def test_weights_too_small_for_the_rank_are_left_out_and_said():
    teacher = make_teacher()
    student = make_student(teacher, width=8)
    result = run(student, teacher, options={"adapter": options("lora", rank=16)})
    reason = "blocks.0.mlp.fc1 is 8 x 32, too small for rank 16."
    assert result.notes == [f"adapters: 4 linear weights got none and stayed as they were; {reason}"]
    with pytest.raises(RecipeError, match=r"no linear weight can have one.*is 96 x 32, too small for rank 64"):
        run(student, teacher, options={"adapter": options("lora", rank=64)})
    assert all(p.requires_grad for p in student.parameters())


@both
def test_the_best_state_s_factors_are_written_where_asked(how, tmp_path):
    teacher = make_teacher()
    student, base = make_student(teacher), make_student(teacher)
    run(student, teacher, options={"adapter": options(how, save=tmp_path / "adapter"), "lr": 5e-3})
    found = peft_on(base, tmp_path / "adapter", BATCH)
    with torch.no_grad():
        torch.testing.assert_close(found.pooled_BD, features(student, BATCH).pooled_BD, atol=1e-5, rtol=1e-5)


def test_writing_factors_needs_peft_and_a_place_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the adapter can't be written"):
        save_adapter(adapted_student("lora", steps=0)[0], tmp_path / "file" / "adapter")
    monkeypatch.setitem(sys.modules, "peft", None)
    student = make_student(make_teacher())
    with (
        pytest.raises(MissingExtraError, match=r"peft is not installed; pip install 'vitrim\[adapters\]'"),
        adapted(student, options("lora", save=tmp_path / "adapter")),
    ):
        pytest.fail("found out too late")
    assert not adapters(student)
    with adapted(make_student(make_teacher()), options("lora")) as done:  # training itself needs no peft
        assert done["num_weights"] == 8


def test_options_of_adapters_in_a_recipe():
    assert RecoverOptions(steps=1, adapter="op-lora").adapter == AdapterOptions(kind="op-lora")
    recipe = Recipe.parse({"recover": {"steps": 1, "adapter": {"kind": "op-lora", "save": "factors"}}})
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe
    for adapter, said in (
        ({"rnak": 3}, "unknown key 'recover.adapter.rnak'; did you mean 'recover.adapter.rank'"),
        ({"kind": "dora"}, "recover.adapter.kind: .*'lora' or 'op-lora'"),
        ({"rank": 0}, "recover.adapter.rank: .*greater than or equal to 1"),
        ({"save": "factors", "train_vectors": True}, "not all that was trained"),
    ):
        with pytest.raises(RecipeError, match=said):
            Recipe.parse({"recover": {"steps": 1, "adapter": adapter}})
    with pytest.raises(RecipeError, match="drop adapter or elastic"):
        Recipe.parse({"recover": {"steps": 1, "adapter": "lora", "elastic": [0.5, 1]}})


def test_a_compressed_model_bears_no_trace_of_op_lora(tmp_path):
    teacher = make_teacher()
    images = [make_images(20)[i][0] for i in range(20)]
    recover = {"steps": 2, "batch_size": 4, "lr": 1e-3, "adapter": {"kind": "op-lora", "rank": 4}}
    result = vitrim.compress(teacher, data=images, hidden_dim=8, recover=recover, out=tmp_path / "small", quiet=True)
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert tensors.keys() == teacher.state_dict().keys()
    assert result.metrics.recovery["adapter"]["kind"] == "op-lora"
    assert_equal(tensors, weights(result.model))


def test_two_processes_train_adapters_as_one_does_also_in_shards_and_with_checkpointed_activations(tmp_path):
    chosen = {"lr": 1e-3, "adapter": options("op-lora").model_dump(mode="json")}
    ways = {"ddp": chosen, "sharded": {**chosen, "fsdp": True, "checkpoint_activations": True}}
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, torch
            torch.set_num_threads(1)
            from tests.support.distillation import make_student, make_teacher, run, weights
            for way, chosen in {ways!r}.items():
                teacher = make_teacher()
                student = make_student(teacher)
                run(student, teacher, options=chosen)
                if int(os.environ["RANK"]) == 0:
                    torch.save(weights(student), f"{tmp_path}/{{way}}.pt")
            """
        )
    )
    done = run_python(script, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    teacher = make_teacher()
    alone = make_student(teacher)
    run(alone, teacher, options=chosen)
    for way in ways:
        together = torch.load(tmp_path / f"{way}.pt", weights_only=True)
        assert together.keys() == weights(alone).keys()
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(tensor, together[name], atol=1e-4, rtol=1e-4)
