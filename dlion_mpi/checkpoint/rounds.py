"""How workers take a checkpoint together while they train.

Now and then every worker tells every other whether a checkpoint is due (*asking*, a gather that nobody waits for but in
`sync`). When one is, each takes a snapshot at its next border between two steps: a copy, which a thread then writes.

The snapshots make one state of the run, because nobody uses a gradient that its sender will send again:

- in `sync` all stop before the same step, and every gradient of the steps before has been used;
- else a worker sends no entries from its own snapshot until everyone has taken theirs, as if its links were busy, and
  what others had sent it before theirs goes into its file when it comes. Nobody waits.

When all files are on the disk, rank 0 makes the checkpoint count. In the end of a run a last one is taken.
Source of the cut: Lai and Yang, "On distributed snapshots" (1987), with the colour of a message known by counting.
"""

from __future__ import annotations

import contextlib
import math
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
from dlion_mpi.loop.exchange import quiet
from dlion_mpi.loop.ports import Collectives, Ticket, Until
from dlion_mpi.loop.worker import Worker
from dlion_mpi.strategies.contract import Resumable
from dlion_mpi.vector.named_arrays import Arrays
from dlion_mpi.wire import Kind, Message

ASKING, STAGES = "asking", "checkpoint"
CHANNELS = (ASKING, STAGES)
ASK_S, ASK_AFTER_S = 0.2, 0.02
"""Seconds between two rounds of asking: while training, and after the last step."""
SHARE = 0.1
"""Of a processor that writing may take while training goes on; not when the run is about to end."""
LEFT = math.nan
"""What a worker says that ended in the middle of a step and has no state to keep."""
HALF = 1 << 32

Table = npt.NDArray[np.float64]


class Say(IntEnum):
    """What a worker says when it asks, by column."""

    DUE = 0
    BUSY = 1
    NEWS = 2
    LEAVE = 3
    END = 4
    ENDED = 5
    BROKEN = 6
    STEP_S = 7


class CheckpointRounds:
    """Takes checkpoints of one worker into ``run``; see `loop.worker.Checkpoints`.

    ``texts``: what goes into the file beside the state. ``executor``: one thread that writes. ``last_step``: of the
    checkpoint that the run goes on from, and ``own_step`` this worker's own in it, -1 for none. ``before``: called when
    one is taken. ``say``: tells the user.
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
    ) -> None:
        assert config.checkpoint_every is not None
        self._every, self._keep = config.checkpoint_every, config.keep_checkpoints or 2
        self._rank, self._ranks, self._run = rank, ranks, run
        self._collectives, self._executor = collectives, executor
        self._preemption, self._texts, self._before, self._say = preemption, texts, before, say
        self._awaited = config.mode.lockstep or ranks == 1
        self._sync = config.mode.lockstep
        self.holding = self.over = False
        self.safe = True
        """Whether the newest snapshot has become part of a complete checkpoint."""
        self.left: str | None = None
        """Why the run was ended by `Preemption` or `end`; "" if another rank knows."""
        self.preempted = False
        self.slowest_s: float | None = None
        """What the slowest checkpoint took, from its snapshot until it counted."""
        self._end_reason: str | None = None
        self._hurry = False
        self._asking: Ticket | None = None
        self._next_ask_step, self._next_ask_s = 0, 0.0
        self._next_due_s: float | None = None
        self._step_began_s, self._step_s = 0.0, 0.0
        self._seen_step = own_step
        """Where this worker's newest snapshot was taken, or tried."""
        self._name_step = last_step
        self._spare: Arrays = {}
        self._forget()

    def _forget(self) -> None:
        """No checkpoint is under way."""
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

    # What the worker's loop calls.

    def advance(self, w: Worker) -> Iterator[Until]:
        """Between two steps: move a checkpoint on, or take one that is due."""
        now_s = w.now_s()
        self._step_began_s, self._step_s = now_s, now_s - self._step_began_s
        self._move_on(w)
        if self._asking is not None:
            if self._awaited:
                yield Until(self._is_answered)
            if self._asking.done:
                yield from quiet(w)  # a snapshot has all that was sent, or that is remembered as unsent
                self._decide(w, ended=False)
        if self._asking is None and w.step < w.end_step and self._time_to_ask(w):
            self._ask(w, ended=False)

    def serve(self, w: Worker) -> None:
        """After the last step: go on taking part in the others' checkpoints, until `over`."""
        self._move_on(w)
        if self._asking is not None and self._asking.done:
            self._decide(w, ended=True)
            self._next_ask_s = w.now_s() + ASK_AFTER_S
        if self._asking is None and not self.over and w.now_s() >= self._next_ask_s:
            self._ask(w, ended=True)

    def arrived(self, w: Worker, message: Message) -> None:
        """A message has come; it belongs to the checkpoint under way if it was sent before its sender's snapshot."""
        open_ = self._taken is not None and self._writing is None and not self._sync
        if open_ and message.header.kind in (Kind.GRADIENT, Kind.WEIGHTS):
            self._log.append((w.collected[message.header.sender], message))

    def end(self, reason: str) -> None:
        """The run has come to its end: all workers are to end together, after a last checkpoint."""
        self._end_reason = self._end_reason or reason

    # Asking.

    def _is_answered(self) -> bool:
        return self._asking is not None and self._asking.done

    def _time_to_ask(self, w: Worker) -> bool:
        if self._awaited:
            return w.step >= self._next_ask_step
        return w.now_s() >= self._next_ask_s or (self._is_due(w) and not self._busy)

    def _is_due(self, w: Worker) -> bool:
        """Whether this worker wants a checkpoint at the border where the answers will be known."""
        if self._every.steps is not None:
            return w.step + self._awaited >= self._due_step()
        if self._next_due_s is None:
            self._next_due_s = w.now_s() + (self._every.seconds or math.inf)
        return w.now_s() >= self._next_due_s

    def _due_step(self) -> int:
        """The next multiple of ``--checkpoint-every``."""
        steps = self._every.steps or 1
        return (max(self._name_step, 0) // steps + 1) * steps

    def _ask(self, w: Worker, *, ended: bool) -> None:
        if w.timed_out():
            self.end("")
        leave = self._preemption.look(self.slowest_s, self._step_s)
        broken = ended and (w.midway or w.stop_reason is not None)
        said = {
            Say.DUE: self._is_due(w),
            Say.BUSY: self._busy,
            Say.NEWS: w.step != self._seen_step,
            Say.LEAVE: leave,
            Say.END: self._end_reason is not None,
            Say.ENDED: ended,
            Say.BROKEN: broken,
            Say.STEP_S: self._step_s,
        }
        self._asking = self._collectives.gather(ASKING, [float(said[column]) for column in Say])

    def _decide(self, w: Worker, *, ended: bool) -> None:
        """What follows from everyone's answers: the same on all ranks."""
        assert self._asking is not None
        table, self._asking = self._asking.table, None
        some = [bool(column.any()) for column in table.T]
        everyone = [bool(column.all()) for column in table.T]
        leave, end = some[Say.LEAVE], some[Say.END]
        self._hurry = leave or end or some[Say.ENDED]
        due = (everyone if self._every.steps is not None else some)[Say.DUE]  # of steps, the slowest has to do so many
        wanted = (due or leave or end or everyone[Say.ENDED]) and some[Say.NEWS] and not some[Say.BROKEN]
        if not some[Say.BUSY]:
            self.over = (some[Say.BROKEN] or everyone[Say.ENDED]) and not wanted
            if wanted:
                self._take(w)
            if (leave or end) and not (ended or some[Say.BROKEN]):
                self.preempted = leave
                self.left = self._preemption.reason if leave else self._end_reason
                w.end_step = min(w.end_step, w.step)
        self._set_next_ask(w, hurry=leave or end, step_s=float(table[:, Say.STEP_S].max()))

    def _set_next_ask(self, w: Worker, *, hurry: bool, step_s: float) -> None:
        """In `sync` the same step for all."""
        if not self._awaited:
            self._next_ask_s = w.now_s() + ASK_S
            return
        self._next_ask_step = w.step if hurry else w.step - 1 + max(1, math.ceil(ASK_S / max(step_s, 1e-6)))
        if self._every.steps is not None:
            self._next_ask_step = min(self._next_ask_step, max(w.step, self._due_step() - 1))

    # Taking one: the snapshot; what everyone's snapshot says; the file; what everyone's file says; the manifest.

    def _take(self, w: Worker) -> None:
        self._forget()
        self._busy = True
        self._taken_s = w.now_s()
        self._next_due_s = self._taken_s + (self._every.seconds or math.inf)
        self._seen_step, self.safe = w.step, False
        if self._awaited:  # everyone's: when to ask again must not depend on when the others' answer is seen
            self._name_step = w.step
        ranks = self._ranks
        if w.midway:
            self._cut = self._collectives.gather(STAGES, [LEFT] * (1 + ranks))
            return
        self._before()
        self._taken = snapshot.take(w, self._spare)
        self._spare = {}
        if not self._sync:
            self._log = [(0, message) for message in w.inbox.held]
        assert isinstance(w.strategy, Resumable)
        self.holding = not (self._awaited or w.strategy.restates)
        self._cut = self._collectives.gather(STAGES, [w.step, *(w.posted[peer] for peer in range(ranks))])

    def _move_on(self, w: Worker) -> None:
        """Start what can be started; nothing here waits."""
        if self._cut is not None and self._cut.done:
            table, self._cut, self.holding = self._cut.table, None, False
            if np.isnan(table).any():  # somebody has ended in the middle of a step meanwhile
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
        """Whether all that was sent to this worker before its senders' snapshots has come."""
        return self._sync or all(w.collected[rank] >= count for rank, count in enumerate(sent))

    def _write(self, w: Worker, sent: Table) -> None:
        assert self._taken is not None
        mail = [message for number, message in self._log if number <= sent[message.header.sender]]
        arrays, texts = {**self._taken, **snapshot.mail(mail)}, self._texts
        target, rank = folder.folder_of(self._run, self._name_step), self._rank
        self._sent, self._log = None, []

        def job() -> Written:
            target.mkdir(parents=True, exist_ok=True)
            return file.write(folder.rank_path(target, rank), arrays, texts, self._rest)

        self._writing = self._executor.submit(job)

    def _rest(self, cpu_s: float) -> None:
        """The writer has taken so much of the processor."""
        if not self._hurry:
            time.sleep(cpu_s * (1 / SHARE - 1))

    def _report_file(self, w: Worker, writing: Future[Written]) -> None:
        self._writing = None
        loss = float(np.mean(w.recent_losses)) if w.recent_losses else math.nan
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
        """All have written, or somebody could not."""
        self._written = None
        target, step = folder.folder_of(self._run, self._name_step), self._name_step
        failed = np.flatnonzero(table[:, 0] == 0)
        if len(failed):
            if failed[0] == self._rank:
                self._say(f"dlion: {target} could not be written ({self._problem}): the run goes on, older ones stay")
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
            self._say(f"dlion: {target} could not be written ({error.strerror}): the run goes on, older ones stay")
        self._forget()


def _discard(target: Path, rank: int) -> None:
    """Remove a rank's part of what will never be a checkpoint; whoever comes last removes the folder."""
    with contextlib.suppress(OSError):
        folder.rank_path(target, rank).unlink(missing_ok=True)
        target.rmdir()
