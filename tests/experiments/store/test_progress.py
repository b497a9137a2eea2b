"""Progress in a pipe is a line now and then, and not a flood."""

import sys

import pytest

from experiments.store import progress
from experiments.store.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
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


def test_the_rate_is_that_of_this_session(clock, capsys):
    with Progress("run", 1000, "updates", done=100) as shown:
        clock[0] = 10.0
        shown.advance(50)
        assert shown.rate == 5.0
        shown.say("stopped")
    said = capsys.readouterr()
    assert said.out == "stopped\n" and said.err == ""


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("run", 10, "updates") as shown:
        shown.advance(10, "loss 0.5")
    assert "10/10" in capsys.readouterr().err


def test_a_process_that_does_not_speak_is_silent(clock, capsys):
    with Progress("run", 10, "updates", shown=False) as progress:
        clock[0] = 100.0
        progress.advance(5)
    assert capsys.readouterr().err == ""
