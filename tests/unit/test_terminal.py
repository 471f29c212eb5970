"""Frames replace each other in a terminal, messages stay, and no terminal holds up or ends a run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator

import pytest

from dlion_mpi.config.options import Config
from dlion_mpi.view import live, terminal
from dlion_mpi.view.terminal import Painter, Terminal, View, _Process, launchers_terminal, terminal_of
from tests.screen import Screen


@pytest.fixture
def screen() -> Iterator[Screen]:
    made = Screen(40, 10)
    yield made
    made.close()


def of(screen: Screen) -> Terminal:
    return Terminal(screen.end, "utf-8", 0)


def read(screen: Screen) -> list[str]:
    screen.read_until(lambda: not screen_has_more(screen))
    return screen.lines()


def screen_has_more(screen: Screen) -> bool:
    before = len(screen.raw)
    screen.read()
    return len(screen.raw) > before


def test_a_frame_takes_the_place_of_the_one_before(screen: Screen) -> None:
    os.write(screen.end, b"before\n")
    painter = Painter(of(screen))
    painter.paint("one\ntwo\nthree")
    painter.paint("four\nfive")
    assert read(screen) == ["before", "four", "five"]
    painter.clear()
    assert read(screen) == ["before"]


def test_messages_stay_above_the_frame(screen: Screen) -> None:
    painter = Painter(of(screen))
    painter.paint("frame\nof two lines")
    painter.print_above("a message\n")
    painter.paint("another frame")
    painter.print_above("another message\n")
    assert read(screen) == ["a message", "another message", "another frame"]


def test_colours_do_not_count_as_characters(screen: Screen) -> None:
    painter = Painter(of(screen))
    painter.paint("\x1b[31m" * 20 + "red\x1b[0m")
    painter.paint("again")
    assert read(screen) == ["again"]


def test_at_the_lower_end_the_frame_scrolls_and_is_still_replaced(screen: Screen) -> None:
    os.write(screen.end, b"\n".join(b"line %d" % n for n in range(9)) + b"\n")
    painter = Painter(of(screen))
    for n in range(4):
        painter.paint("\n".join(f"{n}{row}" for row in range(5)))
    assert read(screen) == [*(f"line {n}" for n in range(9)), *(f"3{row}" for row in range(5))]


def test_a_frame_whose_lines_a_narrower_terminal_has_broken_is_taken_away_whole(screen: Screen) -> None:
    os.write(screen.end, b"before\n")
    painter = Painter(of(screen))
    painter.paint("x" * 36 + "\n" + "y" * 10)
    read(screen)
    # What a terminal shows that breaks lines when it is made narrower: pyte cuts them off instead.
    broken = Screen(16, 10)
    os.write(broken.end, b"before\n" + b"x" * 16 + b"\n" + b"x" * 16 + b"\n" + b"xxxx\n" + b"y" * 10 + b"\n")
    os.dup2(broken.end, screen.end)
    painter.paint("narrow")
    assert read(broken) == ["before", "narrow"]
    broken.close()


def test_what_is_said_meanwhile_is_seen_above_and_stderr_is_what_it_was_afterwards(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    painter = Painter(of(screen))
    painter.paint("frame")
    with painter.below_messages():
        print("a warn", end="", file=sys.stderr)
        print("ing", file=sys.stderr)
        print("half a line", end="", file=sys.stderr)
        assert not sys.stderr.isatty()  # in all else it is what it stands for
    assert sys.stderr is stream
    assert read(screen) == ["a warning", "frame"]
    assert stream.getvalue() == "half a line"


def shown(screen: Screen, frame: Callable[[int, int], str], *, stays: bool = False) -> View:
    return View(of(screen), frame, 0.01, stays=stays)


def test_a_view_is_drawn_at_the_size_that_the_terminal_has(screen: Screen) -> None:
    view = shown(screen, lambda width, height: f"{width}x{height}", stays=True)
    with view.shown():
        screen.read_until(lambda: screen.shows("39x9"))  # a character and a line are left free
        screen.resize(20, 5)
        screen.read_until(lambda: screen.shows("19x4"))
    assert read(screen)[-1] == "19x4"
    assert b"\x1b[?25l" not in screen.raw  # the cursor was never hidden, so nobody must bring it back


def test_a_view_that_does_not_stay_leaves_nothing(screen: Screen) -> None:
    with shown(screen, lambda width, height: "frame").shown():
        screen.read_until(lambda: screen.shows("frame"))
    assert read(screen) == []


def test_a_frame_that_cannot_be_made_ends_the_view_and_not_the_run(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    view = shown(screen, lambda width, height: f"{1 // 0}")
    with view.shown():
        view._thread.join(10)
    assert capsys.readouterr().err == (
        "dlion: the view of the run could not be drawn: integer division or modulo by zero\n"
    )


def test_a_terminal_that_is_gone_ends_the_view_quietly(screen: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    view = View(Terminal(os.open("/dev/full", os.O_WRONLY), "utf-8", 0), lambda width, height: "frame", 0.01)
    with view.shown():
        view._thread.join(10)
        print("still said", file=sys.stderr)
    assert isinstance(view.failure, OSError)
    assert capsys.readouterr().err == "still said\n"


def test_a_terminal_that_takes_nothing_holds_nobody_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LAST_FRAME_S", 0.1)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 65536)
    os.set_blocking(writing, True)
    view = View(Terminal(writing, "utf-8", 0), lambda width, height: "frame", 0.01, stays=True)
    with view.shown():
        pass
    assert view._thread.is_alive()  # it still tries, and nobody waits for it
    os.close(reading)
    view._thread.join(10)
    assert isinstance(view.failure, BrokenPipeError)
    os.close(writing)


def test_what_is_no_terminal_is_none(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert terminal_of(io.StringIO()) is None
    with open(os.devnull, "w", encoding="utf-8") as null:
        assert terminal_of(null) is None
    with open(os.dup(screen.end), "w", encoding="utf-8") as stream:
        found = terminal_of(stream)
        assert found is not None
        assert found.size() == (40, 10)
        monkeypatch.setenv("TERM", "dumb")
        assert terminal_of(stream) is None
    assert terminal_of(stream) is None  # closed


def test_a_size_that_nobody_knows_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    pipe = Terminal(writing, "utf-8", 0)
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    assert pipe.size() == (80, 24)
    monkeypatch.setenv("COLUMNS", "123")
    monkeypatch.setenv("LINES", "many")
    assert pipe.size() == (123, 24)
    os.close(reading)
    os.close(writing)


def test_nothing_is_drawn_while_the_job_is_in_the_background(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    front = {"now": True}
    monkeypatch.setattr(terminal, "_process", lambda pid: _Process("python", 1, front["now"]))
    painter = Painter(Terminal(screen.end, "utf-8", 42))
    painter.paint("in front")
    front["now"] = False
    painter.paint("behind")
    assert read(screen) == ["in front"]


def test_who_stands_in_the_foreground_is_read_from_proc() -> None:
    assert terminal._process(os.getpid()) is not None
    assert terminal._process(2**30) is None


def test_the_launchers_terminal_is_that_of_the_outermost_launcher(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rank -> proxy (a pipe) -> mpiexec -> dlion launch (the terminal) -> shell (the terminal)."""
    tree = {
        2: _Process("hydra_pmi_proxy", 3, True),
        3: _Process("mpiexec.hydra", 4, True),
        4: _Process("dlion", 5, True),
        5: _Process("bash", 1, True),
    }
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "_process", tree.get)
    monkeypatch.setattr(os, "getppid", lambda: 2)
    asked = []
    device = os.ttyname(screen.end)
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *more: asked.append(path) or original(device, *more))  # type: ignore[func-returns-value]
    found = launchers_terminal()
    assert asked == ["/proc/4/fd/2"]
    assert found is not None
    assert (found.size(), found.job) == ((40, 10), 4)
    monkeypatch.setattr(os, "open", lambda path, *more: original(os.devnull, *more))
    assert launchers_terminal() is None  # mpirun 2> FILE
    monkeypatch.setattr(os, "getppid", lambda: 5)
    assert launchers_terminal() is None  # started by no launcher
    monkeypatch.setattr(os, "getppid", lambda: 2)
    monkeypatch.setenv("TERM", "dumb")
    assert launchers_terminal() is None


def test_the_options_decide_between_view_and_lines(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(live, "launchers_terminal", lambda: None)
    with open(os.dup(screen.end), "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert live.terminal_for(Config()) is not None
        assert live.terminal_for(Config(progress="lines")) is None
        assert live.terminal_for(Config(progress_every=0)) is None
        assert live.terminal_for(Config(progress="live", progress_every=0)) is None
    with open(os.devnull, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert live.terminal_for(Config()) is None
        assert live.terminal_for(Config(progress="live")) is not None
        monkeypatch.setattr(live, "launchers_terminal", lambda: of(screen))
        assert live.terminal_for(Config()) == of(screen)
        assert live.terminal_for(Config(progress="lines")) is None
