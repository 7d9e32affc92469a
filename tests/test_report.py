"""The report: one self-contained page, whatever parts were measured, written whole or not at all."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.support.reports import report_data
from vitrim.errors import OutputError
from vitrim.report import figures, page, picture, tiles
from vitrim.report.data import ReportData
from vitrim.report.page import write_report

PICTURES = ["size", "latency", "widths", "blocks", "residuals", "recovery", "patches", "neighbours", "answers"]
TABLES = ["summary", "sites", "recipe", "environment", "notes"]


@pytest.fixture(scope="module")
def data():
    return report_data()


@pytest.fixture
def empty():
    return ReportData(
        model="vit_tiny",
        method="dgmr",
        command="",
        summary={},
        sites=[],
        edits=[],
        block_errors=[],
        residual_curves={},
        recovery=[],
        latency={},
        relative_latency={},
        images=None,
        teacher_patches=None,
        student_patches=None,
        grid=None,
        neighbours={},
        answers={},
        recipe_yaml="",
        environment={},
        recovered=False,
        notes=[],
        num_images=0,
        judged_on="",
    )


class Page(HTMLParser):
    """Collects what the tests ask about; also fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "img", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def find(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.find("section")]


def render(path, data):
    write_report(path, data)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory, data):
    return render(tmp_path_factory.mktemp("report") / "report.html", data)


def test_page_is_self_contained_and_small(text):
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    assert not re.search(r"url\((?!#)|@import", text)
    assert not page.find("script") and not page.find("link") and not page.find("iframe")
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_sections_come_pictures_first_and_ids_are_unique(text):
    page = Page(text)
    assert page.sections == PICTURES + TABLES
    assert len(page.ids) == len(set(page.ids))
    targets = {link["href"].removeprefix("#") for link in page.find("a")}
    assert targets == {"main", *PICTURES, *TABLES}
    used = {a["xlink:href"].removeprefix("#") for _, a in page.tags if "xlink:href" in a}
    assert used <= set(page.ids)


def test_every_picture_has_an_alternative_text(text):
    page = Page(text)
    svgs, images = page.find("svg"), page.find("img")
    assert len(svgs) == 7 and len(images) == 4 + 2 * 5
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 30 for svg in svgs)
    assert all(len(image["alt"]) > 10 for image in images)
    assert "Parameters from 22.1M to 11.4M" in svgs[0]["aria-label"]
    assert "kept from 25% in block 0 to 67% in block 5" in svgs[2]["aria-label"]
    assert (
        "class 0 gained 0 and lost 1, class 1 gained 1 and lost 0, class 2 gained 0 and lost 1" in svgs[6]["aria-label"]
    )
    assert "between 25% and 25%" in svgs[4]["aria-label"]  # (1 - 48/96) ** 2, at pick 48


def test_pictures_take_their_colours_from_the_page(text):
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(re.sub(r'(id|href)="[^"]*"', "", svg) for svg in svgs))
    # An svg text without a fill is black, unreadable in the dark.
    assert all("fill: var(" in style for svg in svgs for style in re.findall(r"<text style=\"([^\"]*)", svg))
    assert "var(--after)" in svgs[0]


@pytest.mark.parametrize(
    "value, said", [(0.9731, "0.973"), (0.99973, "0.9997"), (0.9999999, "1"), (1.0, "1"), (-0.2, "-0.200")]
)
def test_a_cosine_is_not_rounded_to_one(value, said):
    assert page._cosine(value) == said


def test_headline_and_table_say_the_numbers(text):
    headline = re.sub(r"<[^>]+>", "", re.findall(r"<h1>(.*?)</h1>", text)[0])
    assert headline == (
        "vit_tiny: 48% fewer parameters and 48% fewer MACs, 1.60 times as fast here at batch 8, with CLS cosine 0.973"
        " and relative error 0.12 against the original on 512 images."
    )
    minus = "\N{MINUS SIGN}"
    assert f"{minus}48.3%" in text and f"{minus}1.9 points" in text


def test_a_cut_without_recovery_is_the_end(data, tmp_path):
    summary = {name: {**row, "after": None} for name, row in data.summary.items()}
    blocks = [{**row, "after": None} for row in data.block_errors]
    text = render(
        tmp_path / "r.html", replace(data, summary=summary, block_errors=blocks, recovery=[], sites=[], answers={})
    )
    assert "relative error <b>0.35</b>" in text
    assert "recovery" not in Page(text).sections
    assert '<i style="background: var(--cut)"></i>' in text
    assert '<i style="background: var(--after)"></i>' not in text


def test_an_empty_report_has_no_sections(tmp_path, empty):
    page = render(tmp_path / "report.html", empty)
    assert Page(page).sections == []
    assert "<h1>vit_tiny.</h1>" in page


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        ("size", {"summary": {"kNN (%)": {"before": 80.0, "after_cut": None, "after": 79.0}}}),
        ("blocks", {"block_errors": []}),
        ("blocks", {"block_errors": [{"block": 0, "after_cut": None, "after": None}]}),
        ("residuals", {"residual_curves": {}}),
        ("recovery", {"recovery": []}),
        ("latency", {"latency": {"before": {1: 3.0}}}),
        ("patches", {"student_patches": None}),
        ("neighbours", {"neighbours": {}}),
        ("answers", {"answers": {}}),
        ("size summary", {"summary": {}, "relative_latency": {}}),
        ("widths sites", {"sites": []}),
        ("recipe", {"recipe_yaml": "", "command": ""}),
        ("environment", {"environment": {}}),
        ("notes", {"notes": []}),
    ],
)
def test_a_missing_part_leaves_only_its_section_out(tmp_path, data, section, missing):
    few = replace(data, residual_curves={"blocks.0.mlp": data.residual_curves["blocks.0.mlp"]}, images=None)
    page = Page(render(tmp_path / "report.html", replace(few, **missing)))
    assert page.sections == [name for name in PICTURES + TABLES if name not in section.split()]


def test_patches_without_images_show_three_rows(tmp_path, data):
    assert len(Page(render(tmp_path / "report.html", replace(data, images=None, neighbours={}))).find("img")) == 3


def test_foreign_text_is_escaped(tmp_path, data):
    evil = '<script>alert("x")</script>'
    curves = {evil: {"residual": [1.0, 0.5, 0.0], "num_units": 8, "cut": 4}}
    sites = [{"path": evil, "kind": evil, "width_before": 4, "width_after": 2}]
    hostile = replace(data, model=evil, method=evil, command=evil, residual_curves=curves, sites=sites)
    text = render(tmp_path / "r.html", replace(hostile, recipe_yaml=evil, environment={evil: evil}, notes=[evil]))
    assert evil not in text and not Page(text).find("script")
    assert "&lt;script&gt;" in text


def test_a_failing_write_leaves_the_old_file(tmp_path, empty, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fill_disk(self, text, encoding):
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(OutputError, match=r"report\.html: can't write the report .*No space left"):
        write_report(path, empty)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_new_file_replaces_the_old_one(tmp_path, empty):
    path = tmp_path / "new" / "report.html"
    write_report(path, empty)
    first = path.read_bytes()
    write_report(path, replace(empty, model="other"))
    assert path.read_bytes() != first
    write_report(path, empty)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_same_data_give_the_same_pictures(data):
    assert figures.draw_residuals(data.residual_curves) == figures.draw_residuals(data.residual_curves)


def test_tokens_that_do_not_fill_the_grid_are_refused(tmp_path, data):
    with pytest.raises(OutputError, match=r"fill a 8 x 9 grid"):
        write_report(tmp_path / "report.html", replace(data, grid=(8, 9)))


def test_patch_colours_share_the_projection_of_the_teacher(data):
    teacher = data.teacher_patches
    teacher_rgb, same_rgb, difference = tiles.patch_colors(teacher, teacher.clone())
    assert torch.equal(teacher_rgb, same_rgb)
    assert difference.max() < 0.02  # black
    # The slow way: singular vectors of the centred tokens span the same three directions.
    rows = (teacher - teacher.mean(dim=(0, 1))).flatten(0, 1).double()
    scores = rows @ torch.linalg.svd(rows, full_matrices=False).Vh[:3].T
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    expected = ((scores - low) / (high - low)).clamp(0, 1)
    found = teacher_rgb.flatten(0, 1)
    for channel in range(3):
        plain = (found[:, channel] - expected[:, channel]).abs().max()
        flipped = (found[:, channel] - (1 - expected[:, channel])).abs().max()
        assert min(plain, flipped) < 1e-5  # a direction's sign is free, and flips its scale


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (None, "", "\N{EN DASH}"),
        (float("nan"), "", "\N{EN DASH}"),
        (4.349e9, "parameters", "4.35B"),
        (999.6e6, "parameters", "1B"),
        (4.61e9, "MACs per image", "4.61G"),
        (1.1e12, "MACs per image", "1.1T"),
        (22_056_576, "parameters", "22.1M"),
        (9999.9, "", "10k"),
        (81.1, "top-1 (%)", "81.10"),
        (0.118432, "relative error", "0.1184"),
    ],
)
def test_numbers_are_written_for_people(value, name, text):
    assert picture.format_number(value, name=name) == text
