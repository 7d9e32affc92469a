"""The protocol of the papers' tables, whole and at toy size, and what is quoted beside it."""

import argparse
import importlib.util
import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "published.py")
assert SPEC is not None and SPEC.loader is not None
published = sys.modules["published"] = importlib.util.module_from_spec(SPEC)  # dataclasses look their module up there
SPEC.loader.exec_module(published)
DIGITS = f"local-dir:{files('vitrim') / 'assets' / 'digits-vit'}"


@pytest.fixture
def folder(tmp_path):
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:160], digits.target, strict=False)):
        place = tmp_path / "imagenet" / ("val" if number % 4 == 0 else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).convert("RGB").save(place / f"{number}.png")
    return tmp_path / "imagenet"


def asked(folder, out, **values):
    plain = {"model": DIGITS, "imagenet": folder, "rows": ["MLP, corp", "both, corp"], "keep": 0.5, "num_images": 64}
    plain |= {"index": None, "limit": None, "batch_size": 32, "seed": 0, "device": "cpu", "out": out}
    return argparse.Namespace(**{**plain, **values})


def test_the_protocol_runs_and_goes_on_where_it_was(folder, tmp_path, capsys):
    out = tmp_path / "published.json"
    published.run(asked(folder, out, rows=["MLP, corp"]))
    before = json.loads(out.read_text())["rows"]
    capsys.readouterr()
    found = published.run(asked(folder, out))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["both, corp"]
    rows = json.loads(out.read_text())["rows"]
    assert rows == found["rows"] and {name: rows[name] for name in before} == before
    original, mlp, both = rows["original"], rows["MLP, corp"], rows["both, corp"]
    assert original["relative_error"] == 0 and original["top-1"] > 90 and original["kNN"] > 80
    assert (original["num_neighbours"], original["num_images"]) == (120, 40)
    assert original["parameters"] - mlp["parameters"] == 6 * 192 * (2 * 96 + 1)  # half of 384 units in six blocks
    assert both["parameters"] < mlp["parameters"] and both["macs"] < mlp["macs"]
    assert 0 < mlp["relative_error"] < 1 and mlp["seconds"] > 0
    table = published.markdown(found)
    assert "| both, corp |" in table and "No paper is quoted on this model" in table and "83.27" in table


def test_another_run_is_not_mixed_in(folder, tmp_path):
    out = tmp_path / "published.json"
    out.write_text(json.dumps({"asked": {}, "rows": {}}))
    with pytest.raises(SystemExit, match="holds another run"):
        published.run(asked(folder, out))


@pytest.mark.parametrize(
    ("model", "sources"),
    [
        ("timm/deit3_huge_patch14_224.fb_in1k", {"CORP"}),
        ("timm/deit3_large_patch16_224.fb_in1k", {"CORP", "SnapViT"}),
        ("timm/vit_base_patch16_siglip_224.v2_webli", {"SnapViT"}),
        ("hf/facebook/dinov2-giant", {"DGMR"}),
        ("open_clip/EVA02-E-14-plus/laion2b", {"AMP"}),
        ("local-dir:elsewhere", {"CORP", "SnapViT", "AMP", "DGMR"}),
    ],
)
def test_papers_are_quoted_on_their_own_models_with_their_source(model, sources):
    found, _ = published.quoted_for(model)
    assert {source.split(",")[0] for source, _ in found} == sources
    assert all("arXiv 2" in source and row.after <= row.before for source, row in found)
