"""Text tuning: the loss and its gradient, what is trained and what is not, and pairs that come back from a folder."""

import copy
import os
import signal

import pytest
import torch
from torch.nn.functional import normalize

import vitrim
import vitrim.recover.run as run_module
from tests.support.pairs import KINDS, NAMES, pictures, write_pair
from tests.support.processes import run_python
from tests.support.text_tuning import QUICK, captioned, opened, state_of, tuned
from vitrim.clip import text_tower
from vitrim.clip.contrastive import contrastive_loss
from vitrim.clip.embedded_pairs import embed_pairs
from vitrim.clip.embedding_space import embedding_space_of
from vitrim.clip.tasks import retrieval, tune_text, zero_shot
from vitrim.clip.text_tower import TextOptions, tune_text_
from vitrim.config.options import RecoverOptions
from vitrim.config.run_context import RunContext
from vitrim.data import open_pairs
from vitrim.errors import DataError, Interrupted, OutputError, RecipeError
from vitrim.models.features import features
from vitrim.models.towers import embed_images
from vitrim.output.load import read_about
from vitrim.recover.losses import EmbeddingSpace, feature_loss, space_loss
from vitrim.tokens import Features

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

FEW = {"repair": {"refit": False}, "calibrate": {"batch_size": 16}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {kind: write_pair(kind, root / kind) for kind in KINDS}


# The loss


def vectors(num, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(num, width, generator=generator), dim=1) for _ in range(2)]


def test_the_losses_are_those_of_the_libraries():
    images, texts = vectors(9)
    clip = open_clip.ClipLoss()(images, texts, torch.tensor(7.0))
    torch.testing.assert_close(contrastive_loss(images, texts, 7.0), clip)
    siglip = open_clip.loss.SigLipLoss()(images, texts, torch.tensor(7.0), torch.tensor(-2.0))
    torch.testing.assert_close(contrastive_loss(images, texts, 7.0, -2.0), siglip)


@pytest.mark.parametrize("bias", [None, -2.0])
def test_the_mean_of_the_parts_is_the_loss_of_the_whole(bias):
    images, texts = vectors(8)
    parts = [contrastive_loss(images, texts, 5.0, bias, own=slice(i, i + 2)) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), contrastive_loss(images, texts, 5.0, bias))


PROCESS = """
import sys
import torch
from tests.support.text_tuning import state_of, tuned
from vitrim.distributed.processes import is_main, join_, num_processes
torch.set_num_threads(1)
join_("cpu")
gradients = []
class Watched(torch.optim.AdamW):
    def step(self, closure=None):
        gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return super().step(closure)
torch.optim.AdamW = Watched
found = []
for folder in sys.argv[2:]:
    pair, result = tuned(folder, options={"steps": 4, "lr": 1e-5})
    found.append([num_processes(), list(gradients), result.curve, state_of(pair.model)])
    gradients.clear()
torch.save(found, sys.argv[1]) if is_main() else None
"""


def test_two_processes_have_the_gradient_of_one_with_the_joint_batch(folders, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROCESS)
    runs = []
    for number, processes in enumerate((None, 2)):
        out = tmp_path / f"{number}.pt"
        done = run_python(script, out, folders["open_clip"], folders["siglip"], processes=processes)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append(torch.load(out, weights_only=True))
    for (one, alone, curve, state), (two, together, other_curve, other_state) in zip(*runs, strict=True):
        assert (one, two) == (1, 2) and len(alone) == len(together) == 4
        assert max(float(gradient.abs().max()) for gradient in alone[0]) > 1e-2
        for step, (mine, theirs) in enumerate(zip(alone, together, strict=True)):
            for first, second in zip(mine, theirs, strict=True):  # Adam's first steps make signs of rounding errors
                torch.testing.assert_close(first, second, atol=1e-5 if step == 0 else 1e-4, rtol=0)
        losses = [[point["held_out_loss"] for point in points] for points in (curve, other_curve)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, other_state[name], atol=1e-4, rtol=0)


# Tuning


@pytest.mark.parametrize("layout", KINDS[:2] + KINDS[3:])
def test_only_the_text_tower_changes_and_held_out_pairs_fit_better(folders, layout):
    before = state_of(opened(folders[layout]).model)
    pair, result = tuned(folders[layout], options={"steps": 30})
    after = pair.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= pair.text_parameters().keys()
    assert not any(name.startswith(("visual", "vision_model", "logit")) for name in changed)
    assert {name.split(".")[0] for name in changed} >= ({"text_model"} if "open" not in layout else set())
    losses = [point["held_out_loss"] for point in result.curve]
    assert result.best_loss == min(losses) < losses[0] and result.num_steps == 30
    assert all(p.grad is None and p.requires_grad for p in pair.model.parameters())
    assert not pair.model.training


def test_the_held_out_loss_is_that_of_the_state_that_comes_back(folders):
    pair, result = tuned(folders["clip"], options={"batch_size": 32})
    _, held_out = embed_pairs(pair, open_pairs(captioned(40))).split(8, seed=0)
    images, ids = held_out.drawn(torch.arange(8), torch.Generator().manual_seed(0))
    with torch.no_grad():
        texts = normalize(pair.embed_texts(ids), dim=1)
        again = contrastive_loss(images, texts, pair.model.logit_scale.exp())
    assert float(again) == pytest.approx(result.best_loss, abs=1e-5)


def test_tuning_never_returns_worse_than_the_start(folders, monkeypatch):
    """From a state that fits its pairs, steps that go up their loss instead of down."""
    pair, real = opened(folders["open_clip"]), text_tower.contrastive_loss
    pairs, options = embed_pairs(pair, open_pairs(captioned(16))), TextOptions(**{**QUICK, "steps": 40})
    before = tune_text_(pair, pairs, held_out=pairs, options=options, context=RunContext(quiet=True))
    start = state_of(pair.model)
    monkeypatch.setattr(
        text_tower, "contrastive_loss", lambda *args, own=None: real(*args) * (1.0 if own is None else -1.0)
    )
    result = tune_text_(pair, pairs, held_out=pairs, options=options, context=RunContext(quiet=True))
    assert result.best_step == 0 and result.best_loss == pytest.approx(before.best_loss)
    assert result.curve[-1]["held_out_loss"] > 1.5 * result.best_loss
    assert all(torch.equal(start[name], tensor) for name, tensor in pair.model.state_dict().items())


def test_a_loss_that_is_no_number_ends_with_the_best_state(folders, monkeypatch):
    real, calls = text_tower.contrastive_loss, []

    def bad(*args, own=None, **kwargs):
        calls.append(own)
        return real(*args, **kwargs) * (float("nan") if sum(o is not None for o in calls) > 7 and own else 1.0)

    monkeypatch.setattr(text_tower, "contrastive_loss", bad)
    _, result = tuned(folders["clip"])
    assert result.notes == ["loss nan at step 8: tuning ended there with its best state; give a lower lr."]
    assert result.best_step == 6 and [point["step"] for point in result.curve] == [0, 3, 6]


def test_the_published_schedule_of_text_tuning_is_the_papers():
    found = TextOptions(schedule="published")
    assert (found.epochs, found.batch_size, found.lr, found.min_lr) == (20, 320, 1e-6, 1e-7)
    assert found.weight_decay == (0.04, 0.2)
    short = TextOptions(schedule="published", steps=3, lr=1e-4)
    assert (short.epochs, short.steps, short.lr, short.min_lr) == (None, 3, 1e-4, 1e-7)
    with pytest.raises(RecipeError, match="min_lr"):
        TextOptions(steps=1, lr=1e-6, min_lr=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(folders, tmp_path, monkeypatch):
    whole, expected = tuned(folders["open_clip"])
    real = text_tower._Run.validate

    def interrupt(self, loss):
        found = real(self, loss)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(text_tower._Run, "validate", interrupt)
    with pytest.raises(Interrupted, match=r"text tuning stopped at step [67] of 12; continue with --resume"):
        tuned(folders["open_clip"], work=tmp_path)
    monkeypatch.undo()
    again, result = tuned(folders["open_clip"], work=tmp_path, resume=True)
    assert result.curve == expected.curve and result.best_step == expected.best_step
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items())


def test_every_epoch_takes_each_image_once_with_captions_drawn_anew(folders):
    pair = opened(folders["clip"])
    pairs = embed_pairs(pair, open_pairs(captioned(9)))
    assert len(pairs.ids_ML) == 13 and pairs.first_N.tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13]
    seen = set()
    for epoch in range(20):
        images, ids = pairs.drawn(torch.arange(9), torch.Generator().manual_seed(epoch))
        assert torch.equal(images, pairs.images_NE)
        for row in range(9):
            own = pairs.ids_ML[pairs.first_N[row] : pairs.first_N[row + 1]].tolist()
            seen.add((row, own.index(ids[row].tolist())))
    assert len(seen) == 13
    rest, held = pairs.split(3, seed=1)
    assert (len(rest), len(held)) == (6, 3) and len(rest.ids_ML) + len(held.ids_ML) == 13
    with torch.no_grad():
        torch.testing.assert_close(pairs.images_NE, normalize(embed_images(pair.model, pictures(9)), dim=1))


def test_bf16_is_close_to_float32(folders):
    results = [
        tuned(folders["open_clip"], options={"precision": precision, "lr": 3e-4})[1] for precision in ("fp32", "bf16")
    ]
    last = [result.curve[-1]["held_out_loss"] for result in results]
    assert last[0] != last[1] and last[0] == pytest.approx(last[1], rel=0.05)


# From folder to folder


@pytest.mark.parametrize("layout", ["open_clip", "open_clip-timm", "clip", "siglip"])
def test_a_cut_pair_is_tuned_exported_and_loaded_by_its_own_library(folders, tmp_path, layout):
    size = 160 if layout == "open_clip-timm" else 32
    recipe = vitrim.Recipe.parse(FEW)
    small = vitrim.compress(
        str(folders[layout]),
        data=list(pictures(24, size)),
        recipe=recipe,
        mlp_ratio=1,
        out=tmp_path / "small",
        quiet=True,
    )
    data = captioned(24, size)
    options = {"steps": 4, "batch_size": 8, "lr": 1e-3}
    found = tune_text(str(small.out), data, options=options, held_out=data[:8], out=tmp_path / "tuned", quiet=True)
    about, before = (read_about(folder)["plan"]["edits"] for folder in (found.out, small.out))
    assert [edit["keep"] for edit in about] == [edit["keep"] for edit in before]
    assert found.metrics.stock and found.metrics.reload_difference <= 1e-5
    if layout.startswith("open_clip"):
        stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{found.out}")
    else:
        stock = getattr(transformers, type(found.model).__name__).from_pretrained(found.out)
    stock, own = stock.eval(), vitrim.load(found.out)
    narrow, wide = (sum(p.numel() for p in m.parameters()) for m in (stock, opened(folders[layout]).model))
    assert narrow < wide
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor) and torch.equal(own.state_dict()[name], tensor)
        assert name.startswith(("visual", "vision", "logit")) <= torch.equal(tensor, small.model.state_dict()[name])
    scores = [retrieval(str(folder), data, quiet=True) for folder in (small.out, found.out)]
    assert scores[0] != scores[1] and scores[1] == retrieval(str(small.out), data, text_from=str(found.out), quiet=True)


def test_without_out_nothing_is_written_and_a_module_is_left_unchanged(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = transformers.CLIPModel.from_pretrained(folders["clip"]).eval()
    before = state_of(model)
    found = tune_text(model, captioned(20), options=QUICK, quiet=True)
    assert found.out is None and not list(tmp_path.iterdir())
    assert found.metrics.images == {"train": 18, "held_out": 2, "skipped": 0}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in found.model.state_dict().items())


def test_a_bf16_pair_stays_bf16(folders, tmp_path):
    transformers.CLIPModel.from_pretrained(folders["clip"], dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    found = tune_text(
        str(tmp_path / "bf16"), captioned(20), options=QUICK, quiet=True, tokenizer=opened(folders["clip"]).tokenize
    )
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"options": {"steps": 1, "epochs": 1}}, RecipeError, "text tuning: .*exactly one of steps and epochs"),
        ({"options": {"steps": 1, "rate": 1}}, RecipeError, "text tuning: rate: Extra inputs"),
        ({"pairs": captioned(1)}, DataError, "asked to hold out 1 of 1 images"),
        ({"pairs": captioned(2)}, DataError, "1 images and batches of 320 for 1 processes"),
        ({"out": "."}, OutputError, "exists already"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(folders, change, error, words):
    given = {"model": str(folders["clip"]), "pairs": captioned(20), **change}
    with pytest.raises(error, match=words) as caught:
        tune_text(given.pop("model"), given.pop("pairs"), quiet=True, **given)
    assert "\n" not in str(caught.value)


def test_a_live_open_clip_module_can_not_be_written(folders, tmp_path):
    model = open_clip.create_model(f"local-dir:{folders['open_clip']}")
    with pytest.raises(RecipeError, match="no library can build this module"):
        tune_text(model, captioned(20), out=tmp_path / "out", quiet=True)


# Recovery of a pair's image tower


def test_what_recovery_matches_is_what_the_paper_says(folders):
    """Projected pooled vector; patch tokens behind the last norm, not projected."""
    images = pictures(2)
    own = opened(folders["open_clip"]).model
    caught = []
    own.visual.ln_post.register_forward_hook(lambda module, args, output: caught.append(output))
    with torch.no_grad():
        found = features(own.visual, images)
        torch.testing.assert_close(found.pooled_BD, own.encode_image(images))
    torch.testing.assert_close(found.patches_BND, caught[0][:, 1:])
    for layout in ("clip", "siglip"):
        pair = opened(folders[layout])
        whole, origin = pair.model, pair.origin
        space = embedding_space_of(whole, origin, RecoverOptions(steps=1)) or EmbeddingSpace()
        with torch.no_grad():
            found = features(whole.vision_model, images)
            placed = space.to(torch.device("cpu")).placed(found)
            torch.testing.assert_close(placed.pooled_BD, embed_images(whole, images))
            last = whole.vision_model(pixel_values=images).last_hidden_state
        torch.testing.assert_close(placed.patches_BND, last[:, 1:] if layout == "clip" else last)
        assert (space.project is None) == (layout == "siglip")


def random_features(seed):
    generator = torch.Generator().manual_seed(seed)
    return Features(
        pooled_BD=torch.randn(3, 6, generator=generator), patches_BND=torch.randn(3, 4, 5, generator=generator)
    )


def test_the_loss_with_a_bank_is_the_sum_of_its_parts():
    mine, theirs = random_features(0), random_features(1)
    project, bank = torch.nn.Linear(6, 4, bias=False), normalize(torch.randn(7, 4), dim=1)
    space = EmbeddingSpace(project=project, bank_TE=bank, scale=3.0, weight=0.5).to(torch.device("cpu"))
    assert not any(p.requires_grad for p in space.project.parameters())
    placed = [Features(pooled_BD=project(f.pooled_BD).detach(), patches_BND=f.patches_BND) for f in (mine, theirs)]
    slow = float(feature_loss(*placed))
    for student, teacher in zip(*(f.pooled_BD for f in placed), strict=True):
        p, q = (torch.softmax(3.0 * bank @ v / v.norm(), 0).double() for v in (teacher, student))
        slow += 0.5 / 3 * float((p * (p / q).log()).sum())
    assert float(space_loss(mine, theirs, space)) == pytest.approx(slow, rel=1e-5)
    assert float(space_loss(mine, mine, space)) == pytest.approx(0, abs=1e-6)
    assert float(space_loss(mine, theirs, EmbeddingSpace())) == float(feature_loss(mine, theirs))


@pytest.mark.parametrize("layout", ["open_clip", "clip"])
def test_a_bank_of_texts_takes_part_in_every_step(folders, tmp_path, monkeypatch, layout):
    bank = tmp_path / "bank.txt"
    bank.write_text("\n\n".join(f" the {name} " for name in NAMES))
    seen, real = [], run_module.space_loss
    monkeypatch.setattr(run_module, "space_loss", lambda *args: seen.append(args[2]) or real(*args))
    options = {"steps": 5, "batch_size": 16, "lr": 1e-4, "text_bank": str(bank), "text_bank_weight": 2.0}
    recipe = vitrim.Recipe.parse({**FEW, "hidden_dim": 8, "recover": options})
    assert vitrim.Recipe.parse(recipe.model_dump(mode="json")) == recipe
    small = vitrim.compress(str(folders[layout]), data=list(pictures(48)), recipe=recipe, quiet=True)
    curve = small.metrics.recovery["curve"]
    assert curve[-1]["relative_error"] < curve[0]["relative_error"]  # one more call finds what the loss reaches
    pair = opened(folders[layout])
    with torch.no_grad():
        expected = normalize(pair.embed_texts(pair.tokenize([f"the {name}" for name in NAMES])), dim=1)
    assert len(seen) == 6 and all(torch.equal(space.bank_TE, expected) and space.weight == 2.0 for space in seen)
    assert seen[0].scale == pytest.approx(float(pair.model.logit_scale.detach().exp()))
    assert (seen[0].project is None) == (layout == "open_clip")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"text": "one line"}, "holds 1 texts"),
        ({"text": None}, "can't be read"),
        ({"features_at": "pre_norm"}, "needs the image tower of a pair"),
    ],
)
def test_a_bank_that_does_not_fit_is_found_before_anything_is_cut(folders, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("vitrim.compression.pipeline.cut_models_", lambda *args, **kwargs: pytest.fail("cut"))
    text = change.pop("text", "two\nlines")
    if text:
        (tmp_path / "bank.txt").write_text(text)
    options = {"steps": 1, "text_bank": str(tmp_path / "bank.txt"), **change}
    with pytest.raises(RecipeError, match=words):
        vitrim.compress(str(folders["clip"]), data=list(pictures(24)), recover=options, quiet=True)


def test_zero_shot_of_the_original_is_kept_by_a_permutation(folders, tmp_path):
    """All units kept: the same figures, to the last image."""
    given = {"names": NAMES, "templates": ["a photo of a {}"], "quiet": True}
    data = [(image, i % 6) for i, image in enumerate(pictures(36))]
    same = vitrim.compress(
        str(folders["clip"]), data=list(pictures(24)), keep_ratio=1.0, recipe=vitrim.Recipe.parse(FEW), quiet=True
    )
    assert zero_shot(copy.deepcopy(same.model), data, text_from=str(folders["clip"]), **given) == zero_shot(
        str(folders["clip"]), data, **given
    )
