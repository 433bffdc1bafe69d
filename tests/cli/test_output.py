"""What is drawn where: bars on a terminal only, colours as the user says, one JSON document."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from rootward.cli import output
from rootward.cli.output import Talk, clean, duration, size, snippet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


def work(talk: Talk, screen: Terminal) -> None:
    with redirect_stderr(screen):
        for done in range(11):
            talk.progress("documents", done, 10)
        talk.stop()


def test_a_bar_with_the_time_left_on_a_terminal(screen: Terminal):
    work(Talk(), screen)
    assert "documents" in screen.getvalue()
    assert "10/10" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


@pytest.mark.parametrize("options", [{"quiet": True}, {"as_json": True}])
def test_no_bar_when_it_was_not_wanted(screen: Terminal, options: Any):
    work(Talk(**options), screen)
    assert screen.getvalue() == ""


def test_no_bar_on_a_dumb_terminal(screen: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    work(Talk(), screen)
    assert screen.getvalue() == ""


def test_elsewhere_one_line_in_half_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: clock[0])
    talk = Talk()
    for done in range(101):
        talk.progress("index", done, 100)
        clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["index: 30 of 100, 1 min 10 s left", "index: 60 of 100, 40 s left", "index: 90 of 100, 10 s left"]


def test_colours_on_a_terminal_unless_it_is_not_wanted(screen: Terminal, monkeypatch: pytest.MonkeyPatch):
    colour = re.compile(r"\x1b\[[0-9;]*[39][0-7]m")
    work(Talk(), screen)
    assert colour.search(screen.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    work(Talk(), plain)
    assert "documents" in plain.getvalue()
    assert not colour.search(plain.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    dumb = Terminal()
    with redirect_stdout(dumb):
        Talk().table([("a", "left")], [("x",)], title="t")
    assert "\x1b" not in dumb.getvalue()


@pytest.mark.parametrize(("force", "coloured"), [(None, False), ("1", True)])
def test_colours_in_a_pipe_only_when_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], force: str | None, coloured: bool
):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if force:
        monkeypatch.setenv("FORCE_COLOR", force)
    Talk().table([("a", "left")], [("x",)], title="t")
    assert ("\x1b[" in capsys.readouterr().out) == coloured


def test_markup_and_control_characters_are_only_text(capsys: pytest.CaptureFixture[str]):
    Talk().table(
        [("n", "right"), ("text", "left")], [(1, "[red]a[/red] [link=x]\x1b]0;owned\x07\x9b31m\r\u202eb\u200b")]
    )
    out = capsys.readouterr().out
    assert "[red]a[/red] [link=x]\\x1b]0;owned\\x07\\x9b31m \\u202eb\\u200b" in out


def test_clean_snippet_duration_size():
    assert clean("a\nb", lines=True) == "a\nb"
    assert clean("a\nb\tc\x00") == "a b c\\x00"
    assert clean("\ud800\ue000") == "\\ud800\\ue000"
    assert snippet("a  b\n" * 100, 9) == "a b a b …"
    assert snippet("né 日本", 9) == "né 日本"
    assert [duration(s) for s in (0.44, 12, 200, 7500)] == ["0.4 s", "12 s", "3 min 20 s", "2 h 5 min"]
    assert [size(n) for n in (12, 1500, 2e6, 3e9, 4e12)] == ["12 B", "1.5 kB", "2.0 MB", "3.0 GB", "4.0 TB"]


def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    talk = Talk(as_json=True)
    talk.say("a table")
    talk.table([("a", "left")], [("x",)])
    talk.result("x", {"a": "\x1b"})
    assert capsys.readouterr().out == '{\n "schema_version": 1,\n "command": "x",\n "a": "\\u001b"\n}\n'
