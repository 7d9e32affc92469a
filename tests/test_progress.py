"""Plain lines and bars: what they count, and a part of the work with a count of its own."""

import pytest

from vitrim import progress as module
from vitrim.progress import Progress, progress


def test_plain_lines_say_how_far_and_how_long(capsys, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_INTERVAL_S", 0.0)
    with progress("cut", 2) as bar:
        bar.advance(1, "blocks.0")
        bar.advance()
    said = capsys.readouterr()
    assert said.out == "" and said.err == "cut: 1/2, 0 s left blocks.0\ncut: 2/2 blocks.0\n"


def test_what_can_not_be_counted_is_said_before_it_begins(capsys):
    with progress("write", 0) as bar:
        bar.say("weights")
        for _ in bar.track("ab", "files"):
            pass
        bar.say("report")
    assert capsys.readouterr().err == "write: weights\nwrite: 2/2 files\nwrite: report\n"


@pytest.mark.parametrize(("term", "bar"), [("xterm", module._Bar), ("dumb", module._Plain)])
def test_a_terminal_that_can_only_print_gets_lines(monkeypatch, term, bar):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", term)
    with progress("cut", 1) as shown:
        assert type(shown) is bar


def test_few_plain_lines_where_work_is_quick_and_none_where_it_is_to_be_quiet(capsys):
    with progress("cut", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert capsys.readouterr().err.count("\n") == 2  # the first and the last
    with progress("cut", 2, quiet=True) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stop", [False, True])
def test_a_part_counts_by_itself_and_one_inside_it_not_at_all(stop):
    seen = []

    class Seen(Progress):
        def show(self):
            seen.append((self.done, self.total, self.words))

    bar = Seen("amp", 0)
    bar.advance(1, "first edit")
    for number in bar.track(range(3), "rounds"):
        assert list(bar.track("ab", "images")) == ["a", "b"]
        if stop and number == 1:
            break
    bar.advance()
    assert seen == [
        (1, 0, "first edit"),
        *((n, 3, "rounds") for n in ((1,) if stop else (1, 2, 3))),
        (2, 0, "first edit"),
    ]


def test_the_bar_takes_over_the_count_of_a_part():
    bar = module._Bar("fips", 0)
    (task,) = bar.bars.tasks
    assert task.total is None
    for _ in bar.track(range(4), "steps"):
        pass
    assert (task.total, task.completed, task.fields["words"]) == (4, 4, "steps")
