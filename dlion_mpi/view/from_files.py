"""The state of a run for `dlion watch`, from its metrics files: how far it is, and whether it still runs.

As a program, it answers each line on stdin with one line of JSON on stdout; see `commands.watch.Reader`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.metrics.check import FileCheck
from dlion_mpi.metrics.files import Array
from dlion_mpi.metrics.gauges import link_gauges
from dlion_mpi.metrics.rank import Rank
from dlion_mpi.metrics.reader import Run, load
from dlion_mpi.metrics.series import tested
from dlion_mpi.view.snapshot import Goal, Numbers, RankSnapshot, Snapshot, snapshot_of

LAST_STEPS = 200
"""Steps of each rank that are read."""
WINDOW_S = 5.0
"""Means are taken over the last seconds of these steps."""
NEW_S = 20.0
"""A folder or file that is younger may not be readable yet, since its run is just beginning."""
KILLED_S, SILENT_S, LOST_S = 3.0, 30.0, 600.0
"""Seconds without a write until a rank without a process counts as killed, until the view mentions the silence, and
until the run counts as killed. In each case several steps must have been missed too."""
MISSED_STEPS = 5


@dataclass(frozen=True, slots=True)
class State:
    """Whether a run still runs. ``text``: in words; empty while nothing is wrong. ``exit_code``: of `dlion watch`."""

    text: str = ""
    finished: bool = False
    exit_code: int = 0


def read_state(folder: str, check: FileCheck) -> dict[str, Any]:
    """Read the fields of a `commands.watch.Reading`. Raises UserError for a folder that will never hold a run."""
    path = Path(folder)
    waiting = _not_begun(path)
    if waiting is None:
        try:
            run = load(path, last=LAST_STEPS, check=check)
        except UserError as error:
            files = list(path.glob("metrics-*.h5")) if path.is_dir() else []
            if not files or _age_s(files) > NEW_S:
                raise
            waiting = f"just beginning ({error})"
    if waiting is not None:
        return {"snapshot": None, "message": waiting, "exit_code": 0 if path.exists() else 2}
    state = state_of(run)
    return {
        "snapshot": snapshot(run, state.text).to_json(),
        "message": state.text,
        "finished": state.finished,
        "exit_code": state.exit_code,
    }


def _not_begun(path: Path) -> str | None:
    """The reason for which there is nothing to show yet; None if there is something, or never will be."""
    if not path.exists() and not path.is_symlink():
        return "not there yet"
    if path.is_dir() and not any(path.glob("metrics-*.h5")):
        if (path / "config.toml").exists():
            return "not training yet"
        if _age_s([path]) < NEW_S and not any(path.iterdir()):
            return "still empty"
    return None


def _age_s(paths: Sequence[Path]) -> float:
    """Seconds since the newest was written; infinite for none."""
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # it was just moved away
            continue
    return max(0.0, time.time() - max(times)) if times else math.inf


def state_of(run: Run) -> State:
    """Tell whether a run still runs, has ended, was stopped or was killed."""
    if run.ended:
        return State("ended", finished=True)
    open_ranks = [rank for rank in run.ranks if not rank.ended and not rank.closed]
    if not open_ranks:
        if all(rank.ended for rank in run.ranks):
            return State("ended, as far as the files show", finished=True)
        return State("stopped or failed", finished=True, exit_code=1)
    silent_s = _age_s([rank.path for rank in run.ranks])
    steps_s = [float(rank.steps["step_s"][-1]) for rank in open_ranks if len(rank.steps["step_s"])]
    missed_s = MISSED_STEPS * float(np.nanmax([0.0, *steps_s]))
    without_process = [rank.rank for rank in open_ranks if _has_no_process(rank)]
    if without_process and silent_s > max(KILLED_S, missed_s):
        return State(f"killed: the process of rank {without_process[0]} is gone", finished=True, exit_code=1)
    silence = f"nothing was written for {_silence(silent_s)}"
    if silent_s > max(LOST_S, missed_s):
        return State(f"probably killed: {silence}", finished=True, exit_code=1)
    if silent_s > max(SILENT_S, missed_s):
        return State(f"{silence}: waiting, stuck or killed")
    return State()


def _has_no_process(rank: Rank) -> bool:
    """Whether the process that wrote the file ran on this machine and has ended."""
    pid = rank.attributes.get("pid")
    if not isinstance(pid, int) or pid <= 0 or rank.attributes.get("host") != platform.node():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        return False
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended without its parent having noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return False


def _silence(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def snapshot(run: Run, state: str = "") -> Snapshot:
    """The latest moment of a run that was read."""
    steps = run.config.get("run.steps")
    seconds, target = run.config.get("run.seconds"), run.target
    if steps is None and seconds is None and target is None and run.config:
        steps = 1000  # see Config.last_step
    words = [run.config.get(f"{table}.{key}") for table, key in (("run", "sync"), ("model", "model"), ("data", "data"))]
    what = f"{run.workers} {'rank' if run.environment is None else 'worker'}{'s' * (run.workers > 1)}"
    title = ", ".join(str(word) for word in [run.strategy, words[0], what, *words[1:], run.path] if word is not None)
    return Snapshot(
        title=f"dlion: {title}",
        workers=run.workers,
        ranks=[rank_snapshot(rank, run.metrics) for rank in run.ranks],
        goal=Goal(math.inf if steps is None else float(steps), seconds, target),
        elapsed_s=run.seconds,
        metrics=run.metrics,
        virtual=run.environment is not None,
        real_s_per_s=1.0 if run.environment is None else _real_s(run) / (run.seconds or math.nan),
        state=state,
        # the state tells which ranks have not ended
        notes=[*_waits(run), *(note for note in run.notes if "not ended:" not in note)],
    )


def _waits(run: Run) -> list[str]:
    """A line for each rank that has said that it waits, and has done no step since."""
    said = []
    for rank in run.ranks:
        waits, times = rank.waits, rank.steps["time_s"]
        if rank.closed or not len(waits["time_s"]) or (len(times) and times[-1] > waits["time_s"][-1]):
            continue
        newest = waits["time_s"] == waits["time_s"][-1]
        peers = [str(peer) for peer in waits["peer"][newest]]
        seconds, step = waits["seconds"][-1] + _age_s([rank.path]), waits["peer_step"][newest].min()
        known = f", last heard of at step {step}" if step >= 0 else ""
        said.append(
            f"rank {rank.rank}: waiting {seconds:.0f} s for rank{'s' * (len(peers) > 1)} {', '.join(peers)}{known}"
        )
    return said


def _real_s(run: Run) -> float:
    """Seconds from the creation of the folder to the latest write."""
    try:
        begun_s = (run.path / "config.toml").stat().st_mtime
        return max(rank.path.stat().st_mtime for rank in run.ranks) - begun_s
    except OSError:
        return math.nan


def rank_snapshot(rank: Rank, metrics: Sequence[str]) -> RankSnapshot:
    """The latest moment of a rank, in a run with these test metrics."""
    times, tests = rank.steps["time_s"], {name: tested(rank, name) for name in metrics}
    recent = times >= times[-1] - WINDOW_S if len(times) else np.zeros(0, bool)
    columns = {name: values[recent] for name, values in rank.steps.items()}
    links = rank.links()
    return snapshot_of(
        rank.rank,
        columns,
        {name: float(values[-1]) if len(values) else math.nan for name, values in tests.items()},
        {gauge.key: _latest_by_peer(links[gauge.measure], rank.workers) for gauge in link_gauges()},
    )


def _latest_by_peer(values: Array, workers: int) -> Numbers:
    """The last finite value of each column: (T, n) becomes (n,)."""
    latest = np.full(workers, np.nan)
    for row in values:
        known = np.isfinite(row)
        latest[known] = row[known]
    return latest


def main(folder: str) -> None:
    """Answer each line on stdin until it ends."""
    check = FileCheck()
    for _ in sys.stdin:
        try:
            answer = read_state(folder, check)
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # of a file that is not what it seems
            answer = {"error": f"{folder}: cannot be read ({type(error).__name__}: {error})"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
