"""Limits for a build that checks models, and an old index that new queries are searched in."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import vitrim
from tests.support.digits import DIGITS
from vitrim.cli.app import run
from vitrim.data import open_images, transform_for
from vitrim.errors import DataError, RecipeError
from vitrim.metrics.limits import parse_limits
from vitrim.metrics.old_index import OldIndex, read_old_index
from vitrim.models.features import features
from vitrim.output.load import open_encoder

EVALUATE = ["evaluate", DIGITS, "--against", DIGITS, "--data", "digits"]


def recall_by_sorting(queries, index, k):
    cosines = normalize(queries.double(), dim=1) @ normalize(index.double(), dim=1).T
    return sum(row in cosines[row].argsort(descending=True)[:k].tolist() for row in range(len(queries))) / len(queries)


@pytest.mark.parametrize("suffix", ["array", "npy", "tensor"])
def test_recall_in_an_old_index_with_other_rows_behind_is_that_of_sorting(tmp_path, suffix):
    generator = torch.Generator().manual_seed(0)
    index = torch.randn(60, 6, generator=generator)
    queries = index[:40] + 0.8 * torch.randn(40, 6, generator=generator)
    given = {"array": index.numpy(), "tensor": index, "npy": tmp_path / "old.npy"}[suffix]
    if suffix == "npy":
        np.save(given, index.numpy().astype(np.float16))
        index = index.half().float()
    found = read_old_index(given, width=6).recall(queries)
    assert found == {f"old_index_recall@{k}": pytest.approx(recall_by_sorting(queries, index, k)) for k in (1, 5, 10)}
    assert 0.1 < found["old_index_recall@1"] < found["old_index_recall@5"] < 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda at: at / "missing.npy", "no such file"),
        (lambda at: np.zeros((3, 4, 5)), "(3, 4, 5)"),
        (lambda at: np.zeros((30, 5)), "5 numbers.*has 6"),
        (lambda at: np.array([["a"] * 6]), "<U1"),
        (lambda at: np.full((60, 6), np.nan), "row 0"),
        (lambda at: (at / "old.npy").write_bytes(b"no array") and at / "old.npy", "old.npy"),
    ],
)
def test_what_is_no_index_is_refused_in_one_line(tmp_path, make, said):
    with pytest.raises(DataError, match=f"(?s)old_index.*{said}".replace("(3, 4, 5)", r"\(3, 4, 5\)")) as error:
        read_old_index(make(tmp_path), width=6)
    assert "\n" not in str(error.value)


def test_fewer_rows_than_images_are_refused():
    with pytest.raises(DataError, match="old_index: 3 rows for 4 images"):
        OldIndex(torch.ones(3, 6)).recall(torch.ones(4, 6))


def test_pickles_are_never_opened(tmp_path):
    np.save(tmp_path / "old.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="old_index"):
        read_old_index(tmp_path / "old.npy", width=6)


def test_evaluate_searches_an_old_index_with_both_models(tmp_path, capsys):
    model, _ = open_encoder(DIGITS)
    source = open_images("digits", split="test", transform=transform_for(model))
    with torch.no_grad():
        rows = [features(model, batch.images_BCHW).pooled_BD for batch in source.loader(batch_size=64)]
    np.save(tmp_path / "old.npy", torch.cat(rows).numpy())
    assert run([*EVALUATE, "--old-index", str(tmp_path / "old.npy"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fidelity"]["old_index_recall@1"] > 0.99  # a few digits look the same
    assert any("its own images" in note for note in found["notes"])
    with pytest.raises(DataError, match=r"old_index.*leave out limit"):
        vitrim.evaluate(DIGITS, DIGITS, "digits", old_index=tmp_path / "old.npy", limit=20)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        (["0.98"], {"cosine": 0.98}),
        (["recall@1=0.9", "top1=-0.5"], {"recall@1": 0.9, "top1": -0.5}),
        ([], {}),
    ],
)
def test_limits_are_read(given, limits):
    assert parse_limits(given) == limits


@pytest.mark.parametrize(
    "given", ["cosin=0.9", "top1", "top1=x", "relative_error=0.1", "nan", "top1=inf", "=1", "98", "recall@1=1.01"]
)
def test_limits_that_make_no_sense_are_refused_before_anything_is_read(given, capsys):
    with pytest.raises(RecipeError, match="fail-under"):
        parse_limits([given])
    assert run([*EVALUATE[:1], "no-model", "--against", "none", "--data", "none", "--fail-under", given]) == 2
    assert "fail-under" in capsys.readouterr().err


def test_below_a_limit_the_table_is_printed_and_the_exit_code_is_1(capsys):
    held = ["--limit", "60", "--fail-under", "0.99", "--fail-under", "recall@1=0.9", "--fail-under", "top1=-0.1"]
    assert run([*EVALUATE, *held]) == 0
    assert "Limits kept: cosine is not below 0.99, recall@1" in " ".join(capsys.readouterr().out.split())
    assert run([*EVALUATE, *held, "--fail-under", "knn=1", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["below"] == ["knn of small less original is 0, below 1"]
    assert err.count("\n") == 1 and "knn of small less original is 0, below 1" in err


def test_a_limit_on_what_was_not_measured_is_an_error_of_its_own(capsys):
    assert run([*EVALUATE, "--limit", "20", "--fail-under", "recall@1=0.9"]) == 2
    assert "recall@1" in capsys.readouterr().err


def test_a_result_that_is_far_from_the_original_says_so():
    far = vitrim.compress(DIGITS, data="digits", method="recursive", keep_ratio=0.5, quiet=True)
    assert [note for note in far.metrics.notes if note.startswith("far from the original: relative error 0.")]
    near = vitrim.compress(DIGITS, data="digits", keep_ratio=0.9, recipe={"effort": "fast"}, quiet=True)
    assert not [note for note in near.metrics.notes if note.startswith("far")]


def test_an_old_index_that_does_not_fit_is_refused_before_a_model_runs(monkeypatch):
    monkeypatch.setattr("vitrim.evaluation.compare", lambda *_: pytest.fail("ran"))
    with pytest.raises(DataError, match="old_index: 3 rows for 360 images"):
        vitrim.evaluate(DIGITS, DIGITS, "digits", old_index=torch.ones(3, 96))
    with pytest.raises(DataError, match="2 images can't be read"):
        OldIndex(torch.ones(9, 96)).check(7, 2)
