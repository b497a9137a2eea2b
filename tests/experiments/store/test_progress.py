"""Progress in a pipe is an occasional line; in a terminal it is a bar."""

import errno
import io
import re
import sys

import pytest
import tqdm.std

from experiments.store import progress
from experiments.store.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock whose seconds a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_every_thirty_seconds(clock, capsys):
    with Progress("run", 1000, "updates", done=100) as shown:
        for second in range(1, 91):
            clock[0] = float(second)
            shown.advance(2, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "run: 160 of 1,000 updates, loss 0.5, 0:07:00 to go",
        "run: 220 of 1,000 updates, loss 0.5, 0:06:30 to go",
        "run: 280 of 1,000 updates, loss 0.5, 0:06:00 to go",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_rate_is_that_of_this_session_without_its_compilation(
    terminal, clock, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with Progress("run", 1000, "updates", done=100, leave=False) as shown:
        clock[0] = 10.0
        shown.advance(50)
        assert shown.rate == 0.0
        clock[0] = 20.0
        shown.advance(50)
        assert shown.rate == 5.0
        shown.say("stopped")
    said = capsys.readouterr()
    assert said.out == "stopped\n" and (terminal or said.err == "")


def test_the_time_to_go_of_rare_units_goes_by_the_whole_session(clock, capsys):
    """A unit that ends between two lines does not stand for the speed of all."""
    with Progress("campaign A", 9, "runs") as shown:
        for second in range(0, 631, 10):
            clock[0] = float(second)
            shown.advance(int(second == 600), "1 at work")
    said = capsys.readouterr().err.splitlines()
    begins = "campaign A: 1 of 9 runs, 1 at work"
    assert said[-2:] == [f"{begins}, 1:20:00 to go", f"{begins}, 1:24:00 to go"]


def test_work_that_does_not_advance_says_no_time_to_go(clock, capsys):
    with Progress("campaign A", 9, "runs") as shown:
        clock[0] = 40.0
        shown.advance(0, "7 at work")
    assert capsys.readouterr().err == "campaign A: 0 of 9 runs, 7 at work\n"


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_bar_fits_its_terminal(columns, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(tqdm.std, "_screen_shape_wrapper", lambda: lambda file: (columns, 25))
    name, text = "mnist-m4/steps3000-batch128-width0.25-seed0 and 2 more", "loss 0.531"
    text += ", 93.1% right, margin 35%, 1012/s"
    with Progress(name, 18_000, "updates") as shown:
        shown.advance(12_345, text)
    bars = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert max(map(len, bars)) <= columns
    if columns >= 80:
        assert (
            bars[-2].endswith(text) and "12345/18000" in bars[-2] and bars[-2].startswith("mnist")
        )


def test_a_terminal_that_is_gone_does_not_end_the_work(clock, capsys, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", Gone())
    with Progress("run", 1000, "updates") as shown:
        for second in range(1, 91):
            clock[0] = float(second)
            shown.advance(2)
            shown.say("warning: run is collapsing")


def test_days_are_shown_as_hours():
    assert progress.hours(100 * 3600 + 5 * 60 + 7) == "100:05:07"
    assert progress.hours(59.6) == "0:01:00"


def test_tracking_yields_the_items(clock, capsys):
    seen = []
    for item in progress.tracked("abcd", 4, "work", "letters"):
        clock[0] += 20.0
        seen.append(item)
    assert seen == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "work: 2 of 4 letters, 0:00:40 to go",
        "work: 4 of 4 letters, 0:00:00 to go",
    ]


def test_progress_that_is_not_shown_is_silent(clock, capsys):
    with Progress("run", 10, "updates", shown=False) as progress:
        clock[0] = 100.0
        progress.advance(5)
    assert capsys.readouterr().err == ""
