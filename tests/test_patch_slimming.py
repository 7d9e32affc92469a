"""Patch Slimming and the edit that lets tokens end: against slow versions, at other sizes, trained, saved, loaded."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch import Tensor, nn

import vitrim
from tests.support.models import HF_TEXT, SIZE, Case, build_case, hf, timm_vit
from vitrim.calibrate import LiveModelView
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.cost.count import count_macs
from vitrim.errors import BudgetError, ModelError, RecipeError, SiteNotFoundError
from vitrim.layers.kept_tokens import KeptTokens
from vitrim.methods import PatchSlimming
from vitrim.metrics.fidelity import block_fidelity, fidelity
from vitrim.metrics.judging import FeatureModel, features_on_cpu, read_features, relative_error
from vitrim.models.attention import find_attentions
from vitrim.models.features import features, first_tensor, same_patches
from vitrim.models.sites import find_mlps
from vitrim.ops.token_paths import paths_behind, token_scores, with_shortcut
from vitrim.surgery import KeepTokens, KeepUnits, apply_, submodule

SERVED = ("timm-vit", "timm-vit-scaled", "timm-packed", "hf-vit", "hf-dinov2", "hf-clip")
EVERY = tuple(range(17))


def case_of(model: nn.Module, *, num_batches: int = 3) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model.eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        batches = [torch.randn(4, 3, 32, 32) for _ in range(num_batches)]
    return Case(name="own", model=model, sites=find_mlps(model), batches=batches)


def deep(**kwargs) -> Case:
    return case_of(timm_vit(depth=4, init_values=0.1, **kwargs))


def view_of(case: Case) -> LiveModelView:
    return LiveModelView(
        case.copy(), case.sites, {site.path: site.d_hidden for site in case.sites}, case.batches, seed=0
    )


def slim(case: Case, *keeps: tuple[int, ...]) -> nn.Module:
    """A copy whose last blocks keep these tokens."""
    student, (sites, *_) = case.copy(), view_of(case).token_blocks()
    among = EVERY
    for site, keep in zip(sites[-len(keeps) :], keeps, strict=True):
        apply_(student, [KeepTokens(site=site, keep=keep, among=among)])
        among = keep
    return student


def search(case: Case, **values):
    student = case.copy()
    recipe = Recipe.parse({"method": "patch-slimming", "exact": True, **values})
    return student, cut_(student, case.model, case.sites, recipe, case.batches, quiet=True)


def block_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    seen = []
    paths = dict.fromkeys(site.block for site in find_mlps(model))
    handles = [submodule(model, path).register_forward_hook(lambda *args: seen.append(args[-1])) for path in paths]
    with torch.inference_mode():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", SERVED)
def test_with_all_tokens_it_is_the_original_and_with_some_the_blocks_give_its_rows(name, run):
    case, keep = build_case(name), (0, 3, 4, 11)
    whole = slim(case, EVERY, EVERY)
    torch.testing.assert_close(run(whole, case.batches[0]), run(case.model, case.batches[0]), atol=1e-6, rtol=1e-5)
    some, full = (block_outputs(model, case.batches[0]) for model in (slim(case, keep), case.model))
    assert [each.shape[1] for each in some] == [17, 4]
    torch.testing.assert_close(some[1], full[1][:, list(keep)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SERVED)
def test_cls_alone_behind_the_last_block_changes_no_score(name):
    case = build_case(name)
    student = slim(case, (0,))
    mine, theirs = (features(model, case.batches[0]) for model in (student, case.model))
    torch.testing.assert_close(mine.pooled_BD, theirs.pooled_BD, atol=1e-5, rtol=1e-4)
    assert mine.patches_BND is None and mine.token_positions == ()
    if first_tensor(case.model(case.batches[0])).ndim == 2:
        torch.testing.assert_close(student(case.batches[0]), case.model(case.batches[0]), atol=1e-5, rtol=1e-4)


def test_keys_and_values_are_of_all_tokens_that_come_in_and_the_rest_of_those_that_stay():
    case = deep()
    student = slim(case, (0, 1, 2, 5, 9), (0, 2))
    lengths: dict[str, int] = {}
    for path, module in student.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: lengths.update({path: args[0].shape[1]}))
    student(case.batches[0][:, :, :32])
    for number, (came, left) in {2: (17, 5), 3: (5, 2)}.items():
        assert {lengths[f"blocks.{number}.attn.{name}"] for name in "kv"} == {came}
        assert {lengths[f"blocks.{number}.{name}"] for name in ("attn.q", "attn.proj", "mlp.fc1", "mlp.fc2")} == {left}


def test_multiply_accumulates_go_by_the_lengths():
    case = build_case("timm-vit")
    d, hidden, image = 32, 96, case.batches[0][:1]

    def block(came, left):
        return 2 * came * d * d + 2 * left * d * d + 2 * left * came * d + 2 * left * d * hidden

    saved = count_macs(case.model, image) - count_macs(slim(case, (0, 1, 2, 5, 9), (0,)), image)
    assert saved == 2 * block(17, 17) - block(17, 5) - block(5, 1)


def slow_scores(maps, masks, tokens, shortcut):
    """Every path by itself. `maps`: of blocks t..L, (H, N, N) each; `masks`: of t+1..L; tokens go into block t."""
    eye = torch.eye(len(tokens))
    maps = [heads + eye if shortcut else heads for heads in maps]
    scores = torch.zeros(len(tokens))
    for path in itertools.product(*(range(len(heads)) for heads in maps)):
        onward = eye
        for heads, head, mask in zip(maps[1:], path[1:], masks, strict=True):
            onward = torch.diag(mask) @ heads[head] @ onward
        gathered = maps[0][path[0]] @ tokens.abs()
        for i in range(len(tokens)):
            scores[i] += (onward[:, i : i + 1] @ gathered[i : i + 1]).square().sum()
    return scores


@pytest.mark.parametrize("shortcut", [False, True])
def test_scores_are_sums_over_all_paths(shortcut):
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 4).softmax(-1) for _ in range(4)]
    keeps = [(0, 1, 2), (0, 2), (0,)]
    masks = [torch.zeros(4).index_fill(0, torch.tensor(keep), 1.0) for keep in keeps]
    tokens, paths = torch.randn(4, 5), torch.eye(4)[None]

    def of(number):
        heads = (head[None] for head in maps[number])
        return with_shortcut(heads) if shortcut else heads

    for number in (3, 2, 1):
        paths = paths_behind(paths, of(number), torch.tensor(keeps[number - 1]))
    found = token_scores(paths, of(0), tokens[None])[0]
    torch.testing.assert_close(found, slow_scores(maps, masks, tokens, shortcut))


def test_attention_maps_are_what_the_attention_does():
    case = build_case("timm-vit")
    view = view_of(case)
    [site, _], *_ = view.token_blocks()
    tokens, block = torch.randn(2, 17, 32), case.model.blocks[0]
    maps = torch.stack(list(view.attention_maps(site, tokens)), dim=1)
    q, k, v = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(maps, (q @ k.mT / 4).softmax(-1))
    torch.testing.assert_close(block.attn.proj((maps @ v).transpose(1, 2).flatten(2)), block.attn(block.norm1(tokens)))


def test_a_tolerance_gives_the_fewest_tokens_with_which_the_next_block_is_within_it():
    case, tolerance = deep(), 0.02
    student, report = search(case, options={"tolerance": tolerance, "step": 1})
    kept = {edit.site.block: edit.keep for edit in report.plan.edits}
    masks = [kept.get(f"blocks.{number}", EVERY) for number in range(4)]
    assert masks[-1] == (0,)
    for wider, narrower in itertools.pairwise(masks):
        assert wider == tuple(sorted(wider)) and set(narrower) <= set(wider)
    images = torch.cat(case.batches)
    dense = block_outputs(case.model, images)
    for number in range(3):
        keep, block = list(masks[number + 1]), case.model.blocks[number + 1]
        found = block(dense[number][:, list(masks[number])])
        found = found[:, [masks[number].index(position) for position in keep]]
        wanted = dense[number + 1][:, keep].flatten(0, 1)
        error = (found.flatten(0, 1) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
        assert error <= tolerance
    assert [each.shape[1] for each in block_outputs(student, images)] == [len(mask) for mask in masks]


def test_a_larger_tolerance_keeps_fewer_and_a_budget_is_used_up():
    case = deep()
    totals = []
    for tolerance in (1e-4, 0.02, 0.5):
        _, report = search(case, options={"tolerance": tolerance, "step": 1})
        totals.append(sum(len(edit.keep) - 17 for edit in report.plan.edits))
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]
    _, report = search(case, keep_ratio=0.5)
    assert sum(len(edit.keep) - 1 for edit in report.plan.edits) + 16 * (4 - len(report.plan.edits)) == 4 * 16 // 2
    assert "Errors compare the CLS token alone." in report.notes[-1]


def test_patches_that_stay_are_compared_with_the_same_patches():
    case = deep()
    student, report = search(case, keep_ratio=0.5, options={"num_last": 3})
    mine, theirs = (features(model, case.batches[0]) for model in (student, case.model))
    kept = report.plan.edits[-1].keep
    assert mine.token_positions == tuple(position - 1 for position in kept[1:]) and len(kept) == 4
    assert mine.patches_BND.shape[1] == 3
    like = same_patches(theirs, mine)
    assert torch.equal(like.patches_BND, theirs.patches_BND[:, list(mine.token_positions)])
    found = fidelity(student, case.model, case.batches)
    assert found["patches_relative_error"] > 0
    rows = block_fidelity(student, case.model, case.batches, [f"blocks.{number}" for number in range(4)])
    assert rows[-1]["relative_error"] > rows[0]["relative_error"]
    other = slim(case, (0, 15, 16))
    with pytest.raises(ModelError, match="keeps patches that the other one has not"):
        fidelity(student, other, case.batches)


@pytest.mark.parametrize("method", ["patch-slimming", "tome"])
def test_registers_shift_no_patch_where_a_run_is_judged(method):
    case = deep(reg_tokens=4)
    student, _ = search(case, method=method, keep_ratio=0.5)
    images = case.batches[0]
    direct, wrapped = features(student, images), read_features(FeatureModel(student, "final").eval(), images, "final")
    assert wrapped.token_positions == direct.token_positions
    judged = [(batch, features_on_cpu(case.model, batch, "final")) for batch in case.batches]
    errors = [relative_error(model, judged, "final") for model in (student, FeatureModel(student, "final"))]
    assert errors[0] == errors[1] > 0


def test_other_sizes_and_masks_are_refused_in_a_line():
    case = case_of(timm_vit(depth=2, dynamic_img_size=True))
    student = slim(case, (0, 1))
    with pytest.raises(ModelError, match=r"chosen among 17 and these images have 26; use images of the size"):
        student(torch.randn(1, 3, 40, 40))
    with pytest.raises(ModelError, match="takes no mask and no rotary positions"):
        student.blocks[1](torch.randn(1, 17, 32), torch.ones(17, 17))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: timm_vit(class_token=False, global_pool="avg"), SiteNotFoundError, "has no CLS token"),
        (lambda: hf("Bert", **HF_TEXT), SiteNotFoundError, "has no CLS token"),
        (lambda: timm.create_model("vit_huge_plus_patch16_dinov3", patch_size=8, num_classes=0, **SIZE),
         SiteNotFoundError, r"blocks\.0: is no block around one plain attention"),
        (lambda: timm_vit(global_pool="avg"), BudgetError, r"options\.num_last: this model pools patches"),
    ],
)  # fmt: skip
def test_models_without_a_token_to_judge_by_are_refused(model, error, words):
    case = case_of(model())
    if "Bert" in type(case.model).__name__:
        case = Case(name="bert", model=case.model, sites=case.sites, batches=[torch.randint(20, (3, 7))])
    with pytest.raises(error, match=words):
        search(case, keep_ratio=0.5)


def test_a_mean_over_patches_is_that_of_the_kept_ones_and_said(run):
    case = case_of(timm_vit(global_pool="avg"))
    student, report = search(case, keep_ratio=0.6, options={"num_last": 2})
    assert "the mean of the kept patches" in report.notes[-1]
    tokens = student.forward_features(case.batches[0])
    assert tokens.shape[1] == 3
    torch.testing.assert_close(run(student, case.batches[0]), student.forward_head(tokens))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"keep_ratio": 0.1, "options": {"num_last": 9}}, "num_last alone keeps 0.562 of all patches"),
        ({"keep_ratio": 0.5, "options": {"num_last": 40}}, "40 of 16 patches"),
    ],
)
def test_budgets_that_cant_be_met_are_refused(values, words):
    with pytest.raises(BudgetError, match=words):
        search(deep(), **values)


def test_tokens_that_are_not_there_are_refused():
    case = build_case("timm-vit")
    [site, _], *_ = view_of(case).token_blocks()
    for keep, among in (((0, 5), (0, 1)), ((2, 1), EVERY), ((), EVERY)):
        with pytest.raises(
            BudgetError, match=r"blocks\.0: keep some of the .* tokens that come in, in order, each once"
        ):
            apply_(case.copy(), [KeepTokens(site=site, keep=keep, among=among)])
    swin = build_case("timm-swin")
    inner = next(find_attentions(swin.model))
    inner = type(inner)(**{**inner.__dict__, "block": "layers.0"})
    with pytest.raises(SiteNotFoundError, match=r"layers\.0: is no block of norm, attention"):
        apply_(swin.copy(), [KeepTokens(site=inner, keep=(0,), among=(0, 1))])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"blockwise": {"inputs": "teacher"}}, r"blockwise\.inputs: patch-slimming keeps some tokens"),
        ({"recover": {"steps": 2, "elastic": [1, 2]}}, r"recover\.elastic: fits widths on all tokens"),
        ({"steps": [{"method": "patch-slimming"}, {"method": "dgmr"}]}, "dgmr .* can't follow patch-slimming"),
    ],
)
def test_recipes_that_need_all_tokens_are_refused(values, words):
    base = {} if "steps" in values else {"method": "patch-slimming"}
    with pytest.raises(RecipeError, match=words):
        Recipe.parse({**base, **values})


def test_width_and_tokens_go_together_and_low_rank_behind_them(run):
    case = deep()
    steps = [
        {"method": "dgmr", "keep_ratio": 0.5, "exact": True, "repair": False, "options": {"parts": "both"}},
        {"method": "patch-slimming", "keep_ratio": 0.5},
        {"method": "low-rank", "keep_ratio": 0.5},
    ]
    student = case.copy()
    report = cut_(student, case.model, case.sites, Recipe.parse({"steps": steps}), case.batches, quiet=True)
    assert {type(edit) for edit in report.plan.edits} >= {KeepUnits, KeepTokens}
    block = next(module for module in student.modules() if isinstance(module, KeptTokens))
    assert block.attn.q.weight.shape[0] == block.attn.v.weight.shape[0] == 16  # heads of 8 dimensions
    assert run(student, case.batches[0]).isfinite().all()


def test_trained_block_by_block_and_as_a_whole_then_saved_and_loaded(tmp_path):
    case = deep()
    images = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recipe = {
        "method": "patch-slimming",
        "macs_ratio": 0.6,
        "exact": True,
        "options": {"num_last": 2},
        "blockwise": {"num_images": 24, "steps": 20, "batch_size": 8, "train": "block"},
        "at_once": {"steps": 20, "batch_size": 8, "num_validations": 2},
        "recover": {"steps": 4, "batch_size": 4},
    }
    result = vitrim.compress(case.model, data=images, recipe=recipe, out=tmp_path / "out", quiet=True)
    metrics = result.metrics
    assert 0.5 < metrics.after.macs / metrics.before.macs <= 0.6
    assert all(row["after"] <= row["before"] for row in metrics.blockwise["errors"].values())
    assert any(row["after"] < row["before"] for row in metrics.blockwise["errors"].values())
    assert metrics.at_once["best_error"] < metrics.at_once["curve"][0]["relative_error"]
    assert metrics.after_recovery.relative_error <= metrics.after_cut.relative_error
    again = vitrim.load(tmp_path / "out", model=case.copy())
    assert torch.equal(again(images[:4]), result.model(images[:4]))
    kept = {path: module.kept_tokens for path, module in result.model.named_modules() if isinstance(module, KeptTokens)}
    assert kept and all(index.dtype == torch.int64 for index in kept.values())


def test_the_method_says_what_it_goes_by():
    assert PatchSlimming().goes_by() == "share" and PatchSlimming(tolerance=0.01).goes_by() == "nothing"
