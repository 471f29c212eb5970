"""Start commands as a user does: `mpirun`, or alone."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlion_mpi.mpi import launcher
from dlion_mpi.mpi.launcher import Launcher

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LIGHT = """import sys
sys.modules.update(dict.fromkeys(("matplotlib", "pandas", "sklearn")))
"""
"""Begins a script that needs none of these. Keras imports them wherever they are installed, which takes seconds."""
_started: list[subprocess.Popen[str]] = []


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(ranks: int | None, *words: str) -> list[str]:
    """The command, under `mpirun` if ``ranks`` is given."""
    if ranks is None:
        return [str(BIN / words[0]), *words[1:]]
    program = [str(BIN / words[0]), *words[1:]]
    return launcher.command_line(_mpirun(), program, ranks=ranks, root=os.geteuid() == 0)


@functools.cache
def _mpirun() -> Launcher:
    return launcher.find()


def start(ranks: int | None, *words: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start it, in a process group of its own; the project's root can be imported from."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command(ranks, *words),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


def end_all() -> None:
    """End what was started and still runs: it would take the processors from the tests that follow."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.terminate()  # mpirun then ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen[str], timeout_s: float = 90) -> Ended:
    """Wait for it; kills its whole group and fails if that takes longer than ``timeout_s``."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s; stdout: {out}; stderr: {err}") from None
    return Ended(process.returncode, out, err)


def run(ranks: int | None, *words: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Ended:
    """Start it and wait for its end."""
    return end(start(ranks, *words, cwd=cwd, env=env))


def complaints(ended: Ended) -> list[str]:
    """The program's own lines about what is wrong."""
    return [line for line in ended.err.splitlines() if line.startswith("dlion: error:")]


def processes_with(word: str) -> list[str]:
    """The command lines of live processes that contain ``word``."""
    return [" ".join(words) for words in _processes().values() if word in " ".join(words)]


def ranks_with(word: str) -> list[int]:
    """The process ids of the ranks of `dlion train` whose command line contains ``word``."""
    return [
        pid
        for pid, words in _processes().items()
        if "python" in words[0] and "train" in words and word in " ".join(words)
    ]


def _processes() -> dict[int, list[str]]:
    """The command lines of live processes, but for this one's."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
                found[int(entry.name)] = words
    return found


def sequence(words: str) -> Sequence[str]:
    """Words as a shell splits them without quotes."""
    return words.split()
