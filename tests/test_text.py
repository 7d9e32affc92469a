"""Text encoders: rows of token ids from running text, and BERT through the whole job."""

import copy
import json
import random
import shutil
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitrim
from tests.support.texts import SIZES, WORDS, bert_tokenizer, build_bert
from vitrim.cli.app import run
from vitrim.data import is_text, open_texts
from vitrim.data.inputs import open_inputs
from vitrim.errors import DataError, ModelError
from vitrim.models.features import features
from vitrim.models.load import load_model, origin_of, tokenizer_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

FEW = {"mlp_ratio": 1, "repair": {"refit_steps": 10, "max_tokens": 2048}, "calibrate": {"batch_size": 16}}


@cache
def bare_tokenizer(template):
    """A tokenizer that puts what the template says around a text."""
    special = {"<s>": 0, "</s>": 1}
    vocabulary = special | {word: i + 2 for i, word in enumerate(["?", *dict.fromkeys(WORDS)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=list(special.items())
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?"
    )


@pytest.fixture(scope="module")
def texts():
    choose = random.Random(0)
    return [" ".join(choose.choices(WORDS, k=choose.randint(3, 30))) for _ in range(150)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, texts):
    """A folder with BERT, its tokenizer and a text file outside of it."""
    root = tmp_path_factory.mktemp("bert")
    build_bert().save_pretrained(root / "source")
    bert_tokenizer().save_pretrained(root / "source")
    (root / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    return root / "source"


@pytest.fixture(scope="module")
def result(source):
    recipe = vitrim.Recipe.parse(FEW)
    recover = {"steps": 4, "batch_size": 16, "lr": 1e-4}
    data, out = source.parent / "texts.txt", source.parent / "out"
    return vitrim.compress(str(source), data=data, recipe=recipe, recover=recover, out=out, quiet=True)


# Rows


@settings(deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab cé\n.", max_size=40), min_size=1, max_size=8),
    num_tokens=st.integers(3, 20),
    template=st.sampled_from([None, "<s> $A </s>", "<s> $A", "$A </s>", "$A"]),
)
def test_rows_are_full_and_hold_every_token_once_in_order(texts, num_tokens, template):
    tokenizer = bert_tokenizer() if template is None else bare_tokenizer(template)
    around = tokenizer("a")["input_ids"]
    first, last = ([], []) if template == "$A" else (around[:1], around[-1:])
    first, last = first if template != "$A </s>" else [], last if template != "<s> $A" else []
    expected = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not expected:
        with pytest.raises(DataError, match="no text"):
            open_texts(texts, tokenizer=tokenizer, num_tokens=num_tokens)
        return
    opened = open_texts(texts, tokenizer=tokenizer, num_tokens=num_tokens)
    rows = [opened[i][0].tolist() for i in range(len(opened))]
    room = num_tokens - len(first) - len(last)
    assert {len(row) for row in rows} == {min(num_tokens, len(expected) + len(first) + len(last))}
    inner = [row[len(first) : len(row) - len(last)] for row in rows]
    assert all(row == [*first, *ids, *last] for row, ids in zip(rows, inner, strict=True))
    found = [token for row in inner for token in row]
    assert found == expected[: len(found)] and len(expected) - len(found) < min(room, len(expected))
    assert tokenizer.pad_token_id is None or tokenizer.pad_token_id not in found
    assert not opened.has_labels and {opened[i][1] for i in range(len(opened))} == {-1}


def test_files_folders_and_strings_give_the_same_rows(tmp_path, texts):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:70]) + "\n", encoding="utf-8")
    (tmp_path / "deep" / "b.txt").write_text("\n".join(texts[70:]), encoding="utf-8")
    (tmp_path / "all.text").write_text("\n".join(texts), encoding="utf-8")
    options = {"tokenizer": bert_tokenizer(), "num_tokens": 16}
    opened = [open_texts(what, **options) for what in (texts, tuple(texts), tmp_path, str(tmp_path / "all.text"))]
    for other in opened[1:]:
        assert len(other) == len(opened[0])
        assert all(torch.equal(other[i][0], opened[0][i][0]) for i in range(len(other)))
    few = open_texts(texts, **options, limit=5)
    assert len(few) == 5 and not torch.equal(few[1][0], opened[0][1][0])  # spread over the whole
    (batch,) = few.loader(batch_size=5)
    assert batch.images_BCHW.shape == (5, 16) and batch.images_BCHW.dtype == torch.int64


def test_what_counts_as_text(tmp_path):
    assert is_text(["a"]) and is_text(("a", "b")) and is_text("a.txt") and is_text(tmp_path / "a.txt")
    assert not is_text([]) and not is_text("digits") and not is_text(torch.zeros(2, 3)) and not is_text(tmp_path)
    assert not is_text([torch.zeros(3)])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").touch()
    assert is_text(tmp_path) and is_text(str(tmp_path))


def test_text_that_can_not_be_read_is_one_clear_line(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    options = {"tokenizer": bert_tokenizer(), "num_tokens": 16}
    for name, words in (("empty", "no text"), ("binary", "can't be read as text"), ("absent", "can't be read")):
        with pytest.raises(DataError, match=words) as caught:
            open_texts(tmp_path / f"{name}.txt", **options)
        assert f"{name}.txt" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="limit is 0"):
        open_texts(["a small model"], **options, limit=0)


# The encoder


def test_what_is_known_of_a_text_encoder(source):
    _, origin = load_model(str(source))
    assert origin.encoder == "" and origin.architecture == "BertModel" and origin.folder == str(source)
    known = {"tokenizer": str(source), "num_tokens": 32, "vocab_size": len(bert_tokenizer())}
    assert origin.preprocessing == known
    assert tokenizer_of(origin)("a small model")["input_ids"] == bert_tokenizer()("a small model")["input_ids"]
    found = vitrim.inspect(str(source))
    assert [(site.kind, site.d_model, site.d_hidden) for site in found.sites] == [("plain", 32, 128)] * 2
    assert [site.path for site in found.sites] == [f"encoder.layer.{i}" for i in range(2)]


def test_a_live_encoder_remembers_the_folder_that_it_came_from(source, texts):
    model = transformers.BertModel.from_pretrained(source)
    rows = open_inputs(texts, origin_of(model))
    loaded = open_inputs(source.parent / "texts.txt", load_model(str(source))[1])
    assert all(torch.equal(rows[i][0], loaded[i][0]) for i in range(len(rows)))


def test_bert_is_cut_repaired_and_distilled(source, result):
    before, after = (cost.parameters for cost in (result.metrics.before, result.metrics.after))
    assert after == sum(p.numel() for p in result.model.parameters()) == before - 2 * 96 * (2 * 32 + 1)
    (predicted,) = vitrim.inspect(str(source), mlp_ratio=1).predicted
    assert after == predicted.parameters
    assert all(errors["repaired"] < 0.7 * errors["unrepaired"] for errors in result.metrics.cut_errors.values())
    errors = [judged.relative_error for judged in (result.metrics.after_cut, result.metrics.after_recovery)]
    assert errors[1] <= errors[0] + 1e-9 < 0.3
    assert result.metrics.recovery["num_steps"] == 4


def test_repair_beats_none_on_held_out_text(source, texts, result):
    plain = vitrim.compress(str(source), data=texts, recipe=vitrim.Recipe.parse({**FEW, "repair": False}), quiet=True)
    unrepaired, repaired = (r.metrics.after_cut.fidelity["relative_error"] for r in (plain, result))
    assert repaired < 0.7 * unrepaired


def test_the_folder_is_whole_and_transformers_loads_it(source, result):
    names = {"config.json", "model.safetensors", "vitrim.json", "recipe.yaml", "metrics.json", "report.html"}
    assert {path.name for path in result.out.iterdir()} >= names | {"tokenizer.json", "tokenizer_config.json"}
    # Reloaded by transformers in a process that can't import vitrim, before the folder got its name.
    assert result.metrics.stock and result.metrics.reload_difference <= 1e-5
    stock = transformers.BertModel.from_pretrained(result.out).eval()
    assert stock.config.intermediate_size == 32
    rows = transformers.AutoTokenizer.from_pretrained(result.out)(["a small model"], return_tensors="pt")
    with torch.inference_mode():
        expected = result.model(rows["input_ids"]).last_hidden_state
        assert torch.equal(stock(rows["input_ids"]).last_hidden_state, expected)
        assert torch.equal(vitrim.load(result.out)(rows["input_ids"]).last_hidden_state, expected)
    with torch.inference_mode():
        assert torch.equal(features(stock, rows["input_ids"]).pooled_BD, expected[:, 0])


def test_evaluate_on_text(source, texts, result):
    measured = vitrim.evaluate(str(result.out), str(source), texts, limit=20)
    assert measured.fidelity["num_images"] == 20 and measured.fidelity["relative_error"] < 0.3
    assert measured.student.cost.macs < measured.teacher.cost.macs
    assert "knn" not in measured.student.scores


def test_an_output_is_cut_again_on_text(texts, result):
    again = vitrim.compress(str(result.out), data=texts, hidden_dim=16, recipe=vitrim.Recipe.parse(FEW), quiet=True)
    assert set(again.plan.widths.values()) == {16}


def test_an_output_holds_its_tokenizer_and_can_be_moved(texts, result, tmp_path):
    shutil.copytree(result.out, tmp_path / "moved")
    about = json.loads((tmp_path / "moved" / "vitrim.json").read_text())
    assert about["origin"]["folder"] is None and about["origin"]["preprocessing"]["tokenizer"] == "."
    few, moved = vitrim.Recipe.parse(FEW), str(tmp_path / "moved")
    again = vitrim.compress(moved, data=texts, recipe=few, hidden_dim=8, out=tmp_path / "again", quiet=True)
    assert set(again.plan.widths.values()) == {8}
    values = {"hidden_dim": 7, "scope": "encoder.layer.0"}
    odd = vitrim.compress(moved, data=texts, recipe=few, out=tmp_path / "odd", quiet=True, **values)
    assert not odd.metrics.stock and (tmp_path / "odd" / "tokenizer.json").is_file()


def test_rows_of_ids_do_without_a_tokenizer():
    generator = torch.Generator().manual_seed(0)
    rows = list(torch.randint(5, len(bert_tokenizer()), (40, 12), generator=generator))
    model = build_bert()
    state = copy.deepcopy(model.state_dict())
    result = vitrim.compress(model, data=rows, recipe=vitrim.Recipe.parse(FEW), keep_ratio=0.5, quiet=True)
    assert result.metrics.images["held_out"] == 4 and result.metrics.after_cut.fidelity["num_images"] == 4
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert result.model.config.intermediate_size == 64 and model.config.intermediate_size == 128


def test_the_command_line_takes_a_text_file(source, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("repair: {refit: false}\n")
    data = str(source.parent / "texts.txt")
    command = ["compress", str(source), "--data", data, "--out", str(tmp_path / "out"), "--recipe", str(recipe)]
    assert run([*command, "--keep-ratio", "0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["widths"]["encoder.layer.0"] == [128, 64] and printed["stock"]
    assert run(["evaluate", str(tmp_path / "out"), "--against", str(source), "--data", data, "--limit", "9"]) == 0
    assert "cosine CLS" in capsys.readouterr().out


# Inputs of another kind

IMAGES = list(torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def vit():
    sizes = {**SIZES, "image_size": 32, "patch_size": 8}
    return transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()


@pytest.mark.parametrize(
    "build, data, words",
    [
        (build_bert, IMAGES, "since it is a text encoder"),
        (build_bert, "digits", "since it is a text encoder"),
        (build_bert, list(torch.full((12, 40), 5)), r"int64 \(40,\).*expanded size"),
        (build_bert, list(torch.full((12, 8), 10_000)), "index out of range"),
        (build_bert, [torch.full((length,), 5) for length in range(4, 16)], "shapes"),
        (vit, list(torch.full((12, 8), 5)), r"int64 \(8,\).*pass images"),
        (vit, list(torch.randn(12, 3, 48, 48)), r"\(3, 48, 48\).*pass images"),
        (vit, ["some text"], "takes images, not text"),
        (vit, "photos.txt", "takes images, not text"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), ["some text"], "no tokenizer"),
    ],
)
def test_the_wrong_kind_of_data_is_one_clear_line(build, data, words):
    with pytest.raises(DataError, match=words) as caught:
        vitrim.compress(build(), data=data, quiet=True)
    assert "\n" not in str(caught.value)
    if data is IMAGES:
        for pair in ((build(), build()), (vit(), build())):
            with pytest.raises(DataError, match=words):
                vitrim.evaluate(*pair, data, limit=12)


def test_text_for_an_encoder_without_a_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer beside it; pass rows of token ids"):
        vitrim.compress(build_bert(), data=["a small model"] * 20, quiet=True)
    build_bert().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer beside it") as caught:
        vitrim.compress(str(tmp_path), data=["a small model"] * 20, quiet=True)
    assert "\n" not in str(caught.value)


def test_a_text_file_among_images_makes_no_text(tmp_path):
    from PIL import Image

    for index in range(12):
        Image.new("RGB", (32, 32), (index * 20, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "licence.txt").write_text("some text")
    result = vitrim.compress(vit(), data=tmp_path, method="magnitude", mlp_ratio=1, quiet=True)
    assert result.metrics.images["held_out"] == 1
