"""`dlion watch`: follow a run from another shell, by the metrics files that it writes.

A process of its own reads them: HDF5 can wait for ever in a file that was damaged, or that a file system shows in
pieces, and nothing but its end helps then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from dlion_mpi.errors import UserError

TERMINAL_S, LINES_S = 1.0, 10.0
"""Seconds between two looks, in a terminal and elsewhere."""
PATIENCE_S = 30.0
"""Longer than this no look may take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dlion watch`."""
    parser.add_argument("run", metavar="RUN", help="folder that --out of a run makes, or will make")
    parser.add_argument("--once", action="store_true", help="one look, then end")
    parser.add_argument(
        "--every",
        metavar="SECONDS",
        help=f"between two looks (default: {TERMINAL_S:g} in a terminal, {LINES_S:g} elsewhere)",
    )


def main(args: argparse.Namespace) -> int:
    """Follow the run until it ends. Returns 0 if it went on or ended well, 1 if it failed or was killed."""
    every_s = _seconds(args.every)
    with contextlib.closing(Reader(args.run)) as reader:
        try:
            return _follow(reader, args.run, every_s, once=args.once)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # whoever reads has seen enough; nor must Python try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _seconds(text: str | None) -> float | None:
    try:
        seconds = None if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if seconds is not None and not 0.1 <= seconds <= 86400:
        raise UserError(f"--every {text}: must be a number of seconds from 0.1 to 86400")
    return seconds


@dataclass(frozen=True, slots=True)
class Sight:
    """What a look has shown. ``snapshot``: None where there is nothing yet; ``words``: then says why.

    ``over``: whether there is nothing to wait for; ``code``: the exit code of who stops looking now.
    """

    snapshot: dict[str, Any] | None
    words: str
    over: bool = False
    code: int = 0


def _follow(reader: Reader, run: str, every_s: float | None, *, once: bool) -> int:
    """Look, show, wait, until the run is over."""
    from dlion_mpi.view.render import lines, render
    from dlion_mpi.view.snapshot import Snapshot
    from dlion_mpi.view.terminal import Painter, terminal_of

    terminal = terminal_of(sys.stdout)
    painter = None if terminal is None or once else Painter(terminal)
    pause_s = every_s or (LINES_S if painter is None else TERMINAL_S)
    said: list[str] = []
    again = "" if once else f"; looking again every {pause_s:g} s"
    while True:
        begun_s = time.monotonic()
        sight = reader.look()
        if once and sight.code == 2:
            raise UserError(f"{run}: {sight.words}; give the folder that --out of a run has made")
        snapshot = None if sight.snapshot is None else Snapshot.from_json(sight.snapshot)
        if terminal is not None and snapshot is not None:
            width, height = terminal.size()
            drawn = render(snapshot, max(1, width - 1), max(1, height - 1), encoding=terminal.encoding)
        else:
            drawn = "\n".join(lines(snapshot)) if snapshot is not None else f"{run}: {sight.words}{again}"
        if painter is not None:
            painter.paint(drawn)
        elif drawn not in said:
            said = [drawn]
            print(drawn, flush=True)
        if once or sight.over:
            return sight.code
        # A look at many ranks takes a while: no more than a fifth of the time.
        time.sleep(max(pause_s, 4 * (time.monotonic() - begun_s)))


class Reader:
    """A process that looks at a run whenever it is asked to; one that does not answer is ended."""

    def __init__(self, run: str, patience_s: float = PATIENCE_S) -> None:
        self._run, self._patience_s = run, patience_s
        self._process: subprocess.Popen[bytes] | None = None

    def look(self) -> Sight:
        """What there is. Raises UserError for a folder that is none of a run."""
        if self._process is None:
            self._process = _start(self._run)
        answer = _ask(self._process, self._patience_s)
        if answer is None:
            self.close()
            return Sight(None, f"its metrics could not be read within {self._patience_s:g} s")
        if "error" in answer:
            raise UserError(answer["error"])
        return Sight(**answer)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start(run: str) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is for the one who looks.
    return subprocess.Popen(
        [sys.executable, "-m", "dlion_mpi.view.from_files", run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _ask(process: subprocess.Popen[bytes], patience_s: float) -> dict[str, Any] | None:
    """One question, one line of JSON; None if it takes too long or the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline_s = time.monotonic() + patience_s
    answer = b""
    try:
        process.stdin.write(b"\n")
        process.stdin.flush()
        while not answer.endswith(b"\n"):
            rest_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([process.stdout], [], [], rest_s)[0]:
                return None
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            answer += part
    except BrokenPipeError:
        return None
    return dict(json.loads(answer))
