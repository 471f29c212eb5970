"""Waits of unusual length: this rank says a line about each, and ends the run after ``--stall-limit``."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from dlion_mpi.config.fields import Every
from dlion_mpi.errors import RunError, Stalled, UserError
from dlion_mpi.log import say
from dlion_mpi.loop.worker import Worker
from dlion_mpi.metrics.records import Waited

FEW = 5
"""A wait is long after this many usual steps."""
LEAST_S, FIRST_S = 5.0, 30.0
"""A wait is never long before: in training; before the second step, since ranks start at different speeds."""
FIRST_LIMIT_S = 60.0
"""The least limit before the second step."""
QUIET_S = 0.5
"""A shorter wait is not looked at."""
GROWTH, LONGEST_S = 2.0, 300.0
"""The second line comes after twice as long a wait, and so on, but after this many seconds at the latest."""
JUMP_S = 2.0
"""Seconds between two looks from which on this process itself was stopped meanwhile: that was no wait."""
STEPS = 9
"""Steps of which the median is a usual one."""
MOST_NAMES = 8


def limit_of(value: Any) -> Every | None:
    """Read ``--stall-limit`` before the other options are read; None if it is no time, which they will say."""
    try:
        return None if value is None else Every.parse(str(value))
    except UserError:
        return None


class Notices(Protocol):
    """Notices of the peers about their own waits; see `mpi.presence.Presence`."""

    waits: bool
    step: int

    @property
    def notices(self) -> Mapping[int, Any]: ...

    def waiting(self) -> Collection[int]:
        """Return the peers that have just said that they wait."""


class StallWatch:
    """Watches the waits of one rank of ``size``.

    ``limit``: ``--stall-limit``. ``now_s``: any clock. ``say``: shows a line to the user.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        limit: Every | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = say,
    ) -> None:
        self.presence: Notices | None = None
        """Known once all ranks have met."""
        self._limit = limit
        self.note = ""
        """What a view shows while this rank waits: the newest line."""
        self._rank, self._peers = rank, [peer for peer in range(size) if peer != rank]
        self._now_s, self._say = now_s, say
        self._worker: Worker | None = None
        self._source = ""
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._seen = (0, 0.0)
        self._heard: Mapping[int, int] = {}
        self._since_s = self._looked_s = self._next_s = 0.0

    def follow(self, worker: Worker) -> None:
        """Watch the waits of this worker's loop from now on."""
        self._worker = worker
        self._seen = (worker.step, self._now_s())

    @contextmanager
    def waiting(self, source: str = "") -> Iterator[Callable[[], bool]]:
        """Watch a wait for peers, or for a ``source`` of this rank's own.

        Yields a function to call all the time, which returns False. It raises Stalled after ``--stall-limit``; for a
        source RunError, since the other ranks can then end in order.
        """
        self._source = source
        self._begin()
        try:
            yield self._look
        finally:
            if self.presence is not None:
                self.presence.waits = False
            self.note, spoken = "", self.note
        if spoken:
            self._say(f"dlion: rank {self._rank}: continues after {self._looked_s - self._since_s:.0f} s")

    def _begin(self) -> None:
        now_s = self._since_s = self._looked_s = self._now_s()
        self._heard = self._heard_steps()
        self._next_s = now_s + self._long_s()
        if self._worker is not None:
            (step, at_s), self._seen = self._seen, (self._worker.step, now_s)
            if step < self._worker.step:
                self._steps.append((now_s - at_s) / (self._worker.step - step))
            else:
                self._seen = step, at_s

    def _look(self) -> bool:
        now_s = self._now_s()
        if (jumped_s := now_s - self._looked_s) > JUMP_S:
            self._since_s += jumped_s
            self._next_s += jumped_s
        self._looked_s = now_s
        waited_s = now_s - self._since_s
        if waited_s < QUIET_S:
            return False
        if self.presence is not None and not self._source:
            self.presence.step = -1 if self._worker is None else self._worker.step
            self.presence.waits = waited_s > min(self._long_s(), self._limit_s()) / 2
            for peer, notice in self.presence.notices.items():
                if notice.ends and self.presence.waits:
                    raise Stalled(f"rank {peer} has waited too long for rank {notice.peer}", [notice.peer])
        if now_s >= self._next_s:
            self._next_s = self._since_s + min(GROWTH * waited_s, waited_s + LONGEST_S)
            self._speak(waited_s)
        if waited_s >= self._limit_s():
            peers = self._missing()
            what = f"rank {self._rank} has waited {waited_s:.0f} s for {self._name(peers)}"
            raise RunError(what) if self._source else Stalled(what, peers)
        return False

    def _long_s(self) -> float:
        """Seconds after which a wait is long."""
        if len(self._steps) < 2:
            return FIRST_S
        return max(LEAST_S, FEW * statistics.median(self._steps))

    def _limit_s(self) -> float:
        if self._limit is None or self._limit.seconds is None:
            return math.inf
        least_s = FIRST_LIMIT_S if len(self._steps) < 2 else FEW * statistics.median(self._steps)
        return max(self._limit.seconds, least_s)

    def _heard_steps(self) -> dict[int, int]:
        """The step at which each peer was last heard of, as far as is known."""
        heard = {} if self._worker is None else self._worker.heard_steps()
        if self.presence is not None:
            for peer, notice in list(self.presence.notices.items()):
                heard[peer] = max(heard.get(peer, -1), notice.step)
        return heard

    def _missing(self) -> list[int]:
        """The peers that neither wait nor have been heard of since this wait began; if all wait, the slowest."""
        if self._source:
            return []
        heard = self._heard_steps()
        waiting = () if self.presence is None else self.presence.waiting()
        silent = [p for p in self._peers if p not in waiting and heard.get(p, -1) <= self._heard.get(p, -1)]
        if silent:
            return silent
        least = min((heard.get(peer, -1) for peer in self._peers), default=-1)
        return [peer for peer in self._peers if heard.get(peer, -1) == least]

    def _name(self, peers: Sequence[int]) -> str:
        """Name the peers, and the step at which the slowest of them was last heard of."""
        if self._source:
            return self._source
        if self.presence is None:
            return "the other ranks to start"
        if not peers:
            return "its own files and threads"
        numbers = [str(peer) for peer in peers[:MOST_NAMES]]
        if len(peers) > MOST_NAMES:
            numbers.append(f"{len(peers) - MOST_NAMES} others")
        names = numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
        heard = self._heard_steps()
        step = min(heard.get(peer, -1) for peer in peers)
        known = f", last heard of at step {step}" if step >= 0 else ""
        too = " (waiting too)" if set(peers) <= set(self.presence.waiting()) else ""
        return f"rank{'s' * (len(peers) > 1)} {names}{too}{known}"

    def _speak(self, waited_s: float) -> None:
        peers = self._missing()
        saves = self._worker is not None and self._worker.config.checkpoint_every is not None
        ends = f"the run{' with a checkpoint' * saves}"
        if self._limit is None:
            can = f"--stall-limit 10m would end {ends}"
        else:
            can = f"--stall-limit {self._limit} ends {ends} in {max(0.0, self._limit_s() - waited_s):.0f} s"
        self.note = f"rank {self._rank}: waiting {waited_s:.0f} s for {self._name(peers)}; {can}"
        self._say(f"dlion: {self.note}")
        if self._worker is not None and peers:
            step, now_s, heard = self._worker.step, self._worker.now_s(), self._heard_steps()
            with suppress(RunError):  # of a full disk, which the next step reports
                self._worker.recorder.waited(
                    [Waited(step, now_s, waited_s, peer, heard.get(peer, -1)) for peer in peers]
                )
