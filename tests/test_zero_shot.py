"""Zero-shot classification: equal to open_clip's own code, for every kind of pair, with towers from two folders."""

import pytest
import torch

import vitrim
from tests.support.pairs import KINDS, NAMES, TEMPLATES, pictures, write_pair
from vitrim.clip.tasks import zero_shot
from vitrim.errors import CheckpointError, DataError, ModelError, RecipeError
from vitrim.metrics.zero_shot import build_classifier, prompts_for, zero_shot_top
from vitrim.models.towers import Pair, embed_images, open_pair, unit
from vitrim.output.load import open_model

open_clip = pytest.importorskip("open_clip")
pytest.importorskip("transformers")

FEW = vitrim.Recipe.parse({"mlp_ratio": 1, "repair": {"refit": False}, "calibrate": {"batch_size": 16}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {kind: write_pair(kind, root / kind) for kind in KINDS}


def labelled(num, size=32):
    return [(image, index % len(NAMES)) for index, image in enumerate(pictures(num, size))]


def opened(folder) -> Pair:
    return open_pair(*open_model(str(folder)))


@pytest.mark.parametrize("layout", ["open_clip", "open_clip-siglip", "open_clip-timm"])
def test_figures_are_those_of_open_clips_own_code(folders, layout):
    data = labelled(60, 160 if layout == "open_clip-timm" else 32)
    model = open_clip.create_model(f"local-dir:{folders[layout]}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folders[layout]}")
    classifier = open_clip.build_zero_shot_classifier(model, tokenize, NAMES, TEMPLATES)
    images, labels = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    with torch.no_grad():
        scores = model.encode_image(images, normalize=True) @ classifier
    right = scores.topk(5, dim=1).indices == labels[:, None]  # open_clip's `accuracy`, which fails with numpy 2.4
    theirs = [100 * float(right[:, :k].any(1).float().mean()) for k in (1, 5)]
    mine = zero_shot(str(folders[layout]), data, names=NAMES, templates=TEMPLATES, quiet=True)
    assert [mine["top1"], mine["top5"]] == pytest.approx(theirs)
    assert 0 < mine["top1"] < mine["top5"] <= 100 and mine["num_images"] == 60
    built = build_classifier(opened(folders[layout]), prompts_for(NAMES, TEMPLATES))
    torch.testing.assert_close(built, classifier.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_logits_are_those_of_transformers(folders, layout):
    pair, images = opened(folders[layout]), pictures(3)
    ids = pair.tokenize(NAMES)
    assert ids.shape == (6, 12) and ids.dtype == torch.int64
    with torch.no_grad():
        theirs = pair.model(input_ids=ids, pixel_values=images).logits_per_image
        mine = pair.logits(unit(embed_images(pair.model, images)), unit(pair.embed_texts(ids)))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    found = zero_shot(str(folders[layout]), labelled(18), names=NAMES, templates=["{}"], quiet=True)
    right = (theirs.argmax(1) == torch.arange(3)).float().mean()
    assert zero_shot(str(folders[layout]), labelled(3), names=NAMES, templates=["{}"])["top1"] == pytest.approx(
        100 * float(right)
    )
    assert found["num_images"] == 18


def test_a_bias_does_not_change_who_wins_but_is_in_the_logits(folders):
    pair = opened(folders["open_clip-siglip"])
    vectors, texts = unit(torch.randn(4, 24)), unit(torch.randn(5, 24))
    scores = pair.logits(vectors, texts)
    torch.testing.assert_close(scores, torch.e * vectors @ texts.T - 3.0)
    image, text = pictures(2), pair.tokenize(["a cat", "a dog"])
    with torch.no_grad():
        theirs, _ = pair.model.get_logits(image, text)
        mine = pair.logits(unit(embed_images(pair.model, image)), unit(pair.embed_texts(text)))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_the_image_tower_of_one_folder_with_the_text_tower_of_another(folders, tmp_path):
    source = str(folders["clip"])
    small = vitrim.compress(source, data=list(pictures(24)), recipe=FEW, out=tmp_path / "small", quiet=True)
    with_own = zero_shot(str(small.out), labelled(36), names=NAMES, templates=TEMPLATES, quiet=True)
    with_original = zero_shot(
        str(small.out), labelled(36), names=NAMES, templates=TEMPLATES, text_from=source, quiet=True
    )
    assert with_own == with_original  # compress leaves the text tower alone
    other = write_pair("clip", tmp_path / "other", seed=1)
    mixed = zero_shot(str(small.out), labelled(36), names=NAMES, templates=TEMPLATES, text_from=str(other), quiet=True)
    assert mixed != with_own
    with pytest.raises(ModelError, match="images in 24 dimensions, texts in 32"):
        zero_shot(source, labelled(6), names=NAMES, templates=TEMPLATES, text_from=str(folders["siglip"]), quiet=True)
    tower = small.model.vision_model  # without its projection it is of another space
    with pytest.raises(ModelError, match="images in 32 dimensions, texts in 24"):
        zero_shot(tower, labelled(6), names=NAMES, templates=TEMPLATES, text_from=source, quiet=True)


def test_an_image_tower_alone_and_a_module_with_a_tokenizer(folders):
    whole = open_clip.create_model(f"local-dir:{folders['open_clip']}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folders['open_clip']}")
    expected = zero_shot(str(folders["open_clip"]), labelled(30), names=NAMES, templates=TEMPLATES, quiet=True)
    given = {"names": NAMES, "templates": TEMPLATES, "quiet": True}
    assert zero_shot(whole, labelled(30), tokenizer=tokenize, **given) == expected
    assert zero_shot(whole.visual, labelled(30), text_from=str(folders["open_clip"]), **given) == expected
    with pytest.raises(ModelError, match="its tokenizer is not known; pass tokenizer="):
        zero_shot(whole, labelled(6), **given)


def test_an_output_with_widths_that_open_clip_cannot_say_has_its_tokenizer(folders, tmp_path):
    small = vitrim.compress(
        str(folders["open_clip"]),
        method="magnitude",
        mlp_ratio=1,
        scope="resblocks.1",
        out=tmp_path / "odd",
        quiet=True,
    )
    assert not small.metrics.stock
    given = {"names": NAMES, "templates": TEMPLATES, "quiet": True}
    alone = zero_shot(str(small.out), labelled(12), **given)
    assert alone == zero_shot(str(small.out), labelled(12), text_from=str(folders["open_clip"]), **given)


def test_ties_count_as_a_random_order(folders):
    pair = opened(folders["open_clip"])
    same = unit(torch.ones(4, 24))
    found = zero_shot_top(pair.model, pair, same, [(pictures(2), torch.tensor([0, 3]))], ks=(1, 3, 5))
    assert found == {"top1": 0.25, "top3": 0.75, "num_images": 2, "num_skipped": 0}


def test_a_classifier_is_made_once_and_again_when_anything_of_it_changes(folders, tmp_path, monkeypatch):
    pair, runs = opened(folders["open_clip"]), []
    real = Pair.embed_texts
    monkeypatch.setattr(Pair, "embed_texts", lambda self, ids: runs.append(1) or real(self, ids))
    prompts = prompts_for(NAMES, TEMPLATES)

    def build(prompts=prompts):
        before = len(runs)
        found = build_classifier(pair, prompts, cache=tmp_path)
        return found, len(runs) > before

    first, ran = build()
    again, ran_again = build()
    assert ran and not ran_again and torch.equal(first, again)
    assert len(list(tmp_path.iterdir())) == 1 and next(tmp_path.iterdir()).suffix == ".safetensors"
    assert build(prompts_for(NAMES[::-1], TEMPLATES))[1] and build(prompts_for(NAMES, TEMPLATES[:2]))[1]
    assert build([[a for part in prompts for a in part]])[1]  # the same texts as one class
    with torch.no_grad():
        pair.model.visual.proj.add_(1)
        assert not build()[1]  # the image tower has no say in it
        pair.model.text_projection.add_(0.01)
    assert build()[1]
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"can't be used .* Delete it, and it is made again"):
        build()


def test_the_names_and_templates_of_imagenet_are_open_clips():
    prompts = prompts_for("imagenet", "openai")
    assert len(prompts) == 1000 and {len(texts) for texts in prompts} == {80}
    assert prompts[0][0] == open_clip.OPENAI_IMAGENET_TEMPLATES[0](open_clip.IMAGENET_CLASSNAMES[0])
    assert len(prompts_for(["cat"], "simple")[0]) == len(open_clip.SIMPLE_IMAGENET_TEMPLATES)


def test_names_and_templates_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n dog \n")
    (tmp_path / "templates.txt").write_text("a {}.\nthe {}\n")
    assert prompts_for(tmp_path / "names.txt", str(tmp_path / "templates.txt")) == [
        ["a cat.", "the cat"],
        ["a dog.", "the dog"],
    ]
    assert prompts_for(["{curly} name"], ["a {}"]) == [["a {curly} name"]]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"names": []}, RecipeError, "names: none given"),
        ({"names": "nowhere.txt"}, RecipeError, "names: nowhere.txt can't be read"),
        ({"templates": ["a photo"]}, RecipeError, "'a photo' has no {} for the name"),
        ({"names": NAMES[:3]}, DataError, "label 5 with 3 names"),
        ({"data": list(pictures(6))}, DataError, "no image has a label"),
        ({"model": torch.nn.Linear(2, 2)}, ModelError, "Linear has no text tower that vitrim can run"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(folders, change, error, words):
    given = {"model": str(folders["open_clip"]), "data": labelled(6), "names": NAMES, "templates": TEMPLATES, **change}
    with pytest.raises(error, match=words) as caught:
        zero_shot(given.pop("model"), given.pop("data"), quiet=True, **given)
    assert "\n" not in str(caught.value)


def test_transformers_without_a_tokenizer_beside_it(folders, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(folders["clip"], bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ModelError, match="has no tokenizer beside it"):
        zero_shot(str(bare), labelled(6), names=NAMES, templates=TEMPLATES, quiet=True)
