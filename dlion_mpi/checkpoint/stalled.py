"""The end of a run in which a rank has waited too long for another: the ranks that are there end it together.

Each of them closes its metrics, writes its part of a last checkpoint, and tells the others. The lowest of them
completes the checkpoint and speaks for all. No rank can leave MPI in order without the missing one, so the processes
end by MPI_Abort, when everything is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from dlion_mpi.checkpoint.file import Written
from dlion_mpi.checkpoint.folder import Part
from dlion_mpi.checkpoint.preemption import EXIT_CODE
from dlion_mpi.checkpoint.rounds import CheckpointRounds
from dlion_mpi.errors import RunError, Stalled
from dlion_mpi.files import AnyRecorder
from dlion_mpi.log import say
from dlion_mpi.loop.worker import Worker
from dlion_mpi.mpi import startup
from dlion_mpi.mpi.presence import Presence
from dlion_mpi.mpi.ranks import Ranks
from dlion_mpi.result import Finish, Result, sum_up

HEAR_S, WRITE_S = 3.0, 60.0
"""Seconds to wait for ranks that may be there, and for those that are and still write."""
LEADER_S = 20.0
"""Seconds that the others leave the leader to say how the run ended."""
LOOK_S = 0.01


def end(ranks: Ranks, worker: Worker, stalled: Stalled, recorder: AnyRecorder) -> Result:
    """End the run with the ranks that are there. MPI belongs to the caller's thread.

    The result is that of these ranks; its ``rank`` counts them alone. Its exit code is 75 if they wrote a checkpoint,
    else 1.
    """
    presence, rounds = ranks.presence, worker.checkpoints
    presence.tell(ends_for=min(stalled.peers, default=-1))
    worker.stop_reason, worker.exit_code, worker.current = str(stalled), 1, None
    seconds = worker.now_s()
    _close(worker, recorder)
    part = _save(rounds, worker) if isinstance(rounds, CheckpointRounds) else None
    own = {"finish": Finish.of(worker, seconds).to_text(), "part": None if part is None else asdict(part)}
    presence.tell_text(json.dumps(own))
    there: dict[int, dict[str, Any]] = {ranks.rank: own, **_gathered(presence, stalled, ranks.size)}
    leader = min(there)
    parts = {rank: _part(found["part"]) for rank, found in there.items() if found.get("part") is not None}
    if isinstance(rounds, CheckpointRounds) and parts:
        if leader == ranks.rank:
            if _complete(rounds, parts):
                worker.exit_code = EXIT_CODE
            presence.tell_text(json.dumps({"code": worker.exit_code}))
        else:
            worker.exit_code = _code_of(presence, leader, there)
    if worker.exit_code == EXIT_CODE:
        worker.stop_reason = f"{stalled}: to be started again with --resume {worker.config.out}"
    startup.abort_at_exit(worker.exit_code, after_s=0.0 if leader == ranks.rank else LEADER_S)
    members = sorted(rank for rank, found in there.items() if "finish" in found)
    finishes = [
        replace(Finish.from_text(there[rank]["finish"]), stop_reason=worker.stop_reason, exit_code=worker.exit_code)
        for rank in members
    ]
    return sum_up(worker.config, finishes, rank=members.index(ranks.rank), report=False)


def _close(worker: Worker, recorder: AnyRecorder) -> None:
    try:
        worker.write_record()
        recorder.close(complete=False)
    except RunError as error:
        say(f"dlion: {error}")


def _save(rounds: CheckpointRounds, worker: Worker) -> Part | None:
    try:
        return rounds.save_alone(worker)
    except OSError as error:
        say(f"dlion: rank {worker.rank}: its state could not be saved ({error.strerror})")
        return None


def _complete(rounds: CheckpointRounds, parts: Mapping[int, Part]) -> bool:
    try:
        target = rounds.complete_alone(parts)
    except OSError as error:
        say(f"dlion: the last checkpoint could not be written ({error.strerror}): older ones stay")
        return False
    say(f"dlion: {target} is complete, with rank{'s' * (len(parts) > 1)} {', '.join(map(str, sorted(parts)))}")
    return True


def _part(fields: Mapping[str, Any]) -> Part:
    return Part(**{**fields, "file": Written(**fields["file"])})


def _gathered(presence: Presence, stalled: Stalled, size: int) -> dict[int, dict[str, Any]]:
    """Return what the other ranks that are there say, by rank."""
    expected = size - 1 - len(stalled.peers)
    found: dict[int, dict[str, Any]] = {}

    def is_complete(waited_s: float) -> bool:
        _hear(presence, found)
        return len(found) >= expected or (waited_s > HEAR_S and presence.waiting() <= found.keys())

    _wait(presence, is_complete)
    return found


def _code_of(presence: Presence, leader: int, there: dict[int, dict[str, Any]]) -> int:
    """Return the exit code that the leader says; 1 if it says none."""

    def is_known(waited_s: float) -> bool:
        _hear(presence, there)
        return "code" in there[leader]

    _wait(presence, is_known)
    return int(there[leader].get("code", 1))


def _hear(presence: Presence, found: dict[int, dict[str, Any]]) -> None:
    """Add what has arrived to what each rank has said before."""
    for peer, text in presence.hear_texts():
        found[peer] = {**found.get(peer, {}), **json.loads(text)}


def _wait(presence: Presence, ready: Callable[[float], bool]) -> None:
    """Tell all that the run ends, until ``ready`` of the seconds that have passed, or `WRITE_S`."""
    began_s = time.monotonic()
    presence.waits = True
    while not ready(waited_s := time.monotonic() - began_s) and waited_s < WRITE_S:
        presence.progress()
        time.sleep(LOOK_S)
