"""Start commands as a user does: `mpirun`, or alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


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
    mpirun = [str(BIN / "mpirun"), "-n", str(ranks)]
    version = subprocess.run([mpirun[0], "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    if "Open MPI" in version:
        mpirun.append("--oversubscribe")
        if os.geteuid() == 0:
            mpirun.append("--allow-run-as-root")
    return [*mpirun, str(BIN / words[0]), *words[1:]]


def start(ranks: int | None, *words: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start it, in a process group of its own; the project's root can be imported from."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        command(ranks, *words),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


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
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if word in line:
                found.append(line)
    return found


def sequence(words: str) -> Sequence[str]:
    """Words as a shell splits them without quotes."""
    return words.split()
