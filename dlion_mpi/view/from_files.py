"""What `dlion watch` sees of a run, by its files: how far it is, and whether it goes on, has ended or was killed.

As a program it answers every line on stdin with a look, as a line of JSON on stdout: see `commands.watch.Reader`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlion_mpi.errors import UserError
from dlion_mpi.metrics import reader as runs
from dlion_mpi.metrics.reader import Array, Rank, Run
from dlion_mpi.view.snapshot import Goal, Numbers, RankSnapshot, Snapshot

LAST = 200
"""Steps of each rank that are read."""
SPAN_S = 5.0
"""Of those, over how many seconds means are taken."""
NEW_S = 20.0
"""So long a folder, or a file, may be there before it can be read: its run is just beginning."""
GONE_S, SILENT_S, LOST_S = 3.0, 30.0, 600.0
"""Seconds without anything written after which a rank whose process is gone was killed; after which it is worth a
word; after which nobody waits any longer. In each case several steps must have been missed too."""
STEPS_MISSED = 5


def look(folder: str) -> dict[str, Any]:
    """The fields of a `commands.watch.Sight`. Raises UserError for what is no run and will not become one."""
    path = Path(folder)
    waiting = _not_begun(path)
    if waiting is None:
        try:
            run = runs.load(path, last=LAST)
        except UserError as error:
            files = list(path.glob("metrics-*.h5")) if path.is_dir() else []
            if not files or _age_s(files) > NEW_S:
                raise
            waiting = f"just beginning ({error})"
    if waiting is not None:
        return {"snapshot": None, "words": waiting, "code": 0 if path.exists() else 2}
    state, over, code = state_of(run)
    return {"snapshot": glance_of(run, state).to_json(), "words": state, "over": over, "code": code}


def _not_begun(path: Path) -> str | None:
    """Why there is nothing to see yet; None if there is, or never will be."""
    if not path.exists() and not path.is_symlink():
        return "not there yet"
    if path.is_dir() and not any(path.glob("metrics-*.h5")):
        if (path / "config.toml").exists():
            return "not training yet"
        if _age_s([path]) < NEW_S and not any(path.iterdir()):
            return "empty as yet"
    return None


def _age_s(paths: Sequence[Path]) -> float:
    """Seconds since the newest was written; infinite for none."""
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # moved away at this moment
            continue
    return max(0.0, time.time() - max(times)) if times else math.inf


def state_of(run: Run) -> tuple[str, bool, int]:
    """How it stands with the run in words, whether it is over, and with which exit code."""
    if run.ended:
        return "ended", True, 0
    open_ranks = [rank for rank in run.ranks if not rank.ended and not rank.closed]
    if not open_ranks:
        if all(rank.ended for rank in run.ranks):  # but some are missing
            return "ended, as far as it can be seen", True, 0
        return "stopped, or failed, before its end", True, 1
    silent_s = _age_s([rank.path for rank in run.ranks])
    steps_s = [float(rank.steps["step_s"][-1]) for rank in open_ranks if len(rank.steps["step_s"])]
    missed_s = STEPS_MISSED * float(np.nanmax([0.0, *steps_s]))
    gone = [rank.rank for rank in open_ranks if _is_gone(rank)]
    if gone and silent_s > max(GONE_S, missed_s):
        return f"killed: the process of rank {gone[0]} is gone, and the run did not end", True, 1
    if silent_s > max(LOST_S, missed_s):
        return f"killed, as it seems: nothing was written for {_words(silent_s)}", True, 1
    if silent_s > max(SILENT_S, missed_s):
        return f"nothing was written for {_words(silent_s)}: waiting, stuck or killed", False, 0
    return "", False, 0


def _is_gone(rank: Rank) -> bool:
    """Whether the process that wrote the file ran on this machine and is no more."""
    pid = rank.attributes.get("pid")
    if not isinstance(pid, int) or pid <= 0 or rank.attributes.get("host") != platform.node():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended and only its parent has not looked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return False


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def glance_of(run: Run, state: str = "") -> Snapshot:
    """The run as far as it was read."""
    steps = run.config.get("run.steps")
    seconds, target = run.config.get("run.seconds"), run.config.get("run.target_accuracy")
    if steps is None and seconds is None and target is None and run.config:
        steps = 1000  # see Config.last_step
    words = [run.config.get(f"{table}.{key}") for table, key in (("run", "sync"), ("model", "model"), ("data", "data"))]
    what = f"{run.workers} {'rank' if run.environment is None else 'worker'}{'s' * (run.workers > 1)}"
    title = ", ".join(str(word) for word in [run.strategy, words[0], what, *words[1:], run.path] if word is not None)
    return Snapshot(
        title=f"dlion: {title}",
        workers=run.workers,
        ranks=[_rank(rank) for rank in run.ranks],
        goal=Goal(math.inf if steps is None else float(steps), seconds, target),
        elapsed_s=run.seconds,
        virtual=run.environment is not None,
        real_s_per_s=1.0 if run.environment is None else _real_s(run) / (run.seconds or math.nan),
        state=state,
        notes=[note for note in run.notes if "not ended:" not in note],  # the state says it
    )


def _real_s(run: Run) -> float:
    """Seconds from the making of the folder to the newest metrics."""
    try:
        begun_s = (run.path / "config.toml").stat().st_mtime
        return max(rank.path.stat().st_mtime for rank in run.ranks) - begun_s
    except OSError:
        return math.nan


def _rank(rank: Rank) -> RankSnapshot:
    """A rank's last step, and means over its last moments."""
    columns, accuracies = rank.steps, rank.evaluations["accuracy"]
    times = columns["time_s"]
    recent = times >= times[-1] - SPAN_S if len(times) else np.zeros(0, bool)
    step_s, count = float(columns["step_s"][recent].sum()), int(recent.sum())
    links = rank.links()
    return RankSnapshot(
        rank=rank.rank,
        time_s=float(times[-1]) if count else 0.0,
        step=float(columns["step"][-1]) + 1 if count else 0.0,
        lbs=_newest(columns["lbs"]),
        gbs=_newest(columns["gbs"]),
        loss=float(columns["loss"][recent].mean()) if count else math.nan,
        step_s=step_s / count if count else math.nan,
        waiting=float(columns["wait_s"][recent].sum()) / step_s if step_s else math.nan,
        samples_per_s=float(columns["lbs"][recent].sum()) / step_s if step_s else math.nan,
        accuracy=_newest(accuracies),
        quality=_newest_by_peer(links["quality"], rank.workers),
        bytes_sent=_newest_by_peer(links["bytes_sent"], rank.workers),
        bytes_per_s=_newest_by_peer(links["bytes_per_s"], rank.workers),
        age_s=_newest_by_peer(links["age_s"], rank.workers),
    )


def _newest(values: Array) -> float:
    return float(values[-1]) if len(values) else math.nan


def _newest_by_peer(values: Array, workers: int) -> Numbers:
    """The last number that is one, by peer: of (T, n) makes (n,)."""
    newest = np.full(workers, np.nan)
    for row in values:
        known = np.isfinite(row)
        newest[known] = row[known]
    return newest


def main(folder: str) -> None:
    """Answer until nobody asks any more."""
    for _ in sys.stdin:
        try:
            answer = look(folder)
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # of a file that is not what it seems
            answer = {"error": f"{folder}: cannot be read ({type(error).__name__}: {error})"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
