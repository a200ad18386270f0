import io

import pytest
from rich.console import Console

from microdit import terminal


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def minutes_of_work(clock, monkeypatch, **console) -> str:
    """Three minutes, a step a second; what is printed before the end."""
    file = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=file, width=80, **console))
    with terminal.progress("encode a folder with a long name, which takes its place", 180) as advance:
        for _ in range(180):
            clock[0] += 1
            advance(1, "loss 0.5")
        return file.getvalue()


def test_a_file_gets_a_line_after_ten_seconds_and_one_each_minute(clock, monkeypatch):
    lines = minutes_of_work(clock, monkeypatch).splitlines()
    assert [line.split("  ")[1].split("/")[0].strip() for line in lines] == ["10", "70", "130"]
    assert all(line.startswith("encode a folder") and "/180" in line and "loss 0.5" in line and "━" not in line for line in lines)


def test_a_terminal_gets_its_bar_alone(clock, monkeypatch):
    assert "\n" not in minutes_of_work(clock, monkeypatch, force_terminal=True).replace("\r", "").strip("\n")


def test_a_quiet_console_gets_nothing(clock, monkeypatch):
    assert minutes_of_work(clock, monkeypatch, quiet=True) == ""
