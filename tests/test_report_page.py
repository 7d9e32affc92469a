"""The report as a browser shows it: nothing is fetched, all pictures are there, and the keyboard reaches everything."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests.support.reports import report_data, write_run
from vitrim.report.compare import compare_runs
from vitrim.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# What a mouse could use: links, and what scrolls sideways.
REACHABLE = """() => {
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth;
  const found = [...document.querySelectorAll("body *")].filter(e => e.matches("a[href], button, input") || scrolls(e));
  found.forEach((e, i) => e.dataset.number = i);
  return found.map(e => [e.tabIndex, scrolls(e)]);
}"""
PICTURES = """() => [...document.querySelectorAll("svg, img")].map(e => {
  const box = e.getBoundingClientRect(), drawn = e.tagName === "svg" || (e.complete && e.naturalWidth > 0);
  const text = e.tagName === "IMG" ? e.alt : e.getAttribute("role") === "img" ? e.getAttribute("aria-label") : "";
  return {drawn, width: box.width, height: box.height, right: box.right, text};
})"""
WIDTHS = "() => [document.documentElement.scrollWidth, window.innerWidth]"
# The relative luminance of the paper and of the ink, as WCAG has it.
COLOURS = """() => {
  const style = getComputedStyle(document.body);
  return [style.backgroundColor, style.color].map(colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  });
}"""


@pytest.fixture(scope="module")
def data():
    return report_data()


@pytest.fixture(scope="module")
def browser():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", "/tmp")  # Chromium has a socket there, and the path of one ends at 107 letters
        with sync_api.sync_playwright() as playwright:
            own = playwright.chromium.executable_path
            found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", own))), None)
            if found is None:
                pytest.skip("no Chromium here; install one, or run: playwright install chromium")
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            yield browser
            browser.close()


@pytest.fixture(scope="module")
def addresses(data, tmp_path_factory):
    """A page of all parts, with as many images nearest to each query as real ones have, and one of six runs."""
    folder = tmp_path_factory.mktemp("page")
    queries = [{"image": i, "original": [7, 8, 9, 10, 11], "smaller": [7, 8, 9, 6, i]} for i in range(6)]
    thumbnails = {i: torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(12)}
    shown = {"queries": queries, "thumbnails": thumbnails, "labels": dict.fromkeys(thumbnails, 1)}
    full = replace(data, neighbours={**data.neighbours, **shown}, command="vitrim " + 30 * "--option x ")
    write_report(folder / "report.html", full)
    runs = [write_run(folder / f"run-{i}", parameters=400 + 50 * i, error=0.3 - 0.04 * i) for i in range(6)]
    compare_runs(runs, folder / "compare.html")
    for path in folder.glob("*.html"):
        assert path.stat().st_size < 3_000_000
    return {path.stem: path.as_uri() for path in folder.glob("*.html")}


@pytest.fixture
def open_page(browser, addresses):
    """Opens a page; that nothing was fetched and nothing went wrong is checked at the end."""
    contexts, wrong, asked = [], [], []

    def open_page(width, name="report", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(addresses[name])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    asked = [url for url in asked if not url.startswith("data:")]
    assert len(asked) == len(contexts) and set(asked) <= set(addresses.values())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1100])
@pytest.mark.parametrize(("name", "count"), [("report", 7 + 4 + 6 * 11), ("compare", 1)])
def test_every_picture_is_drawn_and_told_in_words(open_page, name, count, width, scheme):
    page = open_page(width, name, color_scheme=scheme)
    pictures = page.evaluate(PICTURES)
    assert len(pictures) == count
    for picture in pictures:
        assert picture["drawn"] and picture["width"] > 20 and picture["height"] > 20 and len(picture["text"]) > 5
    needed, there = page.evaluate(WIDTHS)
    assert needed <= there == width
    paper, ink = page.evaluate(COLOURS)
    assert (paper > ink) == (scheme == "light")
    light, dark = max(paper, ink), min(paper, ink)
    assert (light + 0.05) / (dark + 0.05) > 7


@pytest.mark.parametrize(("name", "width"), [("report", 375), ("report", 1100), ("compare", 375)])
def test_the_keyboard_reaches_what_can_be_used(open_page, name, width):
    page = open_page(width, name)
    reachable = page.evaluate(REACHABLE)
    assert all(index == 0 for index, _ in reachable)
    assert any(scrolls for _, scrolls in reachable) or width > 375
    seen = []
    for _ in range(2 * len(reachable)):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("() => document.activeElement.dataset.number"))
    assert seen[0] == "0" and page.evaluate("() => document.querySelector('[data-number=\"0\"]').className") == "skip"
    assert {int(number) for number in seen if number is not None} == set(range(len(reachable)))


def test_scrolling_by_keyboard_moves_a_wide_picture(open_page):
    page = open_page(375)
    page.focus("#size .plot")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#size .plot').scrollLeft > 0", timeout=5000)


@pytest.mark.parametrize("name", ["report", "compare"])
def test_print_leaves_nothing_outside_the_paper(open_page, name):
    page = open_page(672, name)  # A4 less the margins that the page asks for
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.is_visible("nav")
    assert page.evaluate(COLOURS)[0] == pytest.approx(1)  # white paper, however dark the screen
    assert all(0 < picture["width"] and picture["right"] <= 672 for picture in page.evaluate(PICTURES))
    needed, there = page.evaluate(WIDTHS)
    assert needed <= there
