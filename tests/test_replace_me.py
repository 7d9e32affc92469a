"""ReplaceMe and the edit that takes blocks out, against slow versions, and loaded again by the libraries alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

import vitrim
from tests.support.models import HF_IMAGE, HF_TEXT, SIZE, Case, Residual, Tower, c_fc, hf, timm_vit
from vitrim.calibrate import LiveModelView
from vitrim.calibrate.runs import find_runs, with_edits
from vitrim.compression.cut import cut_
from vitrim.config.recipe import Recipe
from vitrim.errors import BudgetError, RecipeError, SiteNotFoundError
from vitrim.methods import ReplaceMe
from vitrim.models.features import features
from vitrim.models.load import origin_of
from vitrim.models.sites import find_mlps
from vitrim.models.stock import stock_origin, why_not_stock
from vitrim.surgery import DropBlocks, KeepUnits, Plan, apply_, reshape_, submodule
from vitrim.types import BlockRun

SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "num_heads": (2, 2), "num_classes": 5}
BUILDS = {
    "vit": lambda: timm_vit(depth=5, init_values=0.1),
    "bert": lambda: hf("Bert", **{**HF_TEXT, "num_hidden_layers": 5}),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 5), **SWIN),
}


def case_of(name: str, *, num_batches: int = 5) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BUILDS[name]().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        texts = name == "bert"
        batches = [torch.randint(20, (6, 12)) if texts else torch.randn(6, 3, 32, 32) for _ in range(num_batches)]
    return Case(name=name, model=model, sites=find_mlps(model), batches=batches)


def view_of(case: Case, model: nn.Module | None = None) -> LiveModelView:
    widths = {site.path: site.d_hidden for site in case.sites}
    return LiveModelView(model or case.copy(), case.sites, widths, case.batches, seed=0)


def watched(model: nn.Module, paths, batches) -> dict[str, list[Tensor]]:
    """First input and output of modules over all batches, tokens stacked, in float64."""
    seen = {path: ([], []) for path in paths}

    def see(path: str, args, out) -> None:
        for kept, each in zip(seen[path], (args[0], out if isinstance(out, Tensor) else out[0]), strict=True):
            kept.append(each.flatten(0, -2).double())

    handles = [
        submodule(model, path).register_forward_hook(lambda _, args, out, path=path: see(path, args, out))
        for path in paths
    ]
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {path: [torch.cat(kept).clone() for kept in both] for path, both in seen.items()}


def output(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.inference_mode():
        found = model(batch)
    return found if isinstance(found, Tensor) else found.last_hidden_state


def slow_map(case: Case, run: BlockRun) -> tuple[Tensor, Tensor]:
    """T and t of the paper's least squares, by lstsq on all tokens that are not held out."""
    seen = watched(
        case.model, [run.before, run.last, run.output, *filter(None, [run.norm, run.last_norm])], case.batches[:-1]
    )
    own = seen[run.output][1]
    if run.norm:
        stream, last = seen[run.norm][0], seen[run.last_norm][0]
        stand = torch.nn.functional.layer_norm(last, last.shape[-1:], eps=1e-12)
        goal = stand * stream.std(1, correction=0, keepdim=True) + stream.mean(1, keepdim=True)
    else:
        stream, goal = seen[run.before][1], seen[run.last][1]
    scale = case.model.blocks[run.start - 1].ls2.gamma.double() if case.name == "vit" else 1
    columns = torch.cat([own, torch.ones(len(own), 1).double()], dim=1)
    solved = torch.linalg.lstsq(columns, own + (goal - stream) / scale).solution
    return solved[:-1].T, solved[-1]


@pytest.mark.parametrize("name", ["vit", "bert", "swin"])
def test_the_map_is_plain_least_squares_and_folds_exactly(name):
    """The folded model equals the uncut one with the map put in by hand and the run's blocks passed by."""
    case = case_of(name)
    [edit] = ReplaceMe(num_blocks=len(case.sites) - 2, ridge=1e-12, fit="output").propose(view_of(case))
    run = edit.run
    matrix, shift = (found.detach() for found in slow_map(case, run))
    layer = submodule(case.model, run.output)
    weight, bias = (tensor.detach().double() for tensor in (layer.weight, layer.bias))
    expected = (matrix @ weight).float(), (matrix @ bias + shift).float()
    for found, wanted in zip(edit.tensors.values(), expected, strict=False):
        torch.testing.assert_close(found.float(), wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3)
    by_hand, student = case.copy(), case.copy()
    submodule(by_hand, run.output).register_forward_hook(lambda _, args, out: out @ matrix.float().T + shift.float())
    if run.norm:
        submodule(by_hand, run.norm).load_state_dict(submodule(by_hand, run.last_norm).state_dict())
    for index in range(run.start, run.stop):
        submodule(by_hand, run.block(index)).register_forward_hook(lambda _, args, out: args[0])
    apply_(student, [edit])
    wanted = output(by_hand, case.batches[0])
    torch.testing.assert_close(output(student, case.batches[0]), wanted, atol=2e-3 * float(wanted.abs().max()), rtol=0)


def test_the_run_is_the_best_of_all_on_held_out_images():
    case = case_of("vit")
    [edit] = ReplaceMe(num_blocks=3, ridge=1e-4, fit="output").propose(view_of(case))
    runs = view_of(case).runs(2)
    assert [run.start for run in runs] == [1, 2, 3]
    errors = {}
    for run in runs:
        shorter = case.copy()
        one = ReplaceMe(num_blocks=3, ridge=1e-4, fit="output")
        view = view_of(case)
        view.runs = lambda length, run=run: [run]
        apply_(shorter, list(one.propose(view)))
        with torch.inference_mode():
            mine, theirs = (features(model, case.batches[-1]) for model in (shorter, case.model))
        error = spread = 0.0
        for kind in ("pooled_BD", "patches_BND"):
            wanted = getattr(theirs, kind).flatten(0, -2)
            error += float((getattr(mine, kind).flatten(0, -2) - wanted).square().sum())
            spread += float((wanted - wanted.mean(0)).square().sum())
        errors[run.start] = error / spread
    assert edit.run.start == min(errors, key=errors.__getitem__)
    [(_, measured)] = view_of(case).tried([edit])
    assert measured == pytest.approx(errors[edit.run.start], rel=1e-3)


def test_the_papers_choice_is_the_nearest_by_cosine():
    case = case_of("vit")
    [edit] = ReplaceMe(num_blocks=3, select_on="cosine").propose(view_of(case))
    seen = watched(case.model, [f"blocks.{i}" for i in range(5)], case.batches)
    near = {
        start: float(torch.cosine_similarity(seen[f"blocks.{start - 1}"][1], seen[f"blocks.{start + 1}"][1]).mean())
        for start in (1, 2, 3)
    }
    assert edit.run.start == max(near, key=near.__getitem__)


def test_the_map_helps_and_new_weights_for_the_hidden_units_fit_at_least_as_well():
    case = case_of("vit", num_batches=12)
    errors = {}
    for name, options in {
        "plain": {"compensate": False},
        "map": {"fit": "output"},
        "hidden": {"fit": "hidden"},
        "better": {},
    }.items():
        student = case.copy()
        report = cut_(
            student,
            case.model,
            case.sites,
            Recipe(method="replace-me", options={"num_blocks": 4, **options}),
            case.batches,
            quiet=True,
        )
        wanted = output(case.model, case.batches[0])
        errors[name] = float((output(student, case.batches[0]) - wanted).square().sum())
        assert len(student.blocks) == 4 and "taken out" in report.notes[0]
    assert errors["map"] < 0.8 * errors["plain"] and errors["hidden"] < 1.05 * errors["map"]
    assert errors["better"] in (errors["map"], errors["hidden"])


@pytest.mark.parametrize("options", [{}, {"num_blocks": 5}])
def test_where_all_blocks_stay_nothing_changes(options):
    case = case_of("vit")
    student = case.copy()
    budget = {} if options else {"keep_ratio": 1.0}
    report = cut_(
        student,
        case.model,
        case.sites,
        Recipe(method="replace-me", options=options, **budget),
        case.batches,
        quiet=True,
    )
    assert report.plan.edits == () and "all 5 blocks stay" in report.notes[0]
    pairs = zip(student.state_dict().values(), case.model.state_dict().values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def edit_of(case: Case, start: int, length: int) -> DropBlocks:
    run = next(run for run in view_of(case).runs(length) if run.start == start)
    return DropBlocks(run=run)


def test_blocks_behind_the_run_get_lower_numbers_and_keep_their_values():
    case = case_of("vit")
    edit, student = edit_of(case, 1, 2), case.copy()
    apply_(student, [edit])
    assert [edit.new_path(f"blocks.{i}.mlp") for i in range(5)] == [
        "blocks.0.mlp",
        None,
        None,
        "blocks.1.mlp",
        "blocks.2.mlp",
    ]
    assert edit.new_path("norm") == "norm" and edit.new_path("blocks") == "blocks"
    for old, new in ((0, 0), (3, 1), (4, 2)):
        mine, theirs = student.blocks[new].state_dict(), case.model.blocks[old].state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert Plan(edits=(edit,), method="x").new_path("blocks.4") == "blocks.2"
    assert edit.describe() == "blocks 1 to 2 of 5 taken out"
    inner = nn.ModuleDict({"visual": case.copy()})
    apply_(inner, [edit.below("visual")])
    assert torch.equal(output(inner["visual"], case.batches[0]), output(student, case.batches[0]))


def test_widths_and_depth_go_together_in_either_order_and_the_plan_replays():
    case = case_of("vit")
    steps = [
        {"method": "dgmr", "keep_ratio": 0.5, "repair": {"refit": False}},
        {"method": "replace-me", "options": {"num_blocks": 3}},
    ]
    for order in (steps, steps[::-1]):
        student = case.copy()
        report = cut_(student, case.model, case.sites, Recipe(steps=order), case.batches, quiet=True)
        assert len(student.blocks) == 3 and all(block.mlp.fc1.out_features == 48 for block in student.blocks)
        again = Plan.from_json(json.loads(json.dumps(report.plan.to_json())))
        assert again == report.plan.without_tensors()
        edits = [replace(read, tensors=made.tensors) for read, made in zip(again.edits, report.plan.edits, strict=True)]
        replayed, empty = case.copy(), case.copy()
        apply_(replayed, edits)
        assert torch.equal(output(replayed, case.batches[0]), output(student, case.batches[0]))
        reshape_(empty, [edit.shape_only() for edit in report.plan.edits])
        assert empty.state_dict().keys() == student.state_dict().keys()
    # After the depth, each MLP is repaired against the model as it was then: none ends worse than before its repair.
    assert all(error["repaired"] <= error["unrepaired"] for error in report.errors.values())


@pytest.mark.parametrize(
    ("start", "length", "error", "words"),
    [(0, 1, BudgetError, "use 1..4, the first block stays"), (4, 2, BudgetError, "use 1..4")],
)
def test_what_can_not_be_taken_out_is_refused(start, length, error, words):
    case = case_of("vit")
    good = edit_of(case, 1, 1).run
    with pytest.raises(error, match=words):
        apply_(case.copy(), [DropBlocks(run=replace(good, start=start, length=length))])
    with pytest.raises(SiteNotFoundError, match="no list of 7 blocks"):
        apply_(case.copy(), [DropBlocks(run=replace(good, total=7))])
    with pytest.raises(BudgetError, match=r"options.num_blocks: 9 are to stay of 5 blocks; use 1..5"):
        list(ReplaceMe(num_blocks=9).propose(view_of(case)))


class ReadsInside(Tower):
    """Adds what block 1 put out to the end, by its number."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        outputs = []
        for layer in self.layers:
            tokens = layer(tokens)
            outputs.append(tokens)
        return (tokens + outputs[1]).mean(1)


def test_models_that_count_their_blocks_elsewhere_are_found_out():
    inside = ReadsInside(*(Residual(c_fc(), 16) for _ in range(4))).eval()
    mixed = timm.create_model(
        "vit_small_patch16_rope_mixed_224", patch_size=8, num_classes=0, **{**SIZE, "depth": 4}
    ).eval()
    with torch.no_grad():
        for p in mixed.parameters():  # fresh weights are so small that it shows nowhere which rotation a block gets
            p.add_(0.1 * torch.randn_like(p))
    for model, possible in ((inside, [2, 3]), (mixed, [3])):
        notes: list[str] = []
        runs = find_runs(model, find_mlps(model), 1, torch.randn(2, 3, 32, 32), notes.append)
        assert [run.start for run in runs] == possible
        assert "does not do what it does past them" in notes[0]


def test_a_branch_behind_a_norm_is_refused_in_one_line():
    model = timm.create_model("swinv2_tiny_window8_256", depths=(1, 3), **{**SWIN, "num_heads": (4, 4)}).eval()
    with pytest.raises(
        BudgetError, match=r"^SwinTransformerV2: no run of 1 blocks can be taken out \(layers.1.blocks.0: .*"
    ):
        list(
            ReplaceMe(num_blocks=3).propose(
                LiveModelView(model, find_mlps(model), {}, [torch.randn(2, 3, 32, 32)], seed=0)
            )
        )


def test_blockwise_is_refused_beforehand():
    with pytest.raises(RecipeError, match="blockwise: replace-me takes blocks out"):
        Recipe.parse({"method": "replace-me", "blockwise": {}})


def test_trying_an_edit_changes_nothing_and_copies_no_weights():
    case = case_of("vit")
    model, edit = case.copy(), edit_of(case, 2, 1)
    shorter = with_edits(model, [edit])
    assert len(model.blocks) == 5 and len(shorter.blocks) == 4
    assert shorter.blocks[2].mlp.fc1.weight.data_ptr() == model.blocks[3].mlp.fc1.weight.data_ptr()


@pytest.mark.fresh
def test_a_shorter_timm_model_is_stock(tmp_path):
    case = case_of("vit")
    model = timm.create_model("vit_tiny_patch16_224", **{**SIZE, "depth": 5, "patch_size": 8, "num_classes": 5})
    model.load_state_dict(timm_state(case.model), strict=False)
    result = vitrim.compress(
        model,
        data=torch.cat(case.batches),
        method="replace-me",
        options={"num_blocks": 3},
        out=tmp_path / "small",
        quiet=True,
    )
    assert result.metrics.stock and len(result.metrics.after_cut.blocks) == 3
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert len(loaded.blocks) == 3
    torch.testing.assert_close(output(loaded, case.batches[0]), output(result.model, case.batches[0]))
    again = vitrim.load(tmp_path / "small")
    torch.testing.assert_close(output(again, case.batches[0]), output(result.model, case.batches[0]))


def timm_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "ls" not in name and "fc1" not in name and "fc2" not in name
    }


@pytest.mark.parametrize("named", ["Bert", "Dinov2"])
def test_a_shorter_transformers_model_is_stock(named, tmp_path):
    import transformers

    sizes = {"Bert": {**HF_TEXT, "intermediate_size": 48}, "Dinov2": {**HF_IMAGE, "mlp_ratio": 2}}[named]
    model = hf(named, **{**sizes, "num_hidden_layers": 4}).eval()
    data = [torch.randint(20, (4, 12)) if named == "Bert" else torch.randn(4, 3, 32, 32) for _ in range(3)]
    result = vitrim.compress(
        model, data=torch.cat(data), method="replace-me", keep_ratio=0.5, exact=True, out=tmp_path / "small", quiet=True
    )
    assert result.metrics.stock and result.model.config.num_hidden_layers == 2
    loaded = getattr(transformers, f"{named}Model").from_pretrained(tmp_path / "small").eval()
    assert len(loaded.encoder.layer) == 2
    torch.testing.assert_close(output(loaded, data[0]), output(result.model, data[0]), atol=1e-5, rtol=1e-4)


def test_what_leaves_a_swin_with_the_wrong_windows_is_not_stock():
    """Every second block has shifted windows: without one in the middle the others are not those of a shorter Swin."""
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(5, 1), **SWIN).eval()
    origin = origin_of(model)
    for length, stock in ((1, {4}), (2, {1, 2, 3})):
        edits = [
            DropBlocks(run=run) for run in find_runs(model, find_mlps(model), length, torch.randn(2, 3, 32, 32), print)
        ]
        assert [edit.run.start for edit in edits] == list(range(1, 6 - length))
        found = {edit.run.start: stock_origin(origin, [edit]) for edit in edits}
        assert {start for start, known in found.items() if known is not None} == stock
        assert all(known is None or known.model_args["depths"] == [5 - length, 1] for known in found.values())
    assert why_not_stock(origin, [replace(edits[0], run=replace(edits[0].run, length=1))]) == (
        "timm has no config for blocks 1 to 1 of 5 taken out; the result loads with vitrim.load(path)."
    )


def test_a_budget_of_parameters_is_met_by_whole_blocks():
    model = timm_vit(depth=6)
    images = torch.randn(24, 3, 32, 32)
    result = vitrim.compress(model, data=images, method="replace-me", params_ratio=0.6, quiet=True)
    assert len(result.model.blocks) == 3
    assert result.metrics.after.parameters <= 0.6 * result.metrics.before.parameters
    # Of 6 blocks in two stages no run of 5 can go, which is where the search would begin.
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 5), **SWIN)
    result = vitrim.compress(swin, data=images, method="replace-me", params_ratio=0.7, quiet=True)
    assert len(result.model.layers[1].blocks) == 3


def test_cuts_of_dropped_blocks_are_gone_from_what_is_stock():
    """Widths, then depth, of a model whose library can say both."""
    images = torch.randn(40, 3, 32, 32)
    model = timm.create_model("vit_tiny_patch16_224", **{**SIZE, "depth": 4, "patch_size": 8, "num_classes": 5})
    steps = [{"method": "magnitude", "mlp_ratio": 2}, {"method": "replace-me", "options": {"num_blocks": 2}}]
    result = vitrim.compress(model, data=images, recipe={"steps": steps}, quiet=True)
    assert result.metrics.stock and sum(isinstance(edit, KeepUnits) for edit in result.plan.edits) == 4
