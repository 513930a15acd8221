"""The terminal display: plain lines on a pipe, live bars on a terminal, and both left in order."""

# ruff: noqa: RUF001 - dashes and minus signs for people to read are meant as such

import io
import os
import re
import subprocess
import sys
import time

import pytest

from opsd.common.display import Display
from opsd.common.format import duration, labelled, number, percent, shown, size


class FakeTerminal(io.StringIO):
    """A file that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    """`time.monotonic` that a test moves by hand."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return FakeTerminal()


@pytest.fixture
def pipe(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return io.StringIO()


def test_pipe_gets_at_most_one_line_every_ten_seconds(pipe, clock):
    with Display(file=pipe).stage("Train", total=24) as stage:
        for _ in range(24):
            clock.now += 3.0
            stage.advance(divergence=0.2134, tokens_per_second=310.4)
    lines = pipe.getvalue().splitlines()
    assert lines[0] == "Train …"
    assert lines[1] == "Train: 4/24, 1 min 00 s left, divergence 0.213, 310 tokens/s"
    assert lines[-1] == "Train: done in 1 min 12 s, divergence 0.213, 310 tokens/s"
    assert len(lines) == 2 + 6  # 72 seconds in steps of 3: one line every 12 seconds
    assert "\x1b" not in pipe.getvalue()


def test_resumed_stage_counts_the_eta_from_where_it_started(pipe, clock):
    with Display(file=pipe).stage("Train", total=100) as stage:
        stage.update(completed=80)
        assert stage.remaining is None
        clock.now += 10
        stage.advance(5)
        assert stage.remaining == pytest.approx(30)
        clock.now += 4  # the ETA counts down between steps
        assert stage.remaining == pytest.approx(26)
        clock.now += 400
        assert stage.remaining is None  # it takes longer; not "0.0 s left" for minutes


def test_eta_of_a_count_that_is_set_starts_with_the_first_one(pipe, clock):
    with Display(file=pipe).stage("Train", total=10) as stage:
        for step in (1, 2):
            clock.now += 12
            stage.update(completed=step)
        assert stage.remaining == pytest.approx(8 * 12)


def test_eta_counts_every_advance(pipe, clock):
    with Display(file=pipe).stage("Train", total=10) as stage:
        clock.now += 10
        stage.advance()
        assert stage.remaining == pytest.approx(90)


def test_failed_and_interrupted_stages_say_so_and_pass_the_exception_on(pipe, clock):
    display = Display(file=pipe)
    for error, words in ((KeyboardInterrupt, "interrupted after"), (RuntimeError, "failed after")):
        with pytest.raises(error), display.stage("Outer"), display.stage("Inner") as stage:
            stage.advance(accuracy=0.5)
            raise error
        last = pipe.getvalue().splitlines()[-2:]
        assert last == [f"  Inner: {words} 0.0 s, accuracy 50.0 %", f"Outer: {words} 0.0 s"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_terminal_cursor_and_streams_are_restored(terminal, error):
    streams = sys.stdout, sys.stderr
    display = Display(file=terminal)
    try:
        with display.stage("Outer", total=3) as outer, display.stage("Inner") as inner:
            outer.advance(divergence=0.25)
            inner.advance(accuracy=0.5)
            if error:
                raise error
    except (KeyboardInterrupt, RuntimeError):
        pass
    written = terminal.getvalue()
    assert written.count("\x1b[?25l") == 1  # one live region, hidden cursor
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")  # and shown again after it
    assert (sys.stdout, sys.stderr) == streams
    assert "divergence 0.250" in written and "accuracy 50.0 %" in written
    assert "━" in written


def test_terminal_shows_user_text_literally(terminal):
    display = Display(file=terminal)
    display.note("[bold]not markup[/bold] :smile:")
    display.table("Title [x]", ["[red]name"], [["[/red]"]])
    with display.stage("[green]stage"):
        pass
    written = terminal.getvalue()
    for text in ("[bold]not markup[/bold] :smile:", "Title [x]", "[red]name", "[/red]"):
        assert text in written
    assert "[green]stage" in written


def test_table_on_a_pipe_aligns_numbers_right_and_words_left(pipe):
    Display(file=pipe).table(
        "Result", ["Method", "Accuracy"], [["base", "41.0 %"], ["OPSD", "100.0 %"], ["x", "–"]]
    )
    assert pipe.getvalue() == (
        "Result\n  Method  Accuracy\n  base      41.0 %\n  OPSD     100.0 %\n  x              –\n"
    )


def test_paths_are_relative_below_the_working_directory(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"report": tmp_path / "run" / "report.html", "model": tmp_path.parent / "elsewhere"}
    Display(file=pipe).paths("Written", paths)
    lines = pipe.getvalue().splitlines()
    assert lines[1] == f"  report  {os.path.join('run', 'report.html')}"
    assert lines[2] == f"  model   {(tmp_path.parent / 'elsewhere').resolve()}"


def test_long_paths_are_not_broken_on_a_terminal(terminal, tmp_path):
    path = tmp_path / ("a" * 60) / ("b" * 60)
    Display(file=terminal).paths("Written", {"report": path})
    assert str(path.resolve()) in terminal.getvalue()


def test_lines_end_between_words_on_a_terminal(terminal):
    advice, overrides = "one two three four " * 8, "train.steps=5 output.dir=runs/x " * 5
    path = "a/long/path/of/some/file" * 5
    display = Display(file=terminal)
    display.note(f"  {advice}\n  {advice}\n{overrides.strip()}")
    display.note(f"It is in {path}")
    lines = [line.rstrip() for line in terminal.getvalue().splitlines()]
    said = [line for line in lines if line.strip() and "=" not in line and path not in line]
    assert len(said) == 4 and all(len(line) <= 80 and line.startswith("  ") for line in said)
    assert {word for line in said for word in line.split()} == {*advice.split()}
    assert overrides.strip() in lines and f"It is in {path}" in lines


def test_a_table_that_is_too_wide_lies_on_its_side(terminal):
    columns = ["method", *(f"measure-{number}" for number in range(8))]
    rows = [[name, *"12345678"] for name in ("opsd", "grpo")]
    Display(file=terminal).table("Runs", columns, rows)
    lines = [line.split() for line in terminal.getvalue().splitlines()]
    assert ["measure-7", "8", "8"] in lines


def test_quiet_writes_nothing(terminal):
    display = Display(quiet=True, file=terminal)
    with display.stage("Train", total=3) as stage:
        stage.advance(loss=1.0)
    display.note("note")
    display.table("t", ["a"], [["b"]])
    display.paths("p", {})
    assert terminal.getvalue() == ""


def test_a_pipe_that_knows_only_ascii_is_no_error(pipe):
    raw = io.BytesIO()
    display = Display(file=io.TextIOWrapper(raw, encoding="ascii"))
    display.note("≥ 0.10")
    assert raw.getvalue().strip() == b"? 0.10"


def test_importing_the_display_does_not_import_rich():
    code = "import sys, opsd.common.display; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_bytes_are_counted_as_megabytes(pipe, clock):
    stage = Display(file=pipe).stage("Download", total=93_100_000, unit="bytes")
    stage.completed = 41_230_000
    assert stage.progress() == "41.2 MB of 93.1 MB"


def test_units():
    assert [duration(s) for s in (0.42, 9.96, 59.7, 95, 3599.8, 3725)] == [
        "0.4 s", "10 s", "1 min 00 s", "1 min 35 s", "1 h 00 min", "1 h 02 min",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 1000, 93_100_000, 4.2e9, 3e12)] == [
        "0 B", "999 B", "1 kB", "93.1 MB", "4.2 GB", "3 TB",
    ]  # fmt: skip
    assert [number(x) for x in (25_412, 0.1, 0.21349, 3.0, 12_345.6, float("nan"))] == [
        "25,412", "0.100", "0.213", "3.00", "12,346", "nan",
    ]  # fmt: skip
    assert percent(0.4567) == "45.7 %"
    assert labelled("tokens_per_second", 310.4) == "310 tokens/s"
    assert labelled("truncated_fraction", 0.25) == "truncated 25.0 %"
    assert labelled("peak_memory_bytes", 4.2e9) == "peak memory 4.2 GB"
    assert labelled("divergence", None) == "divergence –"
    assert labelled("method", "opsd") == "method opsd"


# Text from outside.

ACTED_UPON = {
    *map(chr, (*range(32), *range(127, 160), *range(0x200B, 0x2010), *range(0x2028, 0x202F))),
    *map(chr, (*range(0x2060, 0x2065), *range(0x2066, 0x2070), *range(0xE0020, 0xE0080))),
    *"\xad\u061c\u180e\ufeff\udc80",
}
SEQUENCES = [
    "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x1b]8;;http://x\x1b\\text\x1b]8;;\x1b\\", "\x1b[2J",
    "\x9b31m", "\x1bP$q\x1b\\", "\x9d0;t\x9c", "[bold]b[/bold]", "[link=http://x]l[/link]", "[/]",
    ":smile:", "a\r\nopsd: all is well",
]  # fmt: skip


def everything(display: Display, text: str, directory) -> None:
    """Shows a text in every place that a display has, but a note, which may have several lines."""
    display.table(f"{text}0", [f"{text}1", "b"], [[f"{text}2", "1"], ["c", f"{text}3"]])
    display.paths(f"{text}4", {f"{text}5": directory / text.replace("\0", "").replace("/", "")})
    with display.stage(f"{text}6", total=2, unit=text) as stage:
        stage.advance(**{text: f"{text}7"})
        if display._live is not None:  # else drawn four times a second
            display._live.refresh()


@pytest.mark.parametrize("text", ["".join(sorted(ACTED_UPON)), *SEQUENCES])
@pytest.mark.parametrize("place", ["terminal", "pipe"])
def test_text_from_outside_does_nothing(text, place, request, tmp_path, monkeypatch):
    file = request.getfixturevalue(place)
    monkeypatch.setenv("COLUMNS", "9000")
    display = Display(file=file)
    display.note(f"{text}8")
    noted = file.getvalue()
    everything(display, text, tmp_path)
    written = noted.replace("\n", "") + file.getvalue()[len(noted) :]
    assert not any(line.startswith("opsd:") for line in file.getvalue()[len(noted) :].splitlines())
    if place == "terminal":  # what rich writes itself: styles, the bars' place, the paths' links
        rich = r"\x1b\]8;(id=\d+;file://[!-~]*|;)\x1b\\|\x1b\[[\d;]*[mKA]|\x1b\[\?25[lh]|\r"
        written = re.sub(rich, "", written)
    assert set(written) & ACTED_UPON == {"\n"}
    escaped = "".join(c.encode("unicode_escape").decode() if c in ACTED_UPON else c for c in text)
    for place in "01234567" + "8" * ("\n" not in text):
        assert f"{escaped}{place}" in written


def test_what_is_printable_stays():
    text = "Ünïcödé 数学 שלום \N{NO-BREAK SPACE}\N{THIN SPACE}½ 👍 e\N{COMBINING ACUTE ACCENT}"
    assert shown(text) == text
