"""Text from outside that a terminal would obey: colours, titles, the clipboard, another order."""

import pytest
import yaml
from helpers.terminal import obeyed

from opsd.cli.main import main
from opsd.common.display import Display
from opsd.common.errors import UserError

SEQUENCES = [
    "\x1b[2J", "\x1b[31m", "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x1b]8;;http://x\x1b\\",
    "\x1bP1$r0m\x1b\\", "\x1b_x\x1b\\", "\x1b^x\x1b\\", "\x1bc", "\x9b2J", "\x9d0;t\x9c", "\r",
    "\b", "\n", "\v", "\f", "\t", "\x7f", "\u2028", "\u2029", "\u202e", "\u2066", "\u200b",
    "\u200d", "\ufeff", "[bold]", "[link=http://x]", "[/]", "\x1b[?1049h",
    "\x1b]1337;File=:aGk=\x07",
    "\x1b[6n", "\x1b[5i", "\x1bZ", "\x1b#8", "\x0e", "\x05", "\x84", "\x85", "\u061c", "\u200e",
    "\u2060",
    "\u00ad", "\u034f", "\u180e", "\u3164", "\ufe0f", "\U000e0041", "\U000e0100", "\ufff9",
    "\ufffe",
    "\x1b\x1b[", "\x1b", "\x9b", "e" + "\u0301" * 99, "[red]a[/red]", "\\[bold]",
]  # fmt: skip


def hostile_text(draw) -> str:
    """Words with sequences and control characters in between."""
    pieces = [
        *SEQUENCES,
        "a",
        "word ",
        "é",
        "数",
        chr(draw.randrange(32)),
        chr(draw.randrange(160)),
    ]
    return "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 12)))


@pytest.fixture
def config(tmp_path):
    return tmp_path / "c.yaml"


def test_an_error_line_holds_no_control_character(draw, config, capsys):
    config.write_text(yaml.safe_dump({"model": {"path": "m"}, hostile_text(draw): 1}))
    assert main(["train", str(config)]) == 1
    line = capsys.readouterr().err
    assert line.startswith("opsd: ") and obeyed(line) == ["\n"]


def test_errors_and_what_a_model_writes_are_not_obeyed(tmp_path, capsys, monkeypatch):
    text = "".join(SEQUENCES)

    def fails(*_):
        raise UserError(text)

    monkeypatch.setattr("opsd.cli.report.run", fails)
    assert main(["report", str(tmp_path)]) == 1
    assert obeyed(capsys.readouterr().err) == ["\n"]


def test_a_chat_shows_what_it_does_not_obey(files, capsys, monkeypatch):
    text, asked = "".join(SEQUENCES), iter(["1+1"])

    def ends(streamer):
        streamer.on_finalized_text(text, stream_end=True)

    monkeypatch.setattr("builtins.input", lambda *_: next(asked, None) or _end())
    monkeypatch.setattr("transformers.TextStreamer.put", lambda *_: None)
    monkeypatch.setattr("transformers.TextStreamer.end", ends)
    assert main(["chat", str(files[0]), "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "]0;title" in shown and set(obeyed(shown)) == {"\n"}


def _end():
    raise EOFError


def test_a_display_shows_what_it_does_not_obey(draw, capsys):
    text = hostile_text(draw)
    display = Display()
    display.note(text)
    display.table(text, [text], [[text], [""]])
    with display.stage(text) as stage:
        stage.advance(**{text: text})
    assert set(obeyed(capsys.readouterr().out)) == {"\n"}
