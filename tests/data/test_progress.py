from __future__ import annotations

import io
import sys

from peft_modal.data.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    now = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr("peft_modal.data.progress.time.monotonic", lambda: next(now))
    with progress("latents", 20) as advance:
        for _ in range(4):
            advance(5)
    assert capsys.readouterr().err == "latents 10/20\nlatents 20/20\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress("latents", 4) as advance:
        advance(4)
    assert "latents" in stream.getvalue()
    assert "100%" in stream.getvalue()


def test_nothing_to_do_shows_nothing(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("latents", 0):
        pass
    assert stream.getvalue() == ""
