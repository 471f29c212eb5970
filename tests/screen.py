"""A terminal that can be looked at: a pseudo-terminal, and what it would show."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyte


class Screen:
    """Both ends of a pseudo-terminal; the program writes to ``end``."""

    def __init__(self, columns: int = 100, rows: int = 30) -> None:
        self._own, self.end = os.openpty()
        self._shown = pyte.HistoryScreen(columns, rows, history=500)
        self._stream = pyte.ByteStream(self._shown)
        self.raw = b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """As when its window is made smaller or larger."""
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._shown.resize(rows, columns)

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._own, keys)

    def lines(self) -> list[str]:
        """All that is shown or was scrolled away, as far as anything is written."""
        above = ["".join(row[column].data for column in range(self._shown.columns)) for row in self._shown.history.top]
        shown = [line.rstrip() for line in [*above, *self._shown.display]]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    @property
    def cursor_hidden(self) -> bool:
        """Whether somebody has left the cursor hidden."""
        return bool(self._shown.cursor.hidden)

    def read(self, seconds: float = 0.05) -> bool:
        """Take in what comes within so long. False at the end."""
        if select.select([self._own], [], [], seconds)[0]:
            try:
                data = os.read(self._own, 1 << 16)
            except OSError:  # nobody has the other end any more
                return False
            self.raw += data
            self._stream.feed(data)
            return bool(data)
        return True

    def read_until(self, seen: Callable[[], bool], timeout_s: float = 90) -> None:
        """Take in until something is seen; fails if it never is."""
        deadline_s = time.monotonic() + timeout_s
        while not seen():
            assert self.read(), f"it ended: {self.lines()}"
            assert time.monotonic() < deadline_s, f"in vain: {self.lines()}"

    def read_to_end(self, timeout_s: float = 90) -> None:
        """Take in until the program has ended."""
        deadline_s = time.monotonic() + timeout_s
        while self.read():
            assert time.monotonic() < deadline_s, f"no end: {self.lines()}"

    def shows(self, text: str) -> bool:
        """Whether some line has this text."""
        return any(text in line for line in self.lines())

    def result(self) -> dict[str, Any]:
        """The JSON of a run. MPICH may put standard output between two pieces of a line of standard error."""
        written = self.raw.decode()
        result, _ = json.JSONDecoder().raw_decode(written, written.index('{"strategy"'))
        return dict(result)

    def close(self) -> None:
        """Both ends."""
        for descriptor in (self._own, self.end):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def running(
    screen: Screen, command: Sequence[str], cwd: Path, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose terminal this is, Ctrl-C and all. It is killed at the end if it is still there."""
    # What `setsid --ctty` does: the terminal's keys are then for this program.
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        cwd=cwd,
        env={"TERM": "xterm", **env},
        stdin=screen.end,
        stdout=screen.end,
        stderr=screen.end,
    )
    os.close(screen.end)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        screen.close()
