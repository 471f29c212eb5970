"""Virtual time: what happens when, and a network whose bytes take time. No wall clock and no randomness here.

The micro-clouds of docs/environments.md, simulated.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from dlion_mpi.microcloud.environments import Environment, Phase

PAYLOAD_SHARE = 0.949
"""Of a rate that is set, what MPI carries for its user: headers take 4.4 %, TCP's acknowledgements of what comes the
other way the rest. The mean over emulated links (`benchmarks/results/emulate.json`)."""
RESOLUTION_S = 1e-9
"""Transfers that end within a nanosecond of each other end together: below it, rounding would tell them apart."""

Deliver = Callable[[Any], None]


class Events:
    """What happens when, in virtual seconds. What is due at the same time happens in the order it was asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` at ``time_s``, which must not have passed."""
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    def run(self, ended: Callable[[], bool]) -> None:
        """Let things happen until ``ended()``, or until nothing is left to happen."""
        while self._heap and not ended():
            self.now_s, _, action = heapq.heappop(self._heap)
            action()


class Stream:
    """What one worker sends to another: messages of so many bytes, first in first out, as in a TCP connection."""

    __slots__ = ("medium", "queue")

    def __init__(self) -> None:
        self.medium: Medium | None = None
        self.queue: deque[tuple[float, Deliver, Any]] = deque()

    def send(self, size_bytes: float, deliver: Deliver, parcel: Any) -> None:
        """Call ``deliver(parcel)`` when ``size_bytes`` more are across."""
        self.queue.append((size_bytes, deliver, parcel))
        if len(self.queue) == 1:
            assert self.medium is not None
            self.medium.add(self, size_bytes)


class Medium:
    """A rate, in payload bytes per second, that the streams with something to send share evenly.

    Even shares mean that every busy stream is served equally many bytes. So one number, the bytes each has been
    served since the medium was idle, tells how far all of them are; a message ends when that number reaches what
    it was at the message's start plus its size. A stream that begins or ends costs O(log streams).
    """

    def __init__(self, events: Events, bytes_per_s: float, latency_s: float) -> None:
        self._events = events
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._served = 0.0
        self._served_at_s = 0.0
        self._busy: list[tuple[float, int, Stream]] = []  # a heap: where the first message of each stream ends
        self._order = itertools.count()
        self._due_s = math.inf

    def add(self, stream: Stream, size_bytes: float) -> None:
        """A stream that was idle has a message of ``size_bytes``."""
        self._serve()
        heapq.heappush(self._busy, (self._served + size_bytes, next(self._order), stream))
        if self._busy[0][2] is stream:  # else the one that ends first is only delayed, and `_finish` finds that out
            self._schedule()

    def release(self) -> list[tuple[Stream, float]]:
        """Serve nobody any more. Returns the streams that were busy, and the bytes left of their first message."""
        self._serve()
        busy, self._busy, self._due_s = sorted(self._busy), [], math.inf
        return [(stream, max(0.0, end - self._served)) for end, _, stream in busy]

    def _serve(self) -> None:
        """Bring ``_served`` up to now."""
        now_s = self._events.now_s
        if now_s == self._served_at_s:
            return
        if self._busy:
            self._served += (now_s - self._served_at_s) * self._bytes_per_s / len(self._busy)
        else:
            self._served = 0.0
        self._served_at_s = now_s

    def _schedule(self) -> None:
        """See to it that `_finish` is called when the next message ends, or sooner."""
        if not self._busy:
            return
        left = max(0.0, self._busy[0][0] - self._served)
        due_s = self._served_at_s + left * len(self._busy) / self._bytes_per_s
        if due_s < self._due_s:
            self._due_s = due_s
            self._events.at(due_s, self._finish)

    def _finish(self) -> None:
        """Deliver what has ended, if anything has: with more streams than foreseen, nothing has yet."""
        if self._events.now_s != self._due_s:
            return  # an earlier look has taken this one's place
        self._due_s = math.inf
        self._serve()
        busy = self._busy
        reach = self._served + RESOLUTION_S * self._bytes_per_s / len(busy)
        ended = []
        while busy and busy[0][0] <= reach:
            end, order, stream = busy[0]
            _, deliver, parcel = stream.queue.popleft()
            if stream.queue:
                heapq.heapreplace(busy, (end + stream.queue[0][0], order, stream))
            else:
                heapq.heappop(busy)
            ended.append((deliver, parcel))
        self._schedule()
        if self._latency_s:
            self._events.at(self._events.now_s + self._latency_s, partial(_deliver, ended))
        else:
            _deliver(ended)


def _deliver(ended: list[tuple[Deliver, Any]]) -> None:
    for deliver, parcel in ended:
        deliver(parcel)


class Network:
    """All streams of a micro-cloud. Its rates change with its phases, also for what is under way.

    ``run_seconds``: planned length of the run, for phases given as shares of it; None if unknown.
    """

    def __init__(self, environment: Environment, events: Events, run_seconds: float | None) -> None:
        self._environment = environment
        self._events = events
        workers = range(environment.workers)
        self._streams = {(a, b): Stream() for a in workers for b in workers if a != b}
        self._media: list[Medium] = []
        self._shape(environment.phases[0])
        starts_s = environment.phase_starts_s(run_seconds)
        for start_s, phase in list(zip(starts_s, environment.phases, strict=True))[1:]:
            if math.isfinite(start_s):
                events.at(start_s, partial(self._shape, phase))

    def stream(self, source: int, destination: int) -> Stream:
        """What ``source`` sends to ``destination``."""
        return self._streams[source, destination]

    def _shape(self, phase: Phase) -> None:
        """Bring a phase's rates into force: one medium per uplink, or one per link of a matrix."""
        under_way = [busy for medium in self._media for busy in medium.release()]
        self._media = []
        if phase.uplink_mbit is not None:
            uplinks = [self._medium(mbit) for mbit in phase.uplink_mbit]
            for (source, _), stream in self._streams.items():
                stream.medium = uplinks[source]
        else:
            for (source, destination), stream in self._streams.items():
                stream.medium = self._medium(self._environment.rate_mbit(source, destination, phase))
        for stream, left_bytes in under_way:
            assert stream.medium is not None
            stream.medium.add(stream, left_bytes)

    def _medium(self, mbit: float) -> Medium:
        medium = Medium(self._events, payload_bytes_per_s(mbit), self._environment.latency_s)
        self._media.append(medium)
        return medium


def payload_bytes_per_s(mbit: float) -> float:
    """What a link that is set to ``mbit`` Mbit/s carries of what its users send, in bytes per second."""
    return mbit * 1e6 / 8 * PAYLOAD_SHARE
