"""What both models see in the same images, and output folders of one original side by side."""

import json
import re
from html import unescape

import pytest
import torch

from tests.support.models import build_case
from tests.support.reports import write_run
from vitrim.cli.app import run
from vitrim.data import Batch
from vitrim.errors import CheckpointError, OutputError
from vitrim.models.features import features, logits
from vitrim.models.origin import Origin
from vitrim.report.collect import look, nearest
from vitrim.report.compare import compare_runs, read_runs, table
from vitrim.report.pareto import Point, draw_pareto, front_of
from vitrim.report.tiles import draw_neighbours

KNOWN = Origin(name="tiny", preprocessing={"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]})


def batches_of(images, labels):
    pairs = zip(images.split(5), labels.split(5), strict=True)
    return [Batch(images_BCHW=i, labels_B=n, num_skipped=0, places_B=torch.arange(len(i))) for i, n in pairs]


@pytest.fixture(scope="module")
def pair():
    case = build_case("timm-vit")
    student = case.copy()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 3, 32, 32, generator=generator)
    return case.model, student, images, torch.randint(5, (60,), generator=generator)


def test_nearest_agrees_with_comparing_all_pairs():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    found = nearest(rows, 3)
    for i in range(9):
        cosines = {j: float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for j in range(9) if j != i}
        assert found[i].tolist() == sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]


def test_look_says_what_the_models_say_by_themselves(pair):
    teacher, student, images, labels = pair
    seen = look(teacher, student, KNOWN, batches_of(images, labels))
    with torch.inference_mode():
        theirs, mine = (features(model, images) for model in (teacher, student))
        answers = [logits(model, images).argmax(1).tolist() for model in (teacher, student)]
    assert seen["answers"] == {"labels": labels.tolist(), "before": answers[0], "after": answers[1]}
    assert torch.allclose(seen["teacher_patches"], theirs.patches_BND[:5], atol=1e-5)  # of the first batch
    assert torch.allclose(seen["images"], (images[:5] * 0.2 + 0.5).clamp(0, 1))
    found = seen["neighbours"]
    near = [nearest(side.pooled_BD, 5).tolist() for side in (theirs, mine)]
    shared = [len(set(near[0][i]) & set(near[1][i])) for i in range(60)]
    assert found["num_images"] == 60 and found["overlap"] == pytest.approx(sum(shared) / 300)
    assert 0 < found["overlap"] < 1
    for row in found["queries"]:
        assert [row["original"], row["smaller"]] == [near[side][row["image"]] for side in (0, 1)]
    agreement = [shared[row["image"]] for row in found["queries"]]
    assert agreement == sorted(agreement) and (agreement[0], agreement[-1]) == (min(shared), max(shared))
    assert {i: found["labels"][i] for i in found["labels"]} == {i: int(labels[i]) for i in found["thumbnails"]}


def test_of_few_images_no_share_of_agreement_is_told(pair):
    teacher, student, images, labels = pair
    seen = look(teacher, student, KNOWN, batches_of(images[:49], labels[:49]))
    assert seen["neighbours"]["overlap"] is None
    caption = draw_neighbours(seen["neighbours"]).caption
    assert "49 held-out images" in caption and "On average" not in caption and "nearest first. The queries" in caption


def test_look_leaves_out_what_is_not_there(pair):
    teacher, student, images, labels = pair
    assert look(teacher, student, KNOWN, None)["neighbours"] == {}
    unknown = look(teacher, student, KNOWN, batches_of(images[:1], torch.tensor([-1])))
    assert unknown["answers"] == {} and unknown["neighbours"] == {} and len(unknown["images"]) == 1
    assert look(teacher, student, KNOWN, batches_of(images, labels + 5))["answers"] == {}  # more classes than the head


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", parameters=500, error=0.3, ms=6.0),
        write_run(tmp_path / "c", parameters=700, error=0.2, ms=5.5),
    ]


def test_the_table_holds_each_run_beside_the_original(folders):
    header, rows = table(read_runs(folders))
    assert header == ["Measured", "Original", "1 a", "2 b", "3 c"]
    cells = dict(rows)
    assert cells["parameters"] == [("1000", False), ("600 (60%)", False), ("500 (50%)", True), ("700 (70%)", False)]
    latency = cells["relative latency, batch 8"]
    assert latency[:3] == [("1", False), ("0.50 (0.49 to 0.51)", False), ("0.60 (0.59 to 0.61)", False)]
    assert cells["relative error"] == [("0", False), ("0.1", True), ("0.3", False), ("0.2", False)]
    assert cells["cosine CLS"][1:] == [("0.95", False)] * 3  # no best where all are equal
    assert [text for text, _ in cells["images, held out"]] == ["\N{EN DASH}", "10", "10", "10"]
    assert cells["weights (MB)"][:2] == [("0.004", False), ("0.0024 (60%)", False)]


def test_the_page_shows_the_front_and_every_run(folders, tmp_path, capsys):
    out = tmp_path / "compare.html"
    assert run(["report", *map(str, folders), "--out", str(out)]) == 0
    assert f"Report: {out}" in capsys.readouterr().out.replace("\n", "")
    text = out.read_text()
    (alt,) = [unescape(found) for found in re.findall(r'aria-label="(Points[^"]*)"', text)]
    assert "1 a 600 and 0.1, on the front; 2 b 500 and 0.3, on the front; 3 c 700 and 0.2. Latency rel" in alt
    assert "<strong>500 (50%)</strong>" in text and "Notes" not in text
    assert run(["report", *map(str, folders), "--out", str(out)]) == 2  # an older page is not written over
    assert "compare.html: exists already" in capsys.readouterr().err


def test_originals_that_disagree_are_not_averaged_and_noise_is_no_number(folders, tmp_path):
    """Timed at 10 and at 30 ms: each run's latency is its share of its own original; a median would be of neither."""
    noisy = write_run(tmp_path / "noisy", original_ms=30.0, spread=0.2, **{"images": {"held_out": 10}})
    metrics = json.loads((noisy / "metrics.json").read_text())
    metrics["before"]["peak_memory_mib"] = 3.0
    (noisy / "metrics.json").write_text(json.dumps(metrics))
    cells = dict(table(read_runs([folders[0], noisy]))[1])
    assert [text for text, _ in cells["relative latency, batch 8"]] == [
        "1",
        "0.50 (0.49 to 0.51)",
        "0.50 (noisy, 0.40 to 0.60)",
    ]
    assert cells["peak memory (MiB)"] == [("1 to 3", False), ("1 (100%)", False), ("1 (33%)", False)]
    compare_runs([*folders, noisy], tmp_path / "o.html")
    (alt,) = [unescape(found) for found in re.findall(r'aria-label="(Points[^"]*)"', (tmp_path / "o.html").read_text())]
    assert "batch 8: original 1 and 0, on the front; 1 a 0.5" in alt and "noisy" not in alt.partition("Latency")[2]


def test_what_is_hard_to_compare_is_said(folders, tmp_path):
    other = write_run(tmp_path / "x" / "a", data="scans", machine="cpu 2")
    _, _, notes = compare_runs([folders[0], other], tmp_path / "o.html")
    assert "not measured on one machine (1: cpu, cpu 1; 2: cpu, cpu 2)" in notes[0]
    assert "not judged on the same images (1: 10 of photos, seed 0; 2: 10 of scans, seed 0)" in notes[1]
    assert str(other) in (tmp_path / "o.html").read_text()  # two folders of one name go by their paths


def test_runs_without_images_have_a_table_and_no_picture(tmp_path):
    plain = [write_run(tmp_path / name, after_cut=None, after_recovery=None, images={}) for name in "ab"]
    compare_runs(plain, tmp_path / "o.html")
    text = (tmp_path / "o.html").read_text()
    assert "<svg" not in text and "600 (60%)" in text


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (None, r"metrics\.json: no such file; name a folder that vitrim compress wrote"),
        ("{", r"metrics\.json: not what vitrim compress writes \(Expecting"),
        ("[]", r"metrics\.json: not what vitrim compress writes"),
        ('{"model": "vit"}', r"not what vitrim compress writes \(no 'before'\)"),
    ],
)
def test_other_folders_are_refused(folders, tmp_path, written, said):
    odd = tmp_path / "odd"
    odd.mkdir()
    if written is not None:
        (odd / "metrics.json").write_text(written)
    with pytest.raises(CheckpointError, match=said):
        compare_runs([folders[0], odd], tmp_path / "o.html")
    assert not (tmp_path / "o.html").exists()


def test_other_originals_too_few_and_bad_places_are_refused(folders, tmp_path):
    other = write_run(tmp_path / "other", model="swin")
    with pytest.raises(CheckpointError, match=r"other: made from swin \(1,000 parameters\), but a from vit"):
        compare_runs([folders[0], other], tmp_path / "o.html")
    with pytest.raises(CheckpointError, match=r"folders given: 1; name two or more"):
        compare_runs(folders[:1], tmp_path / "o.html")
    with pytest.raises(OutputError, match=r"does not end in \.html"):
        compare_runs(folders, tmp_path / "page.txt")


def points(*pairs):
    return [Point(number=i, name=str(i), cost=cost, error=error) for i, (cost, error) in enumerate(pairs)]


def test_the_front_is_what_no_other_beats():
    found = points((10, 0.0), (5, 0.2), (5, 0.3), (4, 0.2), (3, 0.5), (4, 0.2))
    assert [point.number for point in front_of(found)] == [4, 3, 5, 0]


def test_points_are_told_apart_without_colour():
    picture = draw_pareto({"Parameters": points((10, 0.0), *((5 + 0.01 * i, 0.2) for i in range(7)))})
    labels = re.findall(r'<g id="pareto-text_\d+">.*?</g>', picture.svg, flags=re.DOTALL)
    for number in range(1, 8):
        assert any(re.search(rf">{number}</text>", label) for label in labels)
    shapes = re.findall(r'<path id="pareto-m\w+" d="([^"]+)"', picture.svg)
    assert len(set(shapes)) == 8
