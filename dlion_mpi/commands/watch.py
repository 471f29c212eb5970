"""`dlion watch`: follow a run from another shell, by its metrics files.

Another process reads the files, under a time limit: HDF5 can hang on a file system that shows a file in pieces.
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
"""Seconds between two readings, in a terminal and elsewhere."""
LIMIT_S = 30.0
"""Longest time that one reading may take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dlion watch`."""
    parser.description = (
        "Follow a run of --out from its metrics files alone: in a terminal a live view, elsewhere lines. Ends when the "
        "run ends; exit code 1 if it failed or was killed."
    )
    parser.set_defaults(action=main)
    parser.add_argument("run", metavar="RUN", help="--out folder of a run, which need not exist yet")
    parser.add_argument("--once", action="store_true", help="show the run once, then exit")
    parser.add_argument(
        "--every",
        metavar="SECONDS",
        help=f"time between two readings (default: {TERMINAL_S:g} in a terminal, {LINES_S:g} elsewhere)",
    )


def main(args: argparse.Namespace) -> int:
    """Follow the run until it ends. Return 0 if it runs or ended well, 1 if it failed or was killed."""
    every_s = _seconds(args.every)
    with contextlib.closing(Reader(args.run)) as reader:
        try:
            return _follow(reader, args.run, every_s, once=args.once)
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader of stdout has closed it; Python must not flush it again at exit
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
class Reading:
    """The state of a run. ``snapshot``: as JSON; None if there is nothing to show yet, and ``message`` says why.

    ``finished``: whether the run has ended. ``exit_code``: of `dlion watch` if it ends now.
    """

    snapshot: dict[str, Any] | None
    message: str
    finished: bool = False
    exit_code: int = 0


def _follow(reader: Reader, run: str, every_s: float | None, *, once: bool) -> int:
    """Read, show and sleep until the run has ended."""
    from dlion_mpi.view.render import lines, render
    from dlion_mpi.view.snapshot import Snapshot
    from dlion_mpi.view.terminal import Painter, terminal_of

    terminal = terminal_of(sys.stdout)
    painter = None if terminal is None or once else Painter(terminal)
    pause_s = every_s or (LINES_S if painter is None else TERMINAL_S)
    printed = ""
    again = "" if once else f"; trying again every {pause_s:g} s"
    while True:
        begun_s = time.monotonic()
        reading = reader.read()
        if once and reading.exit_code == 2:
            raise UserError(f"{run}: {reading.message}; give the --out folder of a run")
        snapshot = None if reading.snapshot is None else Snapshot.from_json(reading.snapshot)
        if terminal is not None and snapshot is not None:
            width, height = terminal.size()
            drawn = render(snapshot, max(1, width - 1), max(1, height - 1), encoding=terminal.encoding)
        else:
            drawn = "\n".join(lines(snapshot)) if snapshot is not None else f"{run}: {reading.message}{again}"
        if painter is not None:
            painter.paint(drawn)
        elif drawn != printed:
            printed = drawn
            print(drawn, flush=True)
        if once or reading.finished:
            return reading.exit_code
        # Reading many ranks takes a while: spend at most a fifth of the time on it.
        time.sleep(max(pause_s, 4 * (time.monotonic() - begun_s)))


class Reader:
    """A child process that reads a run on request. It is killed if it does not answer within ``limit_s``."""

    def __init__(self, run: str, limit_s: float = LIMIT_S) -> None:
        self._run, self._limit_s = run, limit_s
        self._process: subprocess.Popen[bytes] | None = None

    def read(self) -> Reading:
        """Read the run once. Raises UserError for a folder that holds no run."""
        if self._process is None:
            self._process = _start(self._run)
        answer = _ask(self._process, self._limit_s)
        if answer is None:
            self.close()
            return Reading(None, f"its metrics could not be read within {self._limit_s:g} s")
        if "error" in answer:
            raise UserError(answer["error"])
        return Reading(**answer)

    def close(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start(run: str) -> subprocess.Popen[bytes]:
    # In a new session, so that Ctrl-C reaches only this process.
    return subprocess.Popen(
        [sys.executable, "-m", "dlion_mpi.view.from_files", run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _ask(process: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any] | None:
    """Request one line of JSON; None if it does not arrive in time or the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline_s = time.monotonic() + limit_s
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
