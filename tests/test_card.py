"""Model cards: what comes from outside is text there, whatever it holds."""

import re

import pytest
from markdown_it import MarkdownIt  # comes with rich

from vitrim.config.recipe import Recipe
from vitrim.config.yaml_files import read_yaml
from vitrim.metrics.record import Metrics, ModelCost
from vitrim.models.origin import Origin
from vitrim.output.card import licence_of, write_card

EVIL = "x\n---\nlicense: mit\n# Heading\n```\n<script>1</script> [a](http://b) ![c](d) | `e` ``f`` $g$ \x1b[2J *h*\n"


def card(folder, *, model="digits", licence="mit", data="photos", note="a note", command="vitrim", encoder=""):
    """Front matter and rendered body of a card."""
    environment = {"machine": "cpu", "device": "cpu", "torch": "2", "command": command}
    size = {"before": ModelCost(parameters=2), "after": ModelCost(parameters=1)}
    metrics = Metrics(model=model, method="dgmr", encoder=encoder, notes=(note,), environment=environment, **size)
    origin = Origin(name=model, config={"pretrained_cfg": {"license": licence}})
    write_card(folder, origin, Recipe(data=data), metrics)
    _, head, body = re.split(r"^---\n", (folder / "README.md").read_text(), maxsplit=2, flags=re.MULTILINE)
    return read_yaml(head, where="head"), MarkdownIt("gfm-like", {"linkify": False}).render(body)


@pytest.mark.parametrize("where", ["model", "licence", "data", "note", "command", "encoder"])
def test_what_comes_from_outside_is_text(tmp_path, where):
    usual, usual_page = card(tmp_path)
    head, page = card(tmp_path, **{where: EVIL})
    assert head.keys() == usual.keys() and (head == usual or where == "licence")
    for tag in ("h1", "h2", "script", "img", "a", "em", "pre", "li", "hr", "td"):
        count = len(re.findall(f"<{tag}[ >/]", page))
        assert count == len(re.findall(f"<{tag}[ >/]", usual_page)), tag
    assert "Heading" in page and "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlanguage: no\nlicense: mit\n---\n# A", "mit"),
        ("---\nlicense: other\n---\n", None),
        ("---\nlicense: [a]\n---\n", None),
        ("---\nlicense: mit\nlicense: gpl\n---\n", None),
        ("---\n" + "\n".join(f"{b}: &{b} [{f'*{a},' * 9}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)), None),
        ("---\na: &a {x: 1}\nb: {<<: [*a, *a]}\nlicense: mit\n---\n", None),
        ('---\nlicense: "a\\nb\\u001b[2J"\n---\n', "a b [2J"),
        ("---\nlicense: " + "x" * 500 + "\n---\n", "x" * 80),
        ("---\nx: " + "x" * 10**6 + "\nlicense: mit\n---\n", None),
        ("no front matter", None),
    ],
    ids=range(10),
)
def test_the_licence_of_another_card_is_read_by_the_one_reader(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    assert licence_of(Origin(name="x", folder=str(tmp_path))) == found


def test_a_card_that_can_not_be_read_is_said(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense: gpl\n---\n")
    licence_of(Origin(name="x", folder=str(tmp_path)))
    assert "'license' is there twice" in caplog.text and "The licence in it is not carried over" in caplog.text
