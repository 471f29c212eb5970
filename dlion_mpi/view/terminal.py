"""A terminal to draw in: which one, its size, and frames that replace each other in it.

The cursor stays visible, below the frame. So a program that is killed leaves a terminal that works.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len

LAUNCHERS = frozenset(
    {"mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "prun", "mpiexec.hydra", "hydra_pmi_proxy", "dlion"}
)
"""Programs that start ranks, as the kernel names them (15 characters at most). `dlion` is `dlion launch`."""
SIZE = (80, 24)
"""Columns and lines where the size is unknown."""
LAST_FRAME_S = 2.0
"""Longest wait for the last frame: a stopped terminal (Ctrl-S) accepts nothing."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Terminal:
    """A terminal. ``job``: a process; nothing is drawn while its job is in the background. 0: always draw."""

    descriptor: int
    encoding: str
    job: int

    def size(self) -> tuple[int, int]:
        """The current columns and lines, at least 1 each."""
        try:
            columns, rows = os.get_terminal_size(self.descriptor)
        except OSError:
            columns, rows = 0, 0
        fallback = [os.environ.get(name, "") for name in ("COLUMNS", "LINES")]
        known = [int(text) if text.isdecimal() else default for text, default in zip(fallback, SIZE, strict=True)]
        return max(1, columns or known[0]), max(1, rows or known[1])

    def foreground(self) -> bool:
        """Whether the job is in the foreground, or its state is unknown."""
        found = _process(self.job)
        return found is None or found.foreground

    def write(self, text: str) -> None:
        """Write the text, in one piece if the terminal accepts that. Raises OSError if the terminal is gone."""
        data = text.encode(self.encoding, errors="replace")
        while data:
            data = data[os.write(self.descriptor, data) :]


def terminal_of(stream: TextIO) -> Terminal | None:
    """The terminal of a stream; None if the stream is redirected or the terminal cannot place its cursor."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return None
    try:
        return terminal_on(stream, _launcher() or os.getpid()) if stream.isatty() else None
    except (OSError, ValueError):  # closed, or has no descriptor
        return None


def terminal_on(stream: TextIO, job: int = 0) -> Terminal:
    """Treat a stream as a terminal, whatever it is. Raises OSError for a stream without a descriptor."""
    return Terminal(stream.fileno(), stream.encoding or "utf-8", job)


def launchers_terminal() -> Terminal | None:
    """The terminal of the `mpirun` that started this process; None if its error output is redirected.

    `mpirun` reads the output of its ranks through pipes, so a rank's own streams do not tell. This needs /proc, and
    works only on the node of the launcher.
    """
    launcher = _launcher()
    if os.environ.get("TERM", "dumb") == "dumb" or not launcher:
        return None
    try:
        descriptor = os.open(f"/proc/{launcher}/fd/2", os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return None
    if not os.isatty(descriptor):
        os.close(descriptor)
        return None
    return Terminal(descriptor, sys.stderr.encoding or "utf-8", launcher)


def _launcher() -> int:
    """The outermost launcher above this process; 0 if there is none."""
    pid, launcher = os.getppid(), 0
    while (process := _process(pid)) is not None and process.name in LAUNCHERS:
        pid, launcher = process.parent, pid
    return launcher


@dataclass(frozen=True, slots=True)
class _Process:
    name: str
    parent: int
    foreground: bool


def _process(pid: int) -> _Process | None:
    """A process as /proc describes it; None if it is not there."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").partition("(")[2].rpartition(")")
    except OSError:
        return None
    _, parent, group, _, _, terminals_group, *_ = rest.split()
    return _Process(name, int(parent), int(terminals_group) in (-1, 0, int(group)))


class Painter:
    """Draws frames over each other below the other output of a terminal. Safe for several threads."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._frame = ""
        self._lock = threading.Lock()

    def paint(self, frame: str) -> None:
        """Replace the frame. Its lines must fit the terminal. Raises OSError if the terminal is gone."""
        if not self._terminal.foreground():
            return
        with self._lock:
            self._terminal.write(f"{self._erase()}{frame}\n")
            self._frame = frame

    def clear(self) -> None:
        """Erase the frame."""
        with self._lock:
            self._terminal.write(self._erase())
            self._frame = ""

    def print_above(self, text: str) -> None:
        """Print complete lines above the frame. They stay."""
        with self._lock:
            self._terminal.write(f"{self._erase()}{text}{self._frame}\n" if self._frame else text)

    def _erase(self) -> str:
        """The characters that erase the frame. A terminal that became narrower has wrapped its lines."""
        if not self._frame:
            return ""
        width, height = self._terminal.size()
        widths = [cell_len(_COLOUR.sub("", line)) for line in self._frame.split("\n")]
        rows = sum(max(1, math.ceil(line / width)) for line in widths)
        return f"\r\x1b[{min(rows, height)}A\x1b[J"

    @contextlib.contextmanager
    def below_messages(self) -> Iterator[None]:
        """Print what this process writes to stderr during the block above the frame."""
        before = sys.stderr
        own: Any = _LinesAbove(before, self)
        sys.stderr = own
        try:
            yield
        finally:
            if sys.stderr is own:
                sys.stderr = before
            own.finish()


class _LinesAbove:
    """Replaces stderr: gives complete lines to a painter, and behaves like the stream otherwise."""

    def __init__(self, stream: TextIO, painter: Painter) -> None:
        self._stream, self._painter, self._rest = stream, painter, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Print the lines that are complete."""
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            try:
                self._painter.print_above(lines + newline)
            except OSError:
                self._stream.write(lines + newline)
        return len(text)

    def flush(self) -> None:
        """Do nothing: complete lines are printed at once, an incomplete one waits for its end."""

    def finish(self) -> None:
        """Print an incomplete last line."""
        if self._rest:
            self._stream.write(self._rest)
            self._stream.flush()


class View:
    """Draws frames in its own thread.

    ``frame``: makes a frame for a width and a height. ``every_s``: seconds between frames. ``stays``: whether the last
    frame remains. Drawing ends when a frame cannot be made or the terminal is gone; then `failure` is set.
    """

    def __init__(
        self, terminal: Terminal, frame: Callable[[int, int], str], every_s: float, *, stays: bool = False
    ) -> None:
        self.painter = Painter(terminal)
        self.failure: Exception | None = None
        self._terminal, self._frame, self._every_s, self._stays = terminal, frame, every_s, stays
        self._finish = threading.Event()
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draw during the block."""
        with self.painter.below_messages():
            self._thread.start()
            try:
                yield
            finally:
                self._finish.set()
                self._thread.join(LAST_FRAME_S)
        if self.failure is not None and not isinstance(self.failure, OSError):
            sys.stderr.write(f"dlion: the view of the run could not be drawn: {self.failure}\n")

    def _run(self) -> None:
        try:
            while not self._finish.wait(self._every_s):
                self._draw()
            if self._stays:
                self._draw()
            else:
                self.painter.clear()
        except Exception as failure:  # it must not end a healthy run
            self.failure = failure

    def _draw(self) -> None:
        width, height = self._terminal.size()
        self.painter.paint(self._frame(max(1, width - 1), max(1, height - 1)))
