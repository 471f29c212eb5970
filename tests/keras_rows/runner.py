"""Start jobs that train rows on two ranks: `python -m tests.keras_rows.runner [ROW...]` prints how each went.

All rows share one job, because a rank takes seconds to start. A row that ends the job is named, and another job
continues with the rows after it. If the ranks were at work on different rows, each of these gets a job of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlion_mpi.mpi import launcher

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
JOBS = 12


class Result(NamedTuple):
    """How a row went: without ``error`` or ``skipped`` it agrees with plain Keras."""

    error: str = ""
    skipped: str = ""
    fit_s: float = 0.0
    seconds: float = 0.0


def results(names: Sequence[str], folder: Path, timeout_s: float) -> dict[str, Result]:
    """Train the rows, in as many jobs as it takes, within a time limit for all."""
    found: dict[str, Result] = {}
    suspects: list[str] = []
    end = time.monotonic() + timeout_s
    for job in range(JOBS):
        left = [name for name in names if name not in found]
        if not left or time.monotonic() > end:
            break
        rows = suspects[:1] or left
        place = folder / str(job)
        place.mkdir()
        printed = _job(rows, place, end - time.monotonic())
        ended, at_work = _read(place)
        found |= ended
        if len(at_work) == 1 or not (ended or at_work):
            found[(at_work or rows)[0]] = Result(f"ended the job: {_last(printed)}")
        suspects = suspects[1:] or (at_work if len(at_work) > 1 else [])
    return found | {name: Result("not reached") for name in names if name not in found}


def _job(names: Sequence[str], folder: Path, timeout_s: float) -> str:
    """Run a job to its end, or end it after the time limit; what it has printed."""
    program = [sys.executable, "-m", "tests.keras_rows.program", str(folder), *names]
    command = launcher.command_line(launcher.find(), program, ranks=RANKS, root=os.geteuid() == 0)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    threads = {"TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = {**threads, **os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2"}
    with open(folder / "printed", "w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1.0, timeout_s))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return "the time limit of all rows"
        printed.seek(0)
        return printed.read()


def _read(folder: Path) -> tuple[dict[str, Result], list[str]]:
    """The results of the rows that all ranks have ended, and the rows that ranks were at work on at the job's end."""
    of_rank: list[dict[str, dict[str, Any]]] = []
    at_work: list[str] = []
    for rank in range(RANKS):
        path = folder / f"{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        at_work += [line["row"] for line in lines[-1:] if line.get("state") == "started"]
        of_rank.append({line["row"]: line for line in lines if "state" not in line})
    ended = [name for name in of_rank[0] if all(name in lines for lines in of_rank)]
    return {name: _merged([lines[name] for lines in of_rank]) for name in ended}, list(dict.fromkeys(at_work))


def _merged(lines: Sequence[dict[str, Any]]) -> Result:
    """One result of those of all ranks."""
    errors = [f"rank {rank}: {line['error']}" for rank, line in enumerate(lines) if line.get("error")]
    if len({line.get("digest") for line in lines}) > 1 and not errors:
        errors = ["the ranks have different weights at the end"]
    seconds = max(line.get("s", 0.0) for line in lines)
    return Result("; ".join(errors), lines[0].get("skipped", ""), lines[0].get("fit_s", 0.0), seconds)


def _last(printed: str) -> str:
    """The last lines with words in them, without what mpirun adds."""
    lines = [line.strip() for line in printed.splitlines() if line.strip(" -*")]
    errors = [line for line in lines if "Error" in line]
    return " | ".join((errors or lines)[-2:])[-600:]


def main(names: Sequence[str]) -> int:
    """Train these rows, or all; print a line per row."""
    from tests.keras_rows.rows import ROWS

    with tempfile.TemporaryDirectory() as folder:
        found = results(names or [row.name for row in ROWS], Path(folder), 3600)
    for name, one in found.items():
        state = "FAILED" if one.error else "skipped" if one.skipped else "ok"
        print(f"{state:8} {name:28} {one.fit_s:5.1f} {one.seconds:5.1f} s  {one.error or one.skipped}")
    failed = sum(bool(one.error) for one in found.values())
    print(f"{len(found)} rows, {failed} failed, {sum(bool(one.skipped) for one in found.values())} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
