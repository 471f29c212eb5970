"""Checkpoint rounds: workers take a consistent checkpoint together while they train.

Every 0.2 s the workers gather their votes on whether a checkpoint is due. In `sync` the loop waits for the votes; in
the other modes it does not. If one is due, each worker takes a snapshot before its next step, a copy in memory, and a
thread writes it.

The snapshots form a consistent cut: no gradient is in one worker's snapshot as sent and missing in its receiver's.

- In `sync` all workers stop before the same step. Otherwise a worker sends no entries between its own snapshot and the
  last worker's, as if its links were busy.
- Messages that were in flight at the cut are added to the receiver's file when they arrive. Training continues. In
  `sync` there are some only if a strategy applies messages some steps later.

When all files are on the disk, rank 0 writes the manifest. A run ends with a last checkpoint.
Source of the cut: Lai and Yang, "On distributed snapshots" (1987); messages are counted instead of coloured.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlion_mpi.checkpoint import file, folder, snapshot
from dlion_mpi.checkpoint.file import Written
from dlion_mpi.checkpoint.folder import Part
from dlion_mpi.checkpoint.preemption import Preemption
from dlion_mpi.config.options import Config
from dlion_mpi.errors import RunError
from dlion_mpi.loop.exchange import finish_encoding
from dlion_mpi.loop.ports import Collectives, Ticket, Until
from dlion_mpi.loop.worker import Worker
from dlion_mpi.vector.named_arrays import Arrays
from dlion_mpi.wire import Kind, Message

VOTES, STAGES = "asking", "checkpoint"
CHANNELS = (VOTES, STAGES)
VOTE_S, VOTE_AFTER_S = 0.2, 0.02
"""Seconds between two votes: while training, and after the last step."""
SHARE = 0.1
"""Limit on the writer's processor time, as a fraction of a core. Not applied when the run is about to end."""
LEFT = math.nan
"""Sent instead of a step by a worker that ended in the middle of a step and has no state to save."""
HALF = 1 << 32

Table = npt.NDArray[np.float64]


class Vote(IntEnum):
    """Columns of a worker's vote."""

    DUE = 0
    BUSY = 1
    NEWS = 2
    LEAVE = 3
    END = 4
    ENDED = 5
    BROKEN = 6
    STEP_S = 7


class CheckpointRounds:
    """Takes checkpoints of one worker into ``run``; implements `loop.parts.Checkpoints`.

    ``executor``: one writer thread. ``texts``: texts to save with the state. ``last_step``: step of the checkpoint
    that the run resumed from, and ``own_step`` this worker's step in it; -1 for a new run. ``before``: called before a
    snapshot. ``say``, ``warn``: show a line to the user, on progress and on a lost checkpoint.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        ranks: int,
        *,
        run: Path,
        collectives: Collectives,
        executor: Executor,
        preemption: Preemption,
        texts: Mapping[str, str],
        last_step: int = -1,
        own_step: int = -1,
        before: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        assert config.checkpoint_every is not None
        self._every, self._keep = config.checkpoint_every, config.keep_checkpoints or 2
        self._rank, self._ranks, self._run = rank, ranks, run
        self._collectives, self._executor = collectives, executor
        self._preemption, self._texts, self._before = preemption, texts, before
        self._say, self._warn = say, warn
        self.lost = 0
        """Checkpoints that could not be written."""
        self._awaited = config.mode.lockstep or ranks == 1
        self._sync = config.mode.lockstep
        self.holding = self.over = False
        self.safe = True
        """Whether the newest snapshot is part of a complete checkpoint."""
        self.left: str | None = None
        """Reason why `Preemption` or `end` ended the run; "" if the reason is on another rank."""
        self.preempted = False
        self.slowest_s: float | None = None
        """Duration of the slowest checkpoint, from its snapshot to its manifest."""
        self._end_reason: str | None = None
        self._hurry = False
        self._votes: Ticket | None = None
        self._next_vote_step, self._next_vote_s = 0, 0.0
        self._next_due_s: float | None = None
        self._step_began_s, self._step_s = 0.0, 0.0
        self._seen_step = own_step
        """Step of this worker's newest snapshot, successful or not."""
        self._name_step = last_step
        self._spare: Arrays = {}
        self._forget()

    def _forget(self) -> None:
        """Reset the state of the current checkpoint round."""
        self._busy = False
        self._taken: Arrays | None = None
        self._log: list[tuple[int, Message]] = []
        self._cut: Ticket | None = None
        self._sent: Table | None = None
        self._writing: Future[Written] | None = None
        self._problem = ""
        self._written: Ticket | None = None
        self._completing: Future[None] | None = None
        self._taken_s = 0.0

    # Called by the training loop.

    def advance(self, w: Worker) -> Iterator[Until]:
        """Advance the checkpoint round between two steps, or take a checkpoint that is due."""
        now_s = w.now_s()
        self._step_began_s, self._step_s = now_s, now_s - self._step_began_s
        self._move_on(w)
        if self._votes is not None:
            if self._awaited:
                yield Until(self._is_decided)
            if self._votes.done:
                yield from finish_encoding(w)  # every entry of a snapshot is either sent or in the residual
                self._decide(w, ended=False)
        if self._votes is None and w.step < w.end_step and self._time_to_vote(w):
            self._vote(w, ended=False)

    def serve(self, w: Worker) -> None:
        """Take part in checkpoint rounds after the last step, until `over`."""
        self._move_on(w)
        if self._votes is not None and self._votes.done:
            self._decide(w, ended=True)
            self._next_vote_s = w.now_s() + VOTE_AFTER_S
        if self._votes is None and not self.over and w.now_s() >= self._next_vote_s:
            self._vote(w, ended=True)

    def arrived(self, w: Worker, message: Message) -> None:
        """Record a received message for the current checkpoint, in case it was in flight at the cut."""
        open_ = self._taken is not None and self._writing is None
        if open_ and message.header.kind in (Kind.GRADIENT, Kind.WEIGHTS):
            self._log.append((message.header.sequence, message))

    def end(self, reason: str) -> None:
        """Request the end of the run on all workers, after a last checkpoint."""
        self._end_reason = self._end_reason or reason

    # Called at the end of a run that lacks a rank; see `checkpoint.stalled`.

    def hurry(self) -> None:
        """Let a file that is being written take all the time of a core."""
        self._hurry = True

    def save_alone(self, w: Worker) -> Part:
        """Write this rank's state next to the checkpoints, for `complete_alone`. Raises OSError."""
        path = self._alone(self._rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {**snapshot.take(w, {}), **snapshot.mail([])}
        return Part(file.write(path, arrays, self._texts), w.step, w.now_s(), w.history.totals.mean("loss"))

    def complete_alone(self, parts: Mapping[int, Part]) -> Path:
        """Make a checkpoint of the parts that ranks have saved with `save_alone`. Raises OSError."""
        step = max(min(part.step for part in parts.values()), self._name_step + 1)
        target = folder.folder_of(self._run, step)
        folder.remove(target)
        target.mkdir(parents=True)
        for rank in parts:
            os.replace(self._alone(rank), folder.rank_path(target, rank))
        folder.write_manifest(target, step, [parts.get(rank) for rank in range(self._ranks)])
        folder.prune(self._run, self._keep)
        return target

    def _alone(self, rank: int) -> Path:
        return folder.rank_path(self._run / folder.FOLDER, rank)

    # Votes.

    def _is_decided(self) -> bool:
        return self._votes is not None and self._votes.done

    def _time_to_vote(self, w: Worker) -> bool:
        if self._awaited:
            return w.step >= self._next_vote_step
        return w.now_s() >= self._next_vote_s or (self._is_due(w) and not self._busy)

    def _is_due(self, w: Worker) -> bool:
        """Whether this worker wants a checkpoint at the step where the votes will be known."""
        if self._every.steps is not None:
            return w.step + self._awaited >= self._due_step()
        if self._next_due_s is None:
            self._next_due_s = w.now_s() + (self._every.seconds or math.inf)
        return w.now_s() >= self._next_due_s

    def _due_step(self) -> int:
        """The next multiple of ``--checkpoint-every``."""
        steps = self._every.steps or 1
        return (max(self._name_step, 0) // steps + 1) * steps

    def _vote(self, w: Worker, *, ended: bool) -> None:
        if w.timed_out():
            self.end("")
        leave = self._preemption.look(self.slowest_s, self._step_s)
        broken = ended and (w.current is not None or w.stop_reason is not None)
        vote = {
            Vote.DUE: self._is_due(w),
            Vote.BUSY: self._busy,
            Vote.NEWS: w.step != self._seen_step,
            Vote.LEAVE: leave,
            Vote.END: self._end_reason is not None,
            Vote.ENDED: ended,
            Vote.BROKEN: broken,
            Vote.STEP_S: self._step_s,
        }
        self._votes = self._collectives.gather(VOTES, [float(vote[column]) for column in Vote])

    def _decide(self, w: Worker, *, ended: bool) -> None:
        """Act on the votes. All ranks have the same table and reach the same decision."""
        assert self._votes is not None
        table, self._votes = self._votes.table, None
        some = [bool(column.any()) for column in table.T]
        every = [bool(column.all()) for column in table.T]
        leave, end = some[Vote.LEAVE], some[Vote.END]
        self._hurry = leave or end or some[Vote.ENDED]
        due = (every if self._every.steps is not None else some)[Vote.DUE]  # steps: the slowest worker's count
        wanted = (due or leave or end or every[Vote.ENDED]) and some[Vote.NEWS] and not some[Vote.BROKEN]
        if not some[Vote.BUSY]:
            self.over = (some[Vote.BROKEN] or every[Vote.ENDED]) and not wanted
            if wanted:
                self._take(w)
            if (leave or end) and not (ended or some[Vote.BROKEN]):
                self.preempted = leave
                self.left = self._preemption.reason if leave else self._end_reason
                w.end_step = min(w.end_step, w.step)
        self._set_next_vote(w, hurry=leave or end, step_s=float(table[:, Vote.STEP_S].max()))

    def _set_next_vote(self, w: Worker, *, hurry: bool, step_s: float) -> None:
        """Schedule the next vote; in `sync` at the same step on all ranks."""
        if not self._awaited:
            self._next_vote_s = w.now_s() + VOTE_S
            return
        self._next_vote_step = w.step if hurry else w.step - 1 + max(1, math.ceil(VOTE_S / max(step_s, 1e-6)))
        if self._every.steps is not None:
            self._next_vote_step = min(self._next_vote_step, max(w.step, self._due_step() - 1))

    # Stages of a checkpoint: take the snapshot, gather the cut, write the file, gather the sizes, write the manifest.

    def _take(self, w: Worker) -> None:
        self._forget()
        self._busy = True
        self._taken_s = w.now_s()
        self._next_due_s = self._taken_s + (self._every.seconds or math.inf)
        self._seen_step, self.safe = w.step, False
        if self._awaited:  # the same on all ranks, so that the next vote does not depend on when a gather completes
            self._name_step = w.step
        ranks = self._ranks
        if w.current is not None:
            self._cut = self._collectives.gather(STAGES, [LEFT] * (1 + ranks))
            return
        try:
            self._before()
        except RunError:  # this rank ends, and takes no snapshot that the others would wait for
            self._cut = self._collectives.gather(STAGES, [LEFT] * (1 + ranks))
            raise
        self._taken = snapshot.take(w, self._spare)
        self._spare = {}
        held = w.inbox.held if not self._sync else [m for m in w.inbox.held if m.header.step < w.step]
        self._log = [(0, message) for message in held]
        self.holding = not (self._awaited or w.strategy.restates)
        posted = w.links.posted()
        self._cut = self._collectives.gather(STAGES, [w.step, *(posted.get(peer, 0) for peer in range(ranks))])

    def _move_on(self, w: Worker) -> None:
        """Start each stage whose input is ready. Does not block."""
        if self._cut is not None and self._cut.done:
            table, self._cut, self.holding = self._cut.table, None, False
            if np.isnan(table).any():  # a worker has ended in the middle of a step
                self._forget()
                return
            self._sent = table[:, 1 + self._rank]
            if not self._awaited:
                self._name_step = max(int(table[:, 0].min()), self._name_step + 1)
        if self._sent is not None and self._has_all(w, self._sent):
            self._write(w, self._sent)
        if self._writing is not None and self._writing.done():
            self._report_file(w, self._writing)
        if self._written is not None and self._written.done:
            self._complete(self._written.table)
        if self._completing is not None and self._completing.done():
            self._finish(w, self._completing)

    def _has_all(self, w: Worker, sent: Table) -> bool:
        """Whether every message that was in flight at the cut has arrived."""
        return all(w.inbox.received.get(rank, 0) >= count for rank, count in enumerate(sent))

    def _write(self, w: Worker, sent: Table) -> None:
        assert self._taken is not None
        mail = [message for number, message in self._log if number <= sent[message.header.sender]]
        arrays, texts = {**self._taken, **snapshot.mail(mail)}, self._texts
        target, rank = folder.folder_of(self._run, self._name_step), self._rank
        self._sent, self._log = None, []

        def job() -> Written:
            target.mkdir(parents=True, exist_ok=True)
            return file.write(folder.rank_path(target, rank), arrays, texts, self._throttle)

        self._writing = self._executor.submit(job)

    def _throttle(self, cpu_s: float) -> None:
        """Sleep after the writer has used ``cpu_s`` seconds of the processor."""
        if not self._hurry:
            time.sleep(cpu_s * (1 / SHARE - 1))

    def _report_file(self, w: Worker, writing: Future[Written]) -> None:
        self._writing = None
        loss = w.history.totals.mean("loss")
        try:
            done = writing.result()
            record = [1.0, done.size_bytes, done.digest // HALF, done.digest % HALF]
        except OSError as error:
            self._problem = error.strerror or str(error)
            record = [0.0] * 4
        assert self._taken is not None
        record += [snapshot.step_of(self._taken), snapshot.time_of(self._taken), loss]
        self._spare, self._taken = self._taken, None
        self._written = self._collectives.gather(STAGES, record)

    def _complete(self, table: Table) -> None:
        """Complete the checkpoint, or discard it if a rank could not write its file."""
        self._written = None
        target, step = folder.folder_of(self._run, self._name_step), self._name_step
        failed = np.flatnonzero(table[:, 0] == 0)
        if len(failed):
            self.lost += 1
            if failed[0] == self._rank:
                self._report_failure(target, self._problem)
            self._executor.submit(_discard, target, self._rank)
            self._forget()
            return
        parts = [Part(Written(int(row[1]), int(row[2]) * HALF + int(row[3])), int(row[4]), *row[5:]) for row in table]
        rank, run, keep = self._rank, self._run, self._keep

        def job() -> None:
            if rank == 0:
                folder.write_manifest(target, step, parts)
                folder.prune(run, keep)

        self._completing = self._executor.submit(job)

    def _finish(self, w: Worker, completing: Future[None]) -> None:
        seconds = w.now_s() - self._taken_s
        target = folder.folder_of(self._run, self._name_step)
        try:
            completing.result()
            self.safe = True
            self.slowest_s = max(seconds, self.slowest_s or 0.0)
            if self._rank == 0:
                self._say(f"dlion: {target} is complete after {seconds:.1f} s")
        except OSError as error:
            self.lost += 1
            self._report_failure(target, error.strerror)
        self._forget()

    def _report_failure(self, target: Path, problem: str | None) -> None:
        self._warn(f"dlion: {target} could not be written ({problem}): training continues, older ones stay")


def _discard(target: Path, rank: int) -> None:
    """Remove a rank's file of a failed checkpoint; the last rank also removes the folder."""
    with contextlib.suppress(OSError):
        folder.rank_path(target, rank).unlink(missing_ok=True)
        target.rmdir()
