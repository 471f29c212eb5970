"""Find metrics files that are damaged, before this process reads them.

HDF5 can hang in a damaged file, or crash. So a child process reads each file first, under a time limit.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

LIMIT_S = 5.0
"""Seconds in which a small file can be read, even on a busy machine."""
BYTES_PER_S = 10e6
"""Larger files take longer, at this rate at most."""
AT_ONCE = 4
"""Files read in parallel."""


class FileCheck:
    """Remembers which files are sound. A damaged file is checked again when it has changed."""

    def __init__(self) -> None:
        self._sound: set[Path] = set()
        self._damaged: dict[Path, tuple[int, int]] = {}

    def damaged(self, paths: Iterable[Path]) -> set[Path]:
        """The damaged files among ``paths``."""
        stamps = {path: _stamp(path) for path in paths}
        unknown = [p for p, stamp in stamps.items() if p not in self._sound and self._damaged.get(p) != stamp]
        found = _read_apart(unknown) if unknown else set()
        self._sound |= set(unknown) - found
        self._damaged |= {path: stamps[path] for path in found}
        return set(stamps) & set(self._damaged) - self._sound


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _read_apart(paths: Sequence[Path]) -> set[Path]:
    """Read the files in another process. Returns those on which it hung or crashed."""
    done = subprocess.run(
        [sys.executable, "-m", "dlion_mpi.metrics.check", str(LIMIT_S)],
        input="\0".join(map(str, paths)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return {Path(name) for name in done.stdout.split("\0") if name}


def main(limit_s: float) -> None:
    """Read the files whose names are on stdin. Print those on which reading hangs or crashes. Names end with NUL."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    waiting = sys.stdin.read().split("\0")
    running: dict[int, str] = {}
    while waiting or running:
        if waiting and len(running) < AT_ONCE:
            name = waiting.pop()
            running[_fork_reader(name, limit_s)] = name
            continue
        pid, status = os.wait()
        name = running.pop(pid)
        if os.WIFSIGNALED(status):
            sys.stdout.write(f"{name}\0")


def _fork_reader(name: str, limit_s: float) -> int:
    """Read a file in a forked process, which a signal ends if that takes too long. Returns its id."""
    from dlion_mpi.metrics.rank import read_everything

    pid = os.fork()
    if pid == 0:
        try:
            path = Path(name)
            signal.setitimer(signal.ITIMER_REAL, limit_s + path.stat().st_size / BYTES_PER_S)
            read_everything(path)
        finally:
            os._exit(0)
    return pid


if __name__ == "__main__":
    main(float(sys.argv[1]))
